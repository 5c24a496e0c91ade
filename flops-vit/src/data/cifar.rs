//! CIFAR-10 (A. Krizhevsky, 2009) in its official binary layout, or as the class folders of Burn's own data set cache.

use super::{DataError, DataSplit, ImageDataset, ImageItem, folder};
use std::path::{Path, PathBuf};

/// Side of the square images.
const SIDE: usize = 32;
/// One label byte, then the red, green and blue planes.
const RECORD: usize = 1 + 3 * SIDE * SIDE;
/// Records in an official file; also the distance between the first ids of two files.
const RECORDS_PER_FILE: usize = 10_000;
const TRAIN_FILES: [&str; 5] =
    ["data_batch_1.bin", "data_batch_2.bin", "data_batch_3.bin", "data_batch_4.bin", "data_batch_5.bin"];
const TEST_FILE: &str = "test_batch.bin";
const CLASS_FILE: &str = "batches.meta.txt";
/// The folder inside the official archive.
const ARCHIVE_FOLDER: &str = "cifar-10-batches-bin";
const CLASSES: [&str; 10] = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"];

/// Loads CIFAR-10 from `data_dir` or, without one, from Burn's data set cache, into which `download` fetches it if need be.
pub(super) fn load(data_dir: Option<&Path>, download: bool) -> Result<DataSplit, DataError> {
    let found = match data_dir {
        Some(dir) => load_dir(dir),
        None => match cache_dir() {
            Some(dir) => load_cache(&dir),
            None => Err(missing(Path::new("the user's cache folder"), "files")),
        },
    };
    match found {
        Err(DataError::MissingCifar { .. }) if download => load_cache(&fetch()?),
        found => found,
    }
}

/// Loads the binary files in `dir` or in its `cifar-10-batches-bin`.
///
/// At least one of the five training files and the test file must be there; [`DataSplit::missing`] names the others.
pub fn load_dir(dir: &Path) -> Result<DataSplit, DataError> {
    let archive = dir.join(ARCHIVE_FOLDER);
    let dir = if archive.is_dir() { archive.as_path() } else { dir };
    let (mut items, mut missing_files) = (vec![], vec![]);
    for (file, name) in TRAIN_FILES.iter().enumerate() {
        let path = dir.join(name);
        if path.is_file() {
            read_records(&path, file * RECORDS_PER_FILE, &mut items)?;
        } else {
            missing_files.push(name.to_string());
        }
    }
    if items.is_empty() {
        return Err(missing(dir, "training file (data_batch_*.bin)"));
    }
    let path = dir.join(TEST_FILE);
    if !path.is_file() {
        return Err(missing(dir, "test file (test_batch.bin)"));
    }
    let mut test = vec![];
    read_records(&path, TRAIN_FILES.len() * RECORDS_PER_FILE, &mut test)?;
    let classes = read_classes(&dir.join(CLASS_FILE))?;
    Ok(DataSplit {
        train: ImageDataset { items, classes: classes.clone() },
        test: ImageDataset { items: test, classes },
        missing: missing_files,
    })
}

fn missing(dir: &Path, wanted: &'static str) -> DataError {
    DataError::MissingCifar { path: dir.to_path_buf(), wanted }
}

fn read_records(path: &Path, first_id: usize, items: &mut Vec<ImageItem>) -> Result<(), DataError> {
    let bytes = std::fs::read(path).map_err(|source| DataError::io(path, source))?;
    if bytes.is_empty() || bytes.len() % RECORD != 0 {
        let expected = bytes.len().div_ceil(RECORD).max(1) * RECORD;
        return Err(DataError::Truncated {
            path: path.to_path_buf(),
            found: bytes.len(),
            expected,
            record_size: RECORD,
        });
    }
    let records = bytes.len() / RECORD;
    if records > RECORDS_PER_FILE {
        return Err(DataError::malformed(path, format!("{records} records, expected at most {RECORDS_PER_FILE}")));
    }
    for (record, bytes) in bytes.chunks_exact(RECORD).enumerate() {
        let label = usize::from(bytes[0]);
        if label >= CLASSES.len() {
            return Err(DataError::Label { path: path.to_path_buf(), record, label, classes: CLASSES.len() });
        }
        let id = (first_id + record) as u64;
        items.push(ImageItem { id, pixels: bytes[1..].to_vec(), height: SIDE, width: SIDE, label });
    }
    Ok(())
}

/// The class names in `path`, or the well-known ones where it is missing.
fn read_classes(path: &Path) -> Result<Vec<String>, DataError> {
    if !path.is_file() {
        return Ok(CLASSES.map(String::from).to_vec());
    }
    let text = std::fs::read_to_string(path).map_err(|source| DataError::io(path, source))?;
    let classes: Vec<String> = text.lines().map(str::trim).filter(|line| !line.is_empty()).map(String::from).collect();
    if classes.len() != CLASSES.len() {
        let reason =
            format!("{} class names, expected {}: remove the file or fetch it again", classes.len(), CLASSES.len());
        return Err(DataError::malformed(path, reason));
    }
    Ok(classes)
}

/// Where `burn_dataset::vision::CifarDataset` keeps CIFAR-10.
fn cache_dir() -> Option<PathBuf> {
    Some(dirs::cache_dir()?.join("burn-dataset").join("cifar10"))
}

/// Loads the class folders of PNGs that `burn_dataset` unpacks; an unpacking that was cut short is an error.
fn load_cache(dir: &Path) -> Result<DataSplit, DataError> {
    if !dir.is_dir() {
        return Err(missing(dir, "images"));
    }
    let split = folder::load(dir, SIDE)?;
    let found = (split.train.items.len(), split.test.items.len());
    if found != (TRAIN_FILES.len() * RECORDS_PER_FILE, RECORDS_PER_FILE) {
        let (train, test) = found;
        let reason = format!(
            "{train} training and {test} test images, expected 50000 and 10000: remove the folder and use --download"
        );
        return Err(DataError::malformed(dir, reason));
    }
    Ok(split)
}

/// Downloads through `burn_dataset`, which panics where there is no network.
#[cfg(feature = "download")]
fn fetch() -> Result<PathBuf, DataError> {
    use burn_dataset::vision::{CifarDataset, CifarType};
    std::panic::catch_unwind(|| CifarDataset::new(CifarType::Cifar10)).map_err(|panic| {
        let reason = match (panic.downcast_ref::<String>(), panic.downcast_ref::<&str>()) {
            (Some(reason), _) => reason.clone(),
            (None, Some(reason)) => reason.to_string(),
            (None, None) => "the downloader stopped".to_string(),
        };
        DataError::Download { reason }
    })?;
    cache_dir().ok_or_else(|| DataError::Download { reason: "there is no cache folder for this user".into() })
}

#[cfg(not(feature = "download"))]
fn fetch() -> Result<PathBuf, DataError> {
    Err(DataError::DownloadDisabled)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A record whose red, green and blue planes start at 1, 2 and 3.
    fn record(label: u8) -> Vec<u8> {
        let mut bytes = vec![0; RECORD];
        bytes[0] = label;
        for channel in 0..3 {
            bytes[1 + channel * SIDE * SIDE] = channel as u8 + 1;
        }
        bytes
    }

    fn write(dir: &Path, name: &str, labels: &[u8]) {
        fs::write(dir.join(name), labels.iter().flat_map(|&label| record(label)).collect::<Vec<_>>()).unwrap();
    }

    #[test]
    fn loads_what_is_there_and_names_what_is_missing() {
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
    fn looks_inside_the_archive_folder() {
        let dir = tempfile::tempdir().unwrap();
        let inner = dir.path().join(ARCHIVE_FOLDER);
        fs::create_dir(&inner).unwrap();
        write(&inner, "data_batch_1.bin", &[1]);
        write(&inner, "test_batch.bin", &[2]);
        assert_eq!(load_dir(dir.path()).unwrap().train.items.len(), 1);
    }

    #[test]
    fn missing_files_are_named_with_the_remedy() {
        let dir = tempfile::tempdir().unwrap();
        let message = load(Some(dir.path()), false).unwrap_err().to_string();
        assert!(message.contains(dir.path().to_str().unwrap()) && message.contains("--download"), "{message}");
        assert!(message.contains("--data-dir"), "{message}");
        write(dir.path(), "data_batch_1.bin", &[1]);
        let message = load_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("test_batch.bin"), "{message}");
    }

    #[cfg(not(feature = "download"))]
    #[test]
    fn download_needs_the_feature() {
        let dir = tempfile::tempdir().unwrap();
        assert!(matches!(load(Some(dir.path()), true), Err(DataError::DownloadDisabled)));
    }

    #[test]
    fn truncated_and_empty_files_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("data_batch_1.bin");
        fs::write(&path, &record(1)[..3000]).unwrap();
        let error = load_dir(dir.path()).unwrap_err();
        assert!(matches!(error, DataError::Truncated { found: 3000, expected: 3073, .. }), "{error}");
        assert!(error.to_string().contains("data_batch_1.bin"), "{error}");
        fs::write(&path, []).unwrap();
        assert!(matches!(load_dir(dir.path()), Err(DataError::Truncated { found: 0, expected: 3073, .. })));
    }

    #[test]
    fn labels_beyond_the_classes_are_refused() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "data_batch_1.bin", &[1, 10]);
        assert!(matches!(load_dir(dir.path()), Err(DataError::Label { record: 1, label: 10, .. })));
    }

    #[test]
    fn class_names_are_counted() {
        let dir = tempfile::tempdir().unwrap();
        write(dir.path(), "data_batch_1.bin", &[1]);
        write(dir.path(), "test_batch.bin", &[1]);
        fs::write(dir.path().join(CLASS_FILE), "cat\ndog\n\n").unwrap();
        let message = load_dir(dir.path()).unwrap_err().to_string();
        assert!(message.contains("2 class names, expected 10"), "{message}");
    }

    #[test]
    fn a_cache_cut_short_is_refused() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/cat", "train/dog", "test/cat", "test/dog"] {
            fs::create_dir_all(dir.path().join(class)).unwrap();
            image::RgbImage::new(32, 32).save(dir.path().join(class).join("0.png")).unwrap();
        }
        let message = load_cache(dir.path()).unwrap_err().to_string();
        assert!(message.contains("2 training and 2 test images"), "{message}");
    }

    #[test]
    fn real_records() {
        let shared = std::env::var_os("FLOPS_SHARED")
            .map_or_else(|| PathBuf::from(concat!(env!("CARGO_MANIFEST_DIR"), "/../../shared")), PathBuf::from);
        let dir = shared.join("cifar10");
        if !dir.is_dir() {
            eprintln!("skipped: no CIFAR-10 records in {} (set FLOPS_SHARED)", dir.display());
            return;
        }
        let split = load_dir(&dir).unwrap();
        let records = (TRAIN_FILES.len() - split.missing.len()) * RECORDS_PER_FILE;
        assert_eq!(split.train.items.len(), records);
        // The channel means of the whole training set are 125.3, 123.0, 113.9; a sample of 10,000 is within 1.
        for (channel, expected) in [125.3, 123.0, 113.9].into_iter().enumerate() {
            let plane =
                |item: &ImageItem| -> u64 { item.pixels[channel * 1024..][..1024].iter().map(|&p| u64::from(p)).sum() };
            let mean = split.train.items.iter().map(plane).sum::<u64>() as f64 / (records * 1024) as f64;
            assert!((mean - expected).abs() < 1.0, "channel {channel}: mean {mean}, expected {expected}");
        }
    }
}
