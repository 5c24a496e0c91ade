//! CIFAR-10 and CIFAR-100 (A. Krizhevsky, 2009).
//!
//! They are read from the official binary files or from the class folders of Burn's data set cache.
//! `data/pickle_to_binary.py` of this crate converts the Python form to binary files.

use super::dataset::{DataSplit, ImageDataset, ImageItem};
use super::error::DataError;
use super::folder;
use super::options::LoadOptions;
#[cfg(feature = "download")]
use burn_dataset::vision::{CifarDataset, CifarType};
use std::path::{Path, PathBuf};

/// Side of the square images.
const SIDE: usize = 32;
/// Bytes of the red, green and blue planes.
const PIXELS: usize = 3 * SIDE * SIDE;
const TRAIN_IMAGES: usize = 50_000;
const TEST_IMAGES: usize = 10_000;
/// Extension of the binary files; the pickles have none.
const BINARY: &str = ".bin";

/// Layout of one of the two data sets.
#[derive(Debug)]
pub struct Cifar {
    name: &'static str,
    train_files: &'static [&'static str],
    test_file: &'static str,
    /// Bytes before the pixels; the last one is the label.
    label_bytes: usize,
    classes: &'static [&'static str],
    class_file: &'static str,
    /// The folder inside the official archive.
    archive_folder: &'static str,
    /// The folder inside the archive of the Python form.
    python_folder: &'static str,
    /// The folder in the cache of `burn_dataset`.
    cache_folder: &'static str,
    #[cfg(feature = "download")]
    source: CifarType,
}

/// CIFAR-10: 10 classes in five training files and a test file.
///
/// A record is a label and the pixels.
pub static CIFAR10: Cifar = Cifar {
    name: "CIFAR-10",
    train_files: &["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"],
    test_file: "test_batch.bin",
    label_bytes: 1,
    classes: &["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"],
    class_file: "batches.meta.txt",
    archive_folder: "cifar-10-batches-bin",
    python_folder: "cifar-10-batches-py",
    cache_folder: "cifar10",
    #[cfg(feature = "download")]
    source: CifarType::Cifar10,
};

/// CIFAR-100: 100 classes in a training file and a test file.
///
/// A record is the label of one of 20 superclasses (not used), the label of the class, and the
/// pixels.
pub static CIFAR100: Cifar = Cifar {
    name: "CIFAR-100",
    train_files: &["train.bin"],
    test_file: "test.bin",
    label_bytes: 2,
    classes: &CLASSES_100,
    class_file: "fine_label_names.txt",
    archive_folder: "cifar-100-binary",
    python_folder: "cifar-100-python",
    cache_folder: "cifar100",
    #[cfg(feature = "download")]
    source: CifarType::Cifar100,
};

/// Class names in the order of the labels, as in `fine_label_names.txt`.
#[rustfmt::skip]
const CLASSES_100: [&str; 100] = [
    "apple", "aquarium_fish", "baby", "bear", "beaver", "bed", "bee", "beetle", "bicycle", "bottle", "bowl",
    "boy", "bridge", "bus", "butterfly", "camel", "can", "castle", "caterpillar", "cattle", "chair",
    "chimpanzee", "clock", "cloud", "cockroach", "couch", "crab", "crocodile", "cup", "dinosaur", "dolphin",
    "elephant", "flatfish", "forest", "fox", "girl", "hamster", "house", "kangaroo", "keyboard", "lamp",
    "lawn_mower", "leopard", "lion", "lizard", "lobster", "man", "maple_tree", "motorcycle", "mountain",
    "mouse", "mushroom", "oak_tree", "orange", "orchid", "otter", "palm_tree", "pear", "pickup_truck",
    "pine_tree", "plain", "plate", "poppy", "porcupine", "possum", "rabbit", "raccoon", "ray", "road",
    "rocket", "rose", "sea", "seal", "shark", "shrew", "skunk", "skyscraper", "snail", "snake", "spider",
    "squirrel", "streetcar", "sunflower", "sweet_pepper", "table", "tank", "telephone", "television", "tiger",
    "tractor", "train", "trout", "tulip", "turtle", "wardrobe", "whale", "willow_tree", "wolf", "woman",
    "worm",
];

impl Cifar {
    /// Loads from the data folder or, without one, from Burn's data set cache.
    ///
    /// With [`LoadOptions::download`] missing files are fetched into the cache.
    pub(super) fn load(&self, options: &LoadOptions) -> Result<DataSplit, DataError> {
        let found = match &options.data_dir {
            Some(dir) => self.load_dir(dir),
            None => match self.cache_dir() {
                Some(dir) => self.load_cache(&dir, options),
                None => Err(self.missing(Path::new("the user's cache folder"), "files")),
            },
        };
        match found {
            Err(DataError::MissingCifar { .. }) if options.download => self.load_cache(&self.fetch()?, options),
            found => found,
        }
    }

    /// Loads the binary files in `dir` or in the folder of the official archive inside it.
    ///
    /// The test file and at least one training file are needed; [`DataSplit::missing`] names the
    /// others.
    ///
    /// # Errors
    /// A file that is missing or truncated, with its path and the remedy.
    pub fn load_dir(&self, dir: &Path) -> Result<DataSplit, DataError> {
        let archive = dir.join(self.archive_folder);
        let dir = if archive.is_dir() { archive.as_path() } else { dir };
        let per_file = TRAIN_IMAGES / self.train_files.len();
        let (mut items, mut missing) = (vec![], vec![]);
        for (file, name) in self.train_files.iter().enumerate() {
            let path = dir.join(name);
            if path.is_file() {
                self.read_records(&path, file * per_file, per_file, &mut items)?;
            } else {
                missing.push(name.to_string());
            }
        }
        if items.is_empty() {
            return Err(self.not_binary(dir, "training file", self.train_files));
        }
        let path = dir.join(self.test_file);
        if !path.is_file() {
            return Err(self.not_binary(dir, "test file", &[self.test_file]));
        }
        let mut test = vec![];
        self.read_records(&path, TRAIN_IMAGES, TEST_IMAGES, &mut test)?;
        let classes = self.read_classes(&dir.join(self.class_file))?;
        Ok(DataSplit {
            train: ImageDataset { items, classes: classes.clone() },
            test: ImageDataset { items: test, classes },
            missing,
            ..DataSplit::new([], vec![])
        })
    }

    fn missing(&self, dir: &Path, wanted: &'static str) -> DataError {
        DataError::MissingCifar {
            data_set: self.name,
            path: dir.to_path_buf(),
            wanted,
            files: [self.train_files, &[self.test_file]].concat().join(", "),
        }
    }

    /// The error where none of `files` is in `dir`; it differs where their pickles are.
    fn not_binary(&self, dir: &Path, wanted: &'static str, files: &[&str]) -> DataError {
        let pickle = |dir: &Path| files.iter().any(|file| dir.join(file.trim_end_matches(BINARY)).is_file());
        match [dir.join(self.python_folder), dir.to_path_buf()].into_iter().find(|dir| pickle(dir)) {
            Some(path) => DataError::PythonCifar { data_set: self.name, path },
            None => self.missing(dir, wanted),
        }
    }

    /// Appends the images of a file, at most `most`, with ids from `first_id` on.
    fn read_records(
        &self,
        path: &Path,
        first_id: usize,
        most: usize,
        items: &mut Vec<ImageItem>,
    ) -> Result<(), DataError> {
        let record_size = self.label_bytes + PIXELS;
        let failed = |source| DataError::io(path, source);
        let length = std::fs::metadata(path).map_err(failed)?.len();
        let longest = (most * record_size) as u64;
        if length > longest {
            let why = format!("{length} bytes, expected at most {longest}: {most} records");
            return Err(DataError::malformed(path, why));
        }
        let bytes = std::fs::read(path).map_err(failed)?;
        if bytes.is_empty() || bytes.len() % record_size != 0 {
            let expected = bytes.len().div_ceil(record_size).max(1) * record_size;
            return Err(DataError::Truncated { path: path.to_path_buf(), found: bytes.len(), expected, record_size });
        }
        for (record, bytes) in bytes.chunks_exact(record_size).enumerate() {
            let (labels, pixels) = bytes.split_at(self.label_bytes);
            let (label, classes) = (usize::from(labels[self.label_bytes - 1]), self.classes.len());
            if label >= classes {
                let (data_set, path) = (self.name, path.to_path_buf());
                return Err(DataError::Label { data_set, path, record, label, classes });
            }
            let id = (first_id + record) as u64;
            items.push(ImageItem { id, pixels: pixels.to_vec(), height: SIDE, width: SIDE, label });
        }
        Ok(())
    }

    /// Reads the class names in `path`; without the file they are the built-in ones.
    fn read_classes(&self, path: &Path) -> Result<Vec<String>, DataError> {
        if !path.is_file() {
            return Ok(self.classes.iter().map(|class| class.to_string()).collect());
        }
        let text = std::fs::read_to_string(path).map_err(|source| DataError::io(path, source))?;
        let lines = text.lines().map(str::trim).filter(|line| !line.is_empty());
        let (classes, expected): (Vec<String>, _) = (lines.map(String::from).collect(), self.classes.len());
        if classes.len() != expected {
            let found = classes.len();
            let reason = format!("{found} class names, expected {expected}: remove the file or fetch it again");
            return Err(DataError::malformed(path, reason));
        }
        Ok(classes)
    }

    /// The folder in which `burn_dataset::vision::CifarDataset` keeps the images.
    fn cache_dir(&self) -> Option<PathBuf> {
        Some(dirs::cache_dir()?.join("burn-dataset").join(self.cache_folder))
    }

    /// Loads the class folders of PNGs that `burn_dataset` unpacks; missing images are an error.
    fn load_cache(&self, dir: &Path, options: &LoadOptions) -> Result<DataSplit, DataError> {
        if !dir.is_dir() {
            return Err(self.missing(dir, "images"));
        }
        let options = LoadOptions { img_size: SIDE, ..options.clone() };
        let split = folder::load_grouped(dir, &options)?;
        let (skipped_train, skipped_test): (Vec<_>, Vec<_>) =
            split.skipped.iter().partition(|skipped| skipped.path.starts_with(dir.join("train")));
        let train = split.train.items.len() + skipped_train.len();
        let test = split.test.items.len() + skipped_test.len();
        if (train, test) != (TRAIN_IMAGES, TEST_IMAGES) {
            let reason = format!(
                "{train} training and {test} test images, expected {TRAIN_IMAGES} and {TEST_IMAGES}: \
                 remove the folder and use --download"
            );
            return Err(DataError::malformed(dir, reason));
        }
        Ok(split)
    }

    /// Downloads with `burn_dataset`, which panics without a network.
    #[cfg(feature = "download")]
    fn fetch(&self) -> Result<PathBuf, DataError> {
        let failed = |reason| DataError::Download { data_set: self.name, reason };
        std::panic::catch_unwind(|| CifarDataset::new(self.source)).map_err(|panic| {
            failed(match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
                (Some(reason), _) => reason.clone(),
                (None, Some(reason)) => reason.to_string(),
                (None, None) => "the downloader stopped".to_string(),
            })
        })?;
        self.cache_dir().ok_or_else(|| failed("there is no cache folder for this user".into()))
    }

    #[cfg(not(feature = "download"))]
    fn fetch(&self) -> Result<PathBuf, DataError> {
        Err(DataError::DownloadDisabled { data_set: self.name })
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A record whose red, green and blue planes start at 1, 2 and 3.
    fn record(labels: &[u8]) -> Vec<u8> {
        let mut pixels = vec![0; PIXELS];
        for channel in 0..3 {
            pixels[channel * SIDE * SIDE] = channel as u8 + 1;
        }
        [labels, &pixels].concat()
    }

    fn write(dir: &Path, name: &str, labels: &[u8]) {
        fs::write(dir.join(name), labels.iter().flat_map(|&label| record(&[label])).collect::<Vec<_>>()).unwrap();
    }

    /// Writes a file of CIFAR-100 with labels (superclass, class).
    fn write_100(dir: &Path, name: &str, labels: &[[u8; 2]]) {
        fs::write(dir.join(name), labels.iter().flat_map(|labels| record(labels)).collect::<Vec<_>>()).unwrap();
    }

    fn load_dir(dir: &Path) -> Result<DataSplit, DataError> {
        CIFAR10.load_dir(dir)
    }

    fn options(dir: &Path) -> LoadOptions {
        LoadOptions::new(SIDE).with_data_dir(Some(dir.to_path_buf()))
    }

    #[test]
    fn partial_data_sets_load_and_list_missing_files() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "data_batch_2.bin", &[3, 9]);
        write(dir.path(), "test_batch.bin", &[0]);
        let split = load_dir(dir.path()).unwrap();
        assert_eq!(split.missing, ["data_batch_1.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"]);
        assert_eq!(split.train.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(10_000, 3), (10_001, 9)]);
        assert_eq!(split.test.items[0].id, 50_000);
        assert_eq!([0, 1, 2].map(|c| split.test.items[0].pixels[c * 1024]), [1, 2, 3]);
        assert_eq!(split.train.classes[9], "truck");
    }

    #[test]
    fn cifar_100_uses_fine_labels() {
        let dir = tempfile::tempdir().unwrap();
        write_100(dir.path(), "train.bin", &[[19, 3], [0, 99]]);
        write_100(dir.path(), "test.bin", &[[4, 0]]);
        let split = CIFAR100.load(&options(dir.path())).unwrap();
        assert_eq!(split.train.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(0, 3), (1, 99)]);
        assert_eq!(split.test.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(50_000, 0)]);
        assert_eq!([0, 1, 2].map(|c| split.train.items[1].pixels[c * 1024]), [1, 2, 3]);
        assert_eq!(split.missing, Vec::<String>::new());
        // fine_label_names.txt of the archive: lines 1, 4, 53, 79 and 100
        assert_eq!([0, 3, 52, 78, 99].map(|i| &*split.test.classes[i]), ["apple", "bear", "oak_tree", "snake", "worm"]);
        write_100(dir.path(), "train.bin", &[[0, 100]]);
        let message = CIFAR100.load_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("label 100, expected 0 to 99: this is no CIFAR-100 file"), "{message}");
        write(dir.path(), "train.bin", &[1]);
        let error = CIFAR100.load_dir(dir.path()).unwrap_err();
        assert!(matches!(error, DataError::Truncated { found: 3073, expected: 3074, .. }), "{error}");
    }

    #[test]
    fn cifar_100_class_names_are_read() {
        let dir = tempfile::tempdir().unwrap();
        write_100(dir.path(), "train.bin", &[[0, 0]]);
        write_100(dir.path(), "test.bin", &[[0, 0]]);
        let names: Vec<String> = (0..100).map(|i| format!("class {i}")).collect();
        fs::write(dir.path().join("fine_label_names.txt"), names.join("\n") + "\n\n").unwrap();
        assert_eq!(CIFAR100.load_dir(dir.path()).unwrap().train.classes, names);
        fs::write(dir.path().join("fine_label_names.txt"), "apple").unwrap();
        let message = CIFAR100.load_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("1 class names, expected 100"), "{message}");
    }

    #[test]
    fn built_in_classes_are_alphabetical() {
        for cifar in [&CIFAR10, &CIFAR100] {
            assert!(cifar.classes.is_sorted_by(|a, b| a < b), "{}", cifar.name);
        }
        assert_eq!((CIFAR10.classes.len(), CIFAR100.classes.len()), (10, 100));
    }

    #[test]
    fn errors_name_the_command_that_converts_pickles() {
        for (cifar, train, test) in [(&CIFAR10, "data_batch_2", "test_batch"), (&CIFAR100, "train", "test")] {
            for inner in ["", cifar.python_folder] {
                let dir = tempfile::tempdir().unwrap();
                let pickles = if inner.is_empty() { dir.path().to_path_buf() } else { dir.path().join(inner) };
                fs::create_dir_all(&pickles).unwrap();
                let check = |name: &str| {
                    fs::write(pickles.join(name), "pickle").unwrap();
                    // existing pickles are reported instead of downloading
                    let error = cifar.load(&options(dir.path()).with_download(true)).unwrap_err();
                    assert!(matches!(&error, DataError::PythonCifar { path, .. } if *path == pickles), "{error}");
                    let message = error.to_string();
                    let command = format!("python3 flops-vit/data/pickle_to_binary.py {}", pickles.display());
                    assert!(message.contains(&command) && message.contains(cifar.name), "{message}");
                };
                check(train);
                fs::remove_file(pickles.join(train)).unwrap();
                let binary = [vec![0; cifar.label_bytes], vec![0; PIXELS]].concat();
                fs::write(dir.path().join(cifar.train_files[0]), binary).unwrap();
                check(test);
            }
        }
    }

    #[test]
    fn archive_folder_is_searched() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join(CIFAR10.archive_folder);
        fs::create_dir(&inner).unwrap();
        write(&inner, "data_batch_1.bin", &[1]);
        write(&inner, "test_batch.bin", &[2]);
        assert_eq!(load_dir(dir.path()).unwrap().train.items.len(), 1);
    }

    #[test]
    fn errors_name_missing_files_and_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let message = CIFAR10.load(&options(dir.path())).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()) && message.contains("--download"), "{message}");
        assert!(message.contains("--data-dir") && message.contains("no CIFAR-10 training file"), "{message}");
        let message = CIFAR100.load(&options(dir.path())).unwrap_err().to_string();
        assert!(
            message.contains("no CIFAR-100 training file") && message.contains("(train.bin, test.bin)"),
            "{message}"
        );
        write(dir.path(), "data_batch_1.bin", &[1]);
        let message = load_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("test_batch.bin"), "{message}");
    }

    #[cfg(not(feature = "download"))]
    #[test]
    fn download_needs_the_feature() {
        let dir = tempfile::tempdir().unwrap();
        for cifar in [&CIFAR10, &CIFAR100] {
            let error = cifar.load(&options(dir.path()).with_download(true)).unwrap_err();
            assert!(matches!(error, DataError::DownloadDisabled { .. }) && error.to_string().contains(cifar.name));
        }
    }

    #[test]
    fn truncated_and_empty_files_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data_batch_1.bin");
        fs::write(&path, &record(&[1])[..3000]).unwrap();
        let error = load_dir(dir.path()).unwrap_err();
        assert!(matches!(error, DataError::Truncated { found: 3000, expected: 3073, .. }), "{error}");
        assert!(error.to_string().contains("data_batch_1.bin"), "{error}");
        fs::write(&path, []).unwrap();
        assert!(matches!(load_dir(dir.path()), Err(DataError::Truncated { found: 0, expected: 3073, .. })));
    }

    #[test]
    fn labels_out_of_range_are_errors() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "data_batch_1.bin", &[1, 10]);
        assert!(matches!(load_dir(dir.path()), Err(DataError::Label { record: 1, label: 10, .. })));
    }

    #[test]
    fn wrong_number_of_class_names_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "data_batch_1.bin", &[1]);
        write(dir.path(), "test_batch.bin", &[1]);
        fs::write(dir.path().join(CIFAR10.class_file), "cat\ndog\n\n").unwrap();
        let message = load_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("2 class names, expected 10"), "{message}");
    }

    #[test]
    fn partly_unpacked_cache_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/cat", "train/dog", "test/cat", "test/dog"] {
            fs::create_dir_all(dir.path().join(class)).unwrap();
            image::RgbImage::new(32, 32).save(dir.path().join(class).join("0.png")).unwrap();
        }
        let message = CIFAR10.load_cache(dir.path(), &LoadOptions::new(SIDE)).unwrap_err().to_string();
        assert!(message.contains("2 training and 2 test images"), "{message}");
        // a broken image counts as unpacked
        fs::write(dir.path().join("test/dog/1.png"), "no image").unwrap();
        let message = CIFAR10.load_cache(dir.path(), &LoadOptions::new(SIDE)).unwrap_err().to_string();
        assert!(message.contains("2 training and 3 test images"), "{message}");
    }

    #[test]
    fn cifar_100_cache_has_superclass_folders() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/fish/ray", "train/fish/trout", "train/people/girl", "test/fish/ray"] {
            fs::create_dir_all(dir.path().join(class)).unwrap();
            image::RgbImage::new(32, 32).save(dir.path().join(class).join("0.png")).unwrap();
        }
        let message = CIFAR100.load_cache(dir.path(), &LoadOptions::new(SIDE)).unwrap_err().to_string();
        assert!(message.contains("3 training and 1 test images"), "{message}");
    }

    #[test]
    fn official_records_load() {
        let shared = std::env::var_os("FLOPS_SHARED")
            .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")), PathBuf::from);
        let dir = shared.join("cifar10");
        if !dir.is_dir() {
            eprintln!("skipped: no CIFAR-10 records in {} (set FLOPS_SHARED)", dir.display());
            return;
        }
        let split = load_dir(&dir).unwrap();
        let records = (5 - split.missing.len()) * 10_000;
        assert_eq!(split.train.items.len(), records);
        // channel means of the whole training set; those of 10,000 images are within 1
        for (channel, expected) in [125.3, 123.0, 113.9].into_iter().enumerate() {
            let plane =
                |item: &ImageItem| -> u64 { item.pixels[channel * 1024..][..1024].iter().map(|&p| u64::from(p)).sum() };
            let mean = split.train.items.iter().map(plane).sum::<u64>() as f64 / (records * 1024) as f64;
            assert!((mean - expected).abs() < 1.0, "channel {channel}: mean {mean}, expected {expected}");
        }
    }
}
