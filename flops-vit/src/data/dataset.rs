//! Labelled images in memory.

use super::error::{DataError, some};
use burn::data::dataloader::Dataset;
use flops_core::random::keyed_rng;
use flops_core::train::Augmentation;
use image::imageops::{self, FilterType};
use image::{ImageBuffer, Luma};
use rand::seq::SliceRandom;
use std::collections::{BTreeMap, HashSet};
use std::path::PathBuf;

/// Stream of the split's random numbers, apart from other uses of the same seed.
const SPLIT: u64 = u64::from_le_bytes(*b"split\0\0\0");
/// Stream of the few-shot choice.
const SHOTS: u64 = u64::from_le_bytes(*b"shots\0\0\0");

/// An 8-bit RGB image and its label.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ImageItem {
    /// Id, unique among the training and test images of a data set.
    pub id: u64,
    /// The red plane, then green, then blue, each in rows from the top: `[3, height, width]`.
    pub pixels: Vec<u8>,
    /// Rows.
    pub height: usize,
    /// Columns.
    pub width: usize,
    /// Index into [`ImageDataset::classes`].
    pub label: usize,
}

impl ImageItem {
    /// Resizes the image: bilinear, and averaged over the covered pixels where it shrinks.
    #[must_use]
    pub fn resized(self, height: usize, width: usize) -> Self {
        if (self.height, self.width) == (height, width) {
            return self;
        }
        let plane = self.height * self.width;
        let mut pixels = Vec::with_capacity(3 * height * width);
        for channel in self.pixels.chunks_exact(plane) {
            let channel = ImageBuffer::<Luma<u8>, &[u8]>::from_raw(self.width as u32, self.height as u32, channel)
                .expect("a chunk is one plane");
            let resized = imageops::resize(&channel, width as u32, height as u32, FilterType::Triangle);
            pixels.extend_from_slice(resized.as_raw());
        }
        Self { pixels, height, width, ..self }
    }
}

/// Labelled images in memory.
#[derive(Clone, Debug)]
pub struct ImageDataset {
    /// The images.
    pub items: Vec<ImageItem>,
    /// The name of each label.
    pub classes: Vec<String>,
}

/// Distance between the ids of an image and its first copy: copy 2 of image 7 is 2000000000007.
const COPY: u64 = 1_000_000_000_000;

impl ImageDataset {
    /// Keeps at most `limit` images, evenly spread; without a limit, all.
    #[must_use]
    pub fn limited(mut self, limit: Option<usize>) -> Self {
        let all = self.items.len();
        if let Some(limit) = limit.filter(|&limit| limit < all) {
            self.items = (0..limit).map(|i| self.items[i * all / limit].clone()).collect();
        }
        self
    }

    /// Keeps `shots` images of every class, drawn with `seed`.
    ///
    /// Images keep their order and ids. With the same seed, a smaller choice is part of a larger
    /// one.
    ///
    /// # Errors
    /// [`DataError::ZeroShots`], or [`DataError::TooFewShots`] where a class has fewer images.
    pub fn shots(mut self, shots: usize, seed: u64) -> Result<Self, DataError> {
        if shots == 0 {
            return Err(DataError::ZeroShots);
        }
        let labels: Vec<usize> = self.items.iter().map(|item| item.label).collect();
        let mut chosen = vec![false; labels.len()];
        for (label, class) in self.classes.iter().enumerate() {
            let members = shuffled_class(&labels, label, seed, SHOTS);
            if members.len() < shots {
                return Err(DataError::TooFewShots { class: class.clone(), found: members.len(), shots });
            }
            for &index in &members[..shots] {
                chosen[index] = true;
            }
        }
        let mut chosen = chosen.into_iter();
        self.items.retain(|_| chosen.next().unwrap_or(false));
        Ok(self)
    }

    /// Appends `copies` augmented copies of each image, those of epochs 1 to `copies`.
    ///
    /// Unlike images that are augmented anew in every epoch, copies stay the same, so the output of
    /// a frozen prefix can be cached. Each copy has its own id.
    #[must_use]
    pub fn with_copies(mut self, copies: usize, augmentation: &impl Augmentation<ImageItem>) -> Self {
        let originals = self.items.clone();
        self.items.reserve_exact(copies * originals.len());
        for copy in 1..=copies as u64 {
            self.items.extend(originals.iter().map(|item| {
                let id = item.id + copy * COPY;
                ImageItem { id, ..augmentation.augment(item.clone(), copy) }
            }));
        }
        self
    }
}

impl Dataset<ImageItem> for ImageDataset {
    fn get(&self, index: usize) -> Option<ImageItem> {
        self.items.get(index).cloned()
    }

    fn len(&self) -> usize {
        self.items.len()
    }
}

/// Indices of a class's images, shuffled by (`seed`, `label`, `stream`).
fn shuffled_class(labels: &[usize], label: usize, seed: u64, stream: u64) -> Vec<usize> {
    let mut members: Vec<usize> = (0..labels.len()).filter(|&i| labels[i] == label).collect();
    members.shuffle(&mut keyed_rng([seed, label as u64, 0, stream]));
    members
}

/// Chooses test images: a random `test_percent` of each class, fixed by the labels and `seed`.
///
/// A class of two or more images is in both parts.
pub(super) fn stratify(labels: &[usize], classes: usize, test_percent: usize, seed: u64) -> Vec<bool> {
    let mut is_test = vec![false; labels.len()];
    for label in 0..classes {
        let members = shuffled_class(labels, label, seed, SPLIT);
        let most = members.len().saturating_sub(1);
        let count = ((members.len() * test_percent + 50) / 100).clamp(most.min(1), most);
        for &index in &members[..count] {
            is_test[index] = true;
        }
    }
    is_test
}

/// A file or folder that is not among the images.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Skipped {
    /// The file or folder.
    pub path: PathBuf,
    /// Why it is left out.
    pub reason: String,
}

impl Skipped {
    pub(super) fn new(path: impl Into<PathBuf>, reason: impl ToString) -> Self {
        Self { path: path.into(), reason: reason.to_string() }
    }
}

/// The training and test images of a data set; no id occurs in both.
#[derive(Clone, Debug)]
pub struct DataSplit {
    /// Training images.
    pub train: ImageDataset,
    /// Test images.
    pub test: ImageDataset,
    /// Missing files of the official data set; without them there are fewer training images.
    pub missing: Vec<String>,
    /// Images that could not be decoded, in the order of the data set.
    pub skipped: Vec<Skipped>,
    /// Files and folders that are no images of a class, by their names and places.
    pub left_out: Vec<Skipped>,
    /// Whether the test images were split off, since the data set has none of its own.
    pub split_off: bool,
}

impl DataSplit {
    /// Splits off a random `test_percent` of each class as test images, fixed by the items and
    /// `seed`.
    ///
    /// A class of two or more images is in both parts.
    #[must_use]
    pub fn stratified(items: Vec<ImageItem>, classes: Vec<String>, test_percent: usize, seed: u64) -> Self {
        let labels: Vec<usize> = items.iter().map(|item| item.label).collect();
        let is_test = stratify(&labels, classes.len(), test_percent, seed);
        Self::new(items.into_iter().zip(is_test), classes)
    }

    /// Splits images by whether each is a test image.
    pub(super) fn new(items: impl IntoIterator<Item = (ImageItem, bool)>, classes: Vec<String>) -> Self {
        let (mut train, mut test) = (vec![], vec![]);
        for (item, is_test) in items {
            if is_test { test.push(item) } else { train.push(item) }
        }
        Self {
            train: ImageDataset { items: train, classes: classes.clone() },
            test: ImageDataset { items: test, classes },
            missing: vec![],
            skipped: vec![],
            left_out: vec![],
            split_off: false,
        }
    }

    /// Returns training and test images together, in the order of their ids.
    #[must_use]
    pub fn whole(self) -> ImageDataset {
        let mut whole = self.train;
        whole.items.extend(self.test.items);
        whole.items.sort_by_key(|item| item.id);
        whole
    }

    /// Remarks for the user about what is missing or left out, a line each.
    pub fn remarks(&self) -> Vec<String> {
        let mut remarks = vec![];
        if !self.missing.is_empty() {
            remarks.push(format!("without {}: training goes on with fewer images", self.missing.join(", ")));
        }
        if let Some(first) = self.skipped.first() {
            remarks.push(format!(
                "skipped images that cannot be decoded, {} in all: {} (the first: {})",
                self.skipped.len(),
                some(self.skipped.iter().map(|file| file.path.display())),
                first.reason
            ));
        }
        let mut left_out: BTreeMap<&str, Vec<&Skipped>> = BTreeMap::new();
        self.left_out.iter().for_each(|file| left_out.entry(&file.reason).or_default().push(file));
        for (reason, files) in left_out {
            let named = some(files.iter().map(|file| file.path.display()));
            remarks.push(format!("left unread, {reason}, {} in all: {named}", files.len()));
        }
        if self.split_off {
            remarks.push("there is no folder of test images: a fifth of each class are test images".into());
        }
        remarks.extend(self.untested());
        remarks
    }

    /// Names the classes without test images, where others have some.
    fn untested(&self) -> Option<String> {
        let tested: HashSet<usize> = self.test.items.iter().map(|item| item.label).collect();
        let classes = self.test.classes.iter().enumerate().filter(|_| !tested.is_empty());
        let untested: Vec<&String> = classes.filter(|(label, _)| !tested.contains(label)).map(|c| c.1).collect();
        (!untested.is_empty())
            .then(|| format!("classes without test images, {} in all: {}", untested.len(), some(untested.iter())))
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn items(labels: impl Iterator<Item = usize>) -> Vec<ImageItem> {
        let image = |(id, label)| ImageItem { id: id as u64, pixels: vec![0; 3], height: 1, width: 1, label };
        labels.enumerate().map(image).collect()
    }

    #[test]
    fn limit_keeps_evenly_spread_images() {
        let data = || ImageDataset { items: items([0; 10].into_iter()), classes: vec!["a".into()] };
        let ids = |limit| data().limited(limit).items.iter().map(|item| item.id).collect::<Vec<_>>();
        assert_eq!(ids(Some(4)), [0, 2, 5, 7]);
        assert_eq!((ids(None).len(), ids(Some(99)).len()), (10, 10));
    }

    #[test]
    fn shots_are_balanced_and_nested() {
        // ids 0 to 39; every fourth image is of class b
        let data = || ImageDataset {
            items: items((0..40).map(|i| usize::from(i % 4 == 0))),
            classes: vec!["a".into(), "b".into()],
        };
        let ids = |shots, seed| data().shots(shots, seed).unwrap().items.iter().map(|i| i.id).collect::<Vec<_>>();
        let few = data().shots(3, 5).unwrap();
        assert_eq!([0, 1].map(|label| few.items.iter().filter(|item| item.label == label).count()), [3, 3]);
        assert!(few.items.iter().all(|item| data().items.contains(item)), "an image has lost its id");
        assert!(few.items.is_sorted_by_key(|item| item.id));
        assert_eq!(few.classes, ["a", "b"]);
        assert_eq!(ids(3, 5), ids(3, 5));
        assert_ne!(ids(3, 5), ids(3, 6));
        assert!(ids(3, 5).iter().all(|id| ids(7, 5).contains(id)), "fewer shots are not among more");
    }

    #[test]
    fn errors_name_the_class_with_too_few_images() {
        let data = ImageDataset { items: items([0, 0, 1].into_iter()), classes: vec!["cat".into(), "dog".into()] };
        assert_eq!(data.clone().shots(1, 0).unwrap().items.len(), 2);
        let message = data.clone().shots(2, 0).unwrap_err().to_string();
        assert!(message.contains("class dog has 1 training images, 2 of every class"), "{message}");
        assert!(matches!(data.shots(0, 0), Err(DataError::ZeroShots)));
    }

    #[test]
    fn remarks_name_at_most_five_files() {
        let split = |missing: &[&str], skipped: usize| DataSplit {
            missing: missing.iter().map(|name| name.to_string()).collect(),
            skipped: (1..=skipped).map(|i| Skipped::new(format!("{i}.png"), format!("reason {i}"))).collect(),
            ..DataSplit::stratified(vec![], vec![], 20, 0)
        };
        assert_eq!(split(&[], 0).remarks(), Vec::<String>::new());
        assert_eq!(split(&["a", "b"], 0).remarks(), ["without a, b: training goes on with fewer images"]);
        let skipped =
            "skipped images that cannot be decoded, 5 in all: 1.png, 2.png, 3.png, 4.png, 5.png (the first: reason 1)";
        assert_eq!(split(&[], 5).remarks(), [skipped]);
        assert!(split(&["a"], 9).remarks()[1].contains(", 9 in all: 1.png, 2.png, 3.png, 4.png, 5.png and 4 more ("));
    }

    #[test]
    fn remarks_count_what_is_left_out_by_its_reason() {
        let left_out = [("a.txt", "no image"), ("b", "no part"), ("c.txt", "no image")];
        let left_out = left_out.map(|(path, reason)| Skipped::new(path, reason)).to_vec();
        let empty = DataSplit::stratified(vec![], vec![], 20, 0);
        let split = DataSplit { left_out, split_off: true, ..empty };
        assert_eq!(
            split.remarks(),
            [
                "left unread, no image, 2 in all: a.txt, c.txt",
                "left unread, no part, 1 in all: b",
                "there is no folder of test images: a fifth of each class are test images"
            ]
        );
    }

    #[test]
    fn remarks_name_classes_without_test_images() {
        let classes = vec!["a".to_string(), "b".into()];
        let split = DataSplit::stratified(items([0, 0, 0, 0, 0, 1].into_iter()), classes, 20, 0);
        assert_eq!(split.remarks(), ["classes without test images, 1 in all: b"]);
    }

    #[test]
    fn copies_are_augmented_and_have_unique_ids() {
        struct Brighter;
        impl Augmentation<ImageItem> for Brighter {
            fn augment(&self, item: ImageItem, epoch: u64) -> ImageItem {
                ImageItem { pixels: item.pixels.iter().map(|p| p + 10 * epoch as u8).collect(), ..item }
            }
        }
        let data = ImageDataset { items: items([1, 0].into_iter()), classes: vec!["a".into(), "b".into()] };
        let seen: Vec<_> = data.with_copies(2, &Brighter).items.iter().map(|i| (i.id, i.pixels[0], i.label)).collect();
        let expected =
            [(0, 0, 1), (1, 0, 0), (COPY, 10, 1), (COPY + 1, 10, 0), (2 * COPY, 20, 1), (2 * COPY + 1, 20, 0)];
        assert_eq!(seen, expected);
    }

    #[test]
    fn split_is_stratified_and_reproducible() {
        let classes = vec!["a".to_string(), "b".into(), "c".into()];
        let labels = || (0..100).map(|i| usize::from(i >= 60)).chain([2]);
        let split = DataSplit::stratified(items(labels()), classes.clone(), 20, 1);
        let count = |data: &ImageDataset, label| data.items.iter().filter(|item| item.label == label).count();
        assert_eq!([0, 1, 2].map(|label| count(&split.train, label)), [48, 32, 1]);
        assert_eq!([0, 1, 2].map(|label| count(&split.test, label)), [12, 8, 0]);
        let again = DataSplit::stratified(items(labels()), classes.clone(), 20, 1);
        assert_eq!(split.test.items, again.test.items);
        let other = DataSplit::stratified(items(labels()), classes, 20, 2);
        assert_ne!(split.test.items, other.test.items);
        assert_eq!(split.whole().items, items(labels()));
    }

    #[test]
    fn resizing_keeps_channels_apart() {
        let pixels = [[10u8; 4], [20; 4], [30; 4]].concat();
        let item = ImageItem { id: 0, pixels, height: 2, width: 2, label: 0 }.resized(3, 5);
        assert_eq!((item.height, item.width), (3, 5));
        assert_eq!(item.pixels, [[10u8; 15], [20; 15], [30; 15]].concat());
    }

    #[test]
    fn resizing_matches_torch_bilinear() {
        // torch.nn.functional.interpolate(torch.tensor([[[0., 100.]]]), size=4, mode="linear"): 0,
        // 25, 75, 100
        let item = ImageItem { id: 0, pixels: [[0, 100]; 3].concat(), height: 1, width: 2, label: 0 }.resized(1, 4);
        assert_eq!(item.pixels[..4], [0, 25, 75, 100]);
    }
}
