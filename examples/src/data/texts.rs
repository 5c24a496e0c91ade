//! Texts with classes: captions of scenes, sentences of reviews, or the user's CSV file.

use std::collections::BTreeSet;
use std::io::Read;
use std::path::Path;

use anyhow::{Context, Result, bail, ensure};
use flate2::read::GzDecoder;
use flops_core::random::keyed_rng;
use flops_multimodal::TextItem;
use flops_multimodal::data::{Mention, Scene};
use rand::RngExt;
use rand::seq::SliceRandom;

const REVIEWS: &[u8] = include_bytes!("../../data/sentences.csv.gz");
/// Key of the stream that splits texts.
const SPLIT: u64 = u64::from_le_bytes(*b"splits  ");
/// Key of the stream that words captions.
const CAPTION: u64 = u64::from_le_bytes(*b"wording ");
/// More classes than this are taken for a column of numbers.
const MAX_CLASSES: usize = 1000;

/// Texts with their classes.
#[derive(Clone, Debug, PartialEq)]
pub struct Texts {
    /// The texts.
    pub items: Vec<TextItem>,
    /// Those that are for the test alone; empty where a split is drawn.
    pub held_out: Vec<TextItem>,
    /// Names of the classes.
    pub classes: Vec<String>,
}

impl Texts {
    /// Captions of [scenes](flops_multimodal::data::scenes), and whether their thing is either small or
    /// patterned, but not both. Captions of scenes that the pretraining never saw are for the test;
    /// captions of other scenes that read the same are left out.
    ///
    /// Neither word decides it: the one for the size is right in two of three cases.
    pub fn captions() -> Self {
        let item = |(id, scene): (usize, Scene)| {
            let mut rng = keyed_rng([CAPTION, id as u64, 0, 0]);
            let mention = Mention { size: true, texture: true, ..Mention::draw(&mut rng) };
            let label = usize::from((scene.size == 0) != (scene.texture != 0));
            TextItem { id: id as u64, text: scene.caption(mention, rng.random()), label }
        };
        let scenes: Vec<(usize, Scene)> = Scene::all().into_iter().enumerate().collect();
        let (held_out, items): (Vec<_>, Vec<_>) = scenes.into_iter().partition(|(_, scene)| scene.is_held_out());
        let all = |scenes: Vec<(usize, Scene)>| scenes.into_iter().map(item).collect::<Vec<_>>();
        let (mut items, held_out) = (all(items), all(held_out));
        let tested: BTreeSet<&str> = held_out.iter().map(|item| item.text.as_str()).collect();
        items.retain(|item| !tested.contains(item.text.as_str()));
        let classes = ["both or neither", "small or patterned"].map(String::from).to_vec();
        Self { items, held_out, classes }
    }

    /// Sentences of reviews, negative and positive; `data/README.md` has their source.
    ///
    /// # Errors
    /// If the embedded file is damaged.
    pub fn reviews() -> Result<Self> {
        Self::read(GzDecoder::new(REVIEWS), "the embedded reviews")
    }

    /// The texts of a CSV file whose header names `text` and `label`. Classes are in the order of
    /// their names.
    ///
    /// # Errors
    /// If it cannot be read or lacks a column, or a line has no text or label. There must be two classes,
    /// with two texts each.
    pub fn open(path: &Path) -> Result<Self> {
        let file = std::fs::File::open(path).with_context(|| format!("cannot open {}", path.display()))?;
        Self::read(std::io::BufReader::new(file), &path.display().to_string())
    }

    fn read(bytes: impl Read, name: &str) -> Result<Self> {
        let mut reader = csv::Reader::from_reader(bytes);
        let header = reader.headers().with_context(|| format!("{name} is no CSV file"))?.clone();
        let place = |column: &str| {
            let found = header.iter().position(|name| name.trim() == column);
            let columns = || header.iter().collect::<Vec<_>>().join(", ");
            found.with_context(|| {
                format!("{name} has no column {column}; its header must name text and label: {}", columns())
            })
        };
        let (text, label) = (place("text")?, place("label")?);
        let mut rows = vec![];
        for (index, row) in reader.records().enumerate() {
            let row = row.with_context(|| format!("{name}, text {}", index + 1))?;
            let field = |at: usize, column| {
                let field = row.get(at).unwrap_or_default().trim();
                let line = row.position().map_or(0, csv::Position::line);
                ensure!(
                    !field.is_empty(),
                    "{name}, line {line}: the {column} is empty; fill it in, or leave the line out"
                );
                Ok(field.to_string())
            };
            rows.push((field(text, "text")?, field(label, "label")?));
        }
        let classes: BTreeSet<String> = rows.iter().map(|(_, label)| label.clone()).collect();
        let classes: Vec<String> = classes.into_iter().collect();
        let count = classes.len();
        ensure!((2..=MAX_CLASSES).contains(&count), "{name} has {count} different labels; use 2 to {MAX_CLASSES}");
        let item = |(id, (text, label)): (usize, (String, String))| {
            let label = classes.iter().position(|class| *class == label).unwrap_or_default();
            TextItem { id: id as u64, text, label }
        };
        let items: Vec<TextItem> = rows.into_iter().enumerate().map(item).collect();
        for (label, class) in classes.iter().enumerate() {
            let texts = items.iter().filter(|item| item.label == label).count();
            if texts < 2 {
                bail!("{name} has a single text of the class {class}; one to train on and one to test with are needed");
            }
        }
        Ok(Self { items, held_out: vec![], classes })
    }

    /// Splits into training and test: those held out, or a share of each class, drawn by `seed`, at
    /// least one text of each in both.
    pub fn split(&self, test_share: f64, seed: u64) -> (Vec<TextItem>, Vec<TextItem>) {
        if !self.held_out.is_empty() {
            return (self.items.clone(), self.held_out.clone());
        }
        let mut items = self.items.clone();
        items.shuffle(&mut keyed_rng([seed, SPLIT, 0, 0]));
        let (mut train, mut test) = (vec![], vec![]);
        for class in 0..self.classes.len() {
            let mine: Vec<TextItem> = items.iter().filter(|item| item.label == class).cloned().collect();
            let tested = ((mine.len() as f64 * test_share).round() as usize).clamp(1, mine.len() - 1);
            test.extend_from_slice(&mine[..tested]);
            train.extend_from_slice(&mine[tested..]);
        }
        (train, test)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn counts(items: &[TextItem]) -> [usize; 2] {
        [0, 1].map(|class| items.iter().filter(|item| item.label == class).count())
    }

    #[test]
    fn reviews_are_as_documented_and_split_by_class() {
        let reviews = Texts::reviews().unwrap();
        assert_eq!((reviews.classes.join(" "), counts(&reviews.items)), ("negative positive".into(), [1492, 1490]));
        let (train, test) = reviews.split(0.2, 1);
        assert_eq!((counts(&train), counts(&test)), ([1194, 1192], [298, 298]));
        let mut ids: Vec<u64> = train.iter().chain(&test).map(|item| item.id).collect();
        ids.sort_unstable();
        assert!(ids.into_iter().eq(0..2982));
        assert!(reviews.split(0.2, 1).1 == test && reviews.split(0.2, 2).1 != test);
    }

    /// The label follows from size and texture together, and neither tells it alone.
    #[test]
    fn captions_say_what_their_label_needs() {
        let captions = Texts::captions();
        let (train, test) = captions.split(0.2, 0);
        assert!(train.len() > 1250 && test.len() > 300, "{} and {}", train.len(), test.len());
        assert!(train.iter().all(|item| test.iter().all(|tested| tested.text != item.text)));
        for item in train.iter().chain(&test) {
            let has = |words: &[&str]| words.iter().any(|word| item.text.split(' ').any(|found| found == *word));
            let small = has(&["small", "little", "tiny"]);
            let patterned = has(&["striped", "lined", "dotted", "spotted"]);
            assert_eq!(item.label, usize::from(small != patterned), "{}", item.text);
        }
        let [no, yes] = counts(&train);
        assert!(no.abs_diff(yes) < train.len() / 20, "{no} and {yes}");
        assert_eq!(captions, Texts::captions());
    }

    #[test]
    fn files_at_fault_are_named_with_the_line() {
        let error = |text: &str| format!("{:#}", Texts::read(text.as_bytes(), "a.csv").unwrap_err());
        assert_eq!(
            error("sentence,label\nx,1\n"),
            "a.csv has no column text; its header must name text and label: sentence, label"
        );
        assert!(error("text,class\nx,1\n").contains("no column label"));
        assert_eq!(
            error("text,label\nx,1\ny,\n"),
            "a.csv, line 3: the label is empty; fill it in, or leave the line out"
        );
        assert!(error("text,label\n ,1\n").contains("line 2: the text is empty"));
        assert!(error("text,label\nx,1\ny,1\n").contains("1 different labels"));
        assert!(error("text,label\nx,1\ny,1\nz,2\n").contains("single text of the class 2"));
        assert!(error("text,label\nx,1\ny\n").contains("text 2"));
        assert!(error("").contains("no column text"));
        let quoted = Texts::read("label,text\nb,\"x, y\"\na,z\nb,u\na,v\n".as_bytes(), "a.csv").unwrap();
        assert_eq!(
            (quoted.items[0].text.as_str(), quoted.items[0].label, quoted.classes.join("")),
            ("x, y", 1, "ab".into())
        );
        let missing = Texts::open(Path::new("no/such.csv")).unwrap_err();
        assert!(format!("{missing:#}").contains("cannot open no/such.csv"));
    }
}
