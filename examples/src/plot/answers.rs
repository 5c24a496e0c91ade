//! Images before and after a prompt, with what a black box took each for.

use flops_multimodal::data::scenes::SIDE;

use super::contact_sheet::Picture;
use crate::data::shots::Shot;

/// Pairs of the first images, as the camera gives them and repainted, each with its answer. `before` and
/// `after` are the classes that were answered for the images; after a run that ended early nobody asked.
pub fn answers(
    shots: &[Shot],
    names: &[&str],
    before: &[usize],
    after: Option<&[usize]>,
    painted: &[Vec<f32>],
) -> Vec<Picture> {
    let picture = |pixels: &[f32], name: &str, answer: Option<usize>, right: usize| Picture {
        pixels: pixels.iter().map(|p| (255.0 * p).round() as u8).collect(),
        height: SIDE,
        width: SIDE,
        lines: [name.to_string(), answer.map_or("not asked".into(), |answer| said(names, answer, right))],
        share: 0.0,
    };
    let pairs = shots.iter().zip(painted).enumerate().map(|(i, (shot, painted))| {
        let answered = |answers: Option<&[usize]>| answers.and_then(|answers| answers.get(i).copied());
        [
            picture(&shot.pixels, "camera", answered(Some(before)), shot.label),
            picture(painted, "repainted", answered(after), shot.label),
        ]
    });
    pairs.flatten().collect()
}

/// An answer, and where it is wrong the right one.
fn said(names: &[&str], answer: usize, right: usize) -> String {
    let name = |class: usize| names.get(class).copied().unwrap_or("?");
    if answer == right { format!("{}: right", name(answer)) } else { format!("{}, not {}", name(answer), name(right)) }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn pictures_have_their_answers() {
        let shot = |id, label| Shot { id, pixels: vec![0.5; 3 * SIDE * SIDE], label };
        let (shots, painted) = ([shot(0, 0), shot(1, 1)], vec![vec![0.0; 3 * SIDE * SIDE]; 2]);
        let lines = |after: Option<&[usize]>| {
            let pictures = answers(&shots, &["red", "blue"], &[1, 1], after, &painted);
            pictures.into_iter().map(|picture| picture.lines[1].clone()).collect::<Vec<_>>()
        };
        assert_eq!(lines(Some(&[0, 0])), ["blue, not red", "red: right", "blue: right", "red, not blue"]);
        assert_eq!(lines(None), ["blue, not red", "not asked", "blue: right", "not asked"]);
    }
}
