//! Synthetic scenes: one coloured shape on a grey background, drawn by code, with an English
//! caption.
//!
//! A scene is a combination of shape, colour, size, position and texture, 7·8·2·5·3 = 1,680 in all.
//! About a fifth of them, chosen by a hash, are held out for the test. A seed draws what a caption
//! does not mention: the grey of the background, the exact position, the rotation and the shade.
//! These toy images compare methods only.

use flops_core::random::keyed_rng;
use rand::rngs::StdRng;
use rand::{RngExt, SeedableRng};

/// Key that separates the random numbers of captions from those of images.
const CAPTION: u64 = u64::from_le_bytes(*b"captions");

/// Height and width of a scene, in pixels.
pub const SIDE: usize = 32;
/// Shapes, as captions name them.
pub const SHAPES: [&str; 7] = ["circle", "square", "triangle", "cross", "ring", "diamond", "star"];
/// Colours, as captions name them.
pub const COLOURS: [&str; 8] = ["red", "green", "blue", "yellow", "purple", "orange", "cyan", "white"];
/// Sizes, as captions name them.
pub const SIZES: [&str; 2] = ["small", "large"];
/// Positions, as captions name them.
pub const POSITIONS: [&str; 5] =
    ["in the middle", "at the top left", "at the top right", "at the bottom left", "at the bottom right"];
/// Textures, as captions name them.
pub const TEXTURES: [&str; 3] = ["plain", "striped", "dotted"];

const RGB: [[f32; 3]; 8] = [
    [0.85, 0.12, 0.12],
    [0.12, 0.65, 0.18],
    [0.15, 0.25, 0.85],
    [0.92, 0.85, 0.12],
    [0.55, 0.15, 0.65],
    [0.95, 0.52, 0.08],
    [0.12, 0.78, 0.82],
    [0.95, 0.95, 0.95],
];

/// The attributes that a caption mentions.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Mention {
    /// The shape; without it the caption says "thing".
    pub shape: bool,
    /// The colour.
    pub colour: bool,
    /// The size.
    pub size: bool,
    /// The position.
    pub position: bool,
    /// The texture.
    pub texture: bool,
}

impl Mention {
    /// All attributes.
    pub const ALL: Self = Self { shape: true, colour: true, size: true, position: true, texture: true };
    /// No attribute: the caption says "a thing".
    pub const NONE: Self = Self { shape: false, colour: false, size: false, position: false, texture: false };

    /// Draws a mention: each attribute with probability 3/4.
    pub fn draw(rng: &mut StdRng) -> Self {
        let mut likely = || rng.random::<f32>() < 0.75;
        Self { shape: likely(), colour: likely(), size: likely(), position: likely(), texture: likely() }
    }
}

/// An affine change of colour that is the same for all images, like another camera: a domain shift.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Shift {
    /// The matrix applied to red, green and blue of a pixel, row by row.
    pub mix: [[f32; 3]; 3],
    /// The offset added to red, green and blue.
    pub offset: [f32; 3],
}

impl Shift {
    /// No change.
    pub const NONE: Self = Self { mix: [[1.0, 0.0, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]], offset: [0.0; 3] };

    /// The shifted pixel, clamped to [0, 1].
    pub fn apply(&self, rgb: [f32; 3]) -> [f32; 3] {
        std::array::from_fn(|c| {
            let mixed: f32 = self.mix[c].iter().zip(rgb).map(|(m, x)| m * x).sum();
            (mixed + self.offset[c]).clamp(0.0, 1.0)
        })
    }
}

/// A combination of attributes, each an index into its list.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct Scene {
    /// Index into [`SHAPES`].
    pub shape: usize,
    /// Index into [`COLOURS`].
    pub colour: usize,
    /// Index into [`SIZES`].
    pub size: usize,
    /// Index into [`POSITIONS`].
    pub position: usize,
    /// Index into [`TEXTURES`].
    pub texture: usize,
}

impl Scene {
    /// All combinations, in a fixed order.
    pub fn all() -> Vec<Self> {
        let sizes = [SHAPES.len(), COLOURS.len(), SIZES.len(), POSITIONS.len(), TEXTURES.len()];
        (0..sizes.iter().product())
            .map(|mut index| {
                let [texture, position, size, colour, shape] = [4, 3, 2, 1, 0].map(|axis: usize| {
                    let value = index % sizes[axis];
                    index /= sizes[axis];
                    value
                });
                Self { shape, colour, size, position, texture }
            })
            .collect()
    }

    /// Whether the combination is held out for the test.
    pub fn is_held_out(&self) -> bool {
        let parts = [self.shape, self.colour, self.size, self.position, self.texture];
        let hash = parts.iter().fold(0xcbf2_9ce4_8422_2325u64, |h, &part| {
            (h ^ part as u64).wrapping_mul(0x0000_0100_0000_01b3).rotate_left(23)
        });
        // the upper bits depend on all parts
        (hash.wrapping_mul(0x9e37_79b9_7f4a_7c15) >> 40) % 5 == 0
    }

    /// A caption; `variant`, any number, selects among synonyms and sentence openings.
    pub fn caption(&self, mention: Mention, variant: u64) -> String {
        let mut left = variant;
        let mut pick = |options: &[&str]| {
            let chosen = options[(left % options.len() as u64) as usize].to_string();
            left /= options.len() as u64;
            chosen
        };
        let size = match self.size {
            0 => pick(&["small", "little", "tiny"]),
            _ => pick(&["large", "big", "huge"]),
        };
        let texture = match self.texture {
            0 => pick(&["plain", "solid"]),
            1 => pick(&["striped", "lined"]),
            _ => pick(&["dotted", "spotted"]),
        };
        let shape = match SHAPES[self.shape] {
            "circle" => pick(&["circle", "disc"]),
            "diamond" => pick(&["diamond", "rhombus"]),
            "cross" => pick(&["cross", "plus sign"]),
            other => other.to_string(),
        };
        let place = match self.position {
            0 => pick(&["in the middle", "in the centre"]),
            at => {
                let side = ["", "top left", "top right", "bottom left", "bottom right"][at];
                pick(&["at the {}", "in the {} corner"]).replace("{}", side)
            }
        };
        let mut words = vec![];
        words.extend(mention.size.then_some(size));
        words.extend(mention.texture.then_some(texture));
        words.extend(mention.colour.then(|| COLOURS[self.colour].to_string()));
        words.push(if mention.shape { shape } else { "thing".into() });
        let article = |words: &str| if words.starts_with(['a', 'e', 'i', 'o', 'u']) { "an" } else { "a" };
        let thing = words.join(" ");
        let thing = format!("{} {thing}", article(&thing));
        match (mention.position, pick(&["", "there is ", "a picture of ", "a drawing of "])) {
            (true, start) => format!("{start}{thing} {place}"),
            (false, start) => format!("{start}{thing}"),
        }
    }

    /// The caption used in tests and examples: all attributes, in the words of the lists above.
    pub fn title(&self) -> String {
        self.caption(Mention::ALL, 0)
    }

    /// Draws the scene. `seed` draws what the caption does not mention.
    ///
    /// # Shapes
    /// - returns: `[3, SIDE, SIDE]` flattened, in [0, 1]
    pub fn render(&self, seed: u64, shift: &Shift) -> Vec<f32> {
        let mut rng = StdRng::seed_from_u64(seed);
        let mut between = |low: f32, high: f32| low + (high - low) * rng.random::<f32>();
        let ground = between(0.15, 0.5);
        let slope = [between(-0.1, 0.1), between(-0.1, 0.1)];
        let colour: [f32; 3] = RGB[self.colour].map(|c| (c * between(0.88, 1.06)).min(1.0));
        let radius = [between(4.2, 5.4), between(7.2, 8.4)][self.size];
        let (low, high) = (9.0, SIDE as f32 - 9.0);
        let middle = SIDE as f32 / 2.0;
        let (x, y) = [(middle, middle), (low, low), (high, low), (low, high), (high, high)][self.position];
        let (x, y) = (x + between(-1.0, 1.0), y + between(-1.0, 1.0));
        let turn = between(-0.15, 0.15);
        let grain: Vec<f32> = (0..SIDE * SIDE).map(|_| between(-0.03, 0.03)).collect();

        /// Samples per pixel in each direction.
        const FINE: usize = 4;
        let mut pixels = vec![0.0; 3 * SIDE * SIDE];
        for (at, grain) in grain.iter().enumerate() {
            let (row, column) = (at / SIDE, at % SIDE);
            let shade = ground + slope[0] * (column as f32 / middle - 1.0) + slope[1] * (row as f32 / middle - 1.0);
            let mut sum = [0.0; 3];
            for sample in 0..FINE * FINE {
                let px = column as f32 + (sample % FINE) as f32 / FINE as f32 + 0.5 / FINE as f32 - x;
                let py = row as f32 + (sample / FINE) as f32 / FINE as f32 + 0.5 / FINE as f32 - y;
                // rotated, in units of the radius
                let u = (px * turn.cos() + py * turn.sin()) / radius;
                let v = (py * turn.cos() - px * turn.sin()) / radius;
                let inside = self.contains(u, v);
                let dark = match self.texture {
                    1 => (v * radius / 1.5).floor().rem_euclid(2.0) >= 1.0,
                    2 => {
                        let cell = |w: f32| (w * radius / 3.0).rem_euclid(1.0) - 0.5;
                        cell(u).hypot(cell(v)) < 0.27
                    }
                    _ => false,
                };
                for (sum, c) in sum.iter_mut().zip(colour) {
                    *sum += if inside { c * if dark { 0.3 } else { 1.0 } } else { shade };
                }
            }
            let rgb = sum.map(|s| (s / (FINE * FINE) as f32 + grain).clamp(0.0, 1.0));
            for (plane, value) in shift.apply(rgb).into_iter().enumerate() {
                pixels[plane * SIDE * SIDE + at] = value;
            }
        }
        pixels
    }

    /// Whether a point lies inside the shape of radius 1.
    fn contains(&self, u: f32, v: f32) -> bool {
        let r = u.hypot(v);
        match SHAPES[self.shape] {
            "circle" => r < 0.95,
            "square" => u.abs().max(v.abs()) < 0.85,
            "triangle" => v < 0.75 && v > -0.95 && u.abs() < (v + 0.95) * 0.56,
            "cross" => (u.abs() < 0.32 && v.abs() < 1.0) || (v.abs() < 0.32 && u.abs() < 1.0),
            "ring" => r < 1.0 && r > 0.52,
            "diamond" => u.abs() + v.abs() < 1.1,
            _ => {
                // between the five points the edge falls to 0.42 of the radius
                let angle = v.atan2(u) + std::f32::consts::FRAC_PI_2;
                let fifth = std::f32::consts::TAU / 5.0;
                let off = (angle.rem_euclid(fifth) - fifth / 2.0).abs() / (fifth / 2.0);
                r < 0.42 + 0.68 * off.powf(1.3)
            }
        }
    }
}

/// Scenes, each with a seed for what its caption does not mention.
#[derive(Clone, Debug)]
pub struct Scenes {
    /// The scenes.
    pub scenes: Vec<Scene>,
    /// The seed of each scene.
    pub seeds: Vec<u64>,
}

impl Scenes {
    /// Every combination of the training set, `copies` times with different seeds.
    pub fn train(copies: usize, seed: u64) -> Self {
        Self::select(&|scene| !scene.is_held_out(), copies, seed)
    }

    /// Every held-out combination, `copies` times with different seeds. The training set has none
    /// of their [titles](Scene::title).
    pub fn test(copies: usize, seed: u64) -> Self {
        Self::select(&Scene::is_held_out, copies, seed ^ 0x7e57)
    }

    fn select(which: &dyn Fn(&Scene) -> bool, copies: usize, seed: u64) -> Self {
        let mut rng = StdRng::seed_from_u64(seed);
        let scenes: Vec<Scene> = (0..copies).flat_map(|_| Scene::all().into_iter().filter(which)).collect();
        let seeds = scenes.iter().map(|_| rng.random()).collect();
        Self { scenes, seeds }
    }

    /// Number of scenes.
    pub fn len(&self) -> usize {
        self.scenes.len()
    }

    /// Whether there is no scene.
    pub fn is_empty(&self) -> bool {
        self.scenes.is_empty()
    }

    /// The images of all scenes.
    ///
    /// # Shapes
    /// - returns: `[scenes, 3, SIDE, SIDE]` flattened, in [0, 1]
    pub fn render(&self, shift: &Shift) -> Vec<f32> {
        self.scenes.iter().zip(&self.seeds).flat_map(|(scene, &seed)| scene.render(seed, shift)).collect()
    }

    /// Captions that mention random attributes, drawn from the seeds of the scenes and from `seed`.
    pub fn captions(&self, seed: u64) -> Vec<String> {
        let caption = |(scene, &own): (&Scene, &u64)| {
            // a random stream of its own: the image must not depend on the caption
            let mut rng = keyed_rng([own, seed, CAPTION, 0]);
            let mention = Mention::draw(&mut rng);
            scene.caption(mention, rng.random())
        };
        self.scenes.iter().zip(&self.seeds).map(caption).collect()
    }

    /// Captions that mention all attributes, always in the same words.
    pub fn titles(&self) -> Vec<String> {
        self.scenes.iter().map(Scene::title).collect()
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn train_and_test_share_no_combination() {
        let (train, test) = (Scenes::train(1, 0), Scenes::test(1, 0));
        assert_eq!(train.len() + test.len(), 1680);
        assert!((280..400).contains(&test.len()), "{} held out", test.len());
        let seen: HashSet<_> = train.scenes.iter().collect();
        assert!(test.scenes.iter().all(|scene| !seen.contains(scene)));
        let titles: HashSet<_> = test.titles().into_iter().collect();
        assert_eq!(titles.len(), test.len(), "captions of the test are not unique");
        // every word of a test caption occurs in the training set
        let words = |titles: Vec<String>| -> HashSet<String> {
            titles.iter().flat_map(|t| t.split(' ').map(String::from).collect::<Vec<_>>()).collect()
        };
        assert!(words(test.titles()).is_subset(&words(train.titles())));
    }

    #[test]
    fn an_image_is_fixed_by_scene_and_seed() {
        let scene = Scene { shape: 6, colour: 0, size: 1, position: 2, texture: 1 };
        assert_eq!(scene.render(3, &Shift::NONE), scene.render(3, &Shift::NONE));
        assert_ne!(scene.render(3, &Shift::NONE), scene.render(4, &Shift::NONE));
        assert_eq!(scene.title(), "a large striped red star at the top right");
        let plain = Scene { texture: 0, ..scene };
        let some = Mention { shape: true, colour: true, ..Mention::NONE };
        assert_eq!(Scene { colour: 5, ..plain }.caption(some, 0), "an orange star");
        assert_eq!(plain.caption(Mention::NONE, 0), "a thing");
        let pixels = scene.render(3, &Shift::NONE);
        assert!(pixels.len() == 3 * SIDE * SIDE && pixels.iter().all(|p| (0.0..=1.0).contains(p)));
    }

    #[test]
    fn a_shift_is_the_same_for_every_pixel() {
        let swap = Shift { mix: [[0.0, 0.0, 1.0], [0.0, 1.0, 0.0], [1.0, 0.0, 0.0]], offset: [0.0; 3] };
        let scene = Scene::all()[17];
        let (plain, swapped) = (scene.render(5, &Shift::NONE), scene.render(5, &swap));
        let plane = SIDE * SIDE;
        assert_eq!(plain[..plane], swapped[2 * plane..]);
        assert_eq!(plain[plane..2 * plane], swapped[plane..2 * plane]);
    }
}
