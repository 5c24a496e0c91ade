//! Which folders hold training images, which test images, by their names.

use super::dataset::Skipped;
use super::error::DataError;
use super::walk::{folders, images_below, name};
use std::path::{Path, PathBuf};

/// What the folder should hold.
const LAYOUT: &str = "one sub-folder of images per class, or such folders in train/ and test/";

/// A part of a data set. Test images are taken from the last kind that is there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
enum Part {
    Training,
    Validation,
    Test,
}

/// The names of parts: `SPLIT_KEYWORDS` of HuggingFace's `datasets`.
const NAMES: [(&str, Part); 10] = [
    ("train", Part::Training),
    ("training", Part::Training),
    ("validation", Part::Validation),
    ("valid", Part::Validation),
    ("dev", Part::Validation),
    ("val", Part::Validation),
    ("test", Part::Test),
    ("testing", Part::Test),
    ("eval", Part::Test),
    ("evaluation", Part::Test),
];
/// What stands between the words of a name there: `NON_WORDS_CHARS`.
const BETWEEN_WORDS: &str = "-._ 0123456789";

/// Where the classes of a data set are.
#[derive(Debug)]
pub(super) struct Layout {
    /// The folder of the training images' class folders.
    pub train: PathBuf,
    /// The folder of the test images' class folders, if there is one.
    pub test: Option<PathBuf>,
    /// The folders that are left unread.
    pub unread: Vec<Skipped>,
}

/// A folder whose name is that of a part.
struct Named {
    path: PathBuf,
    part: Part,
    /// Whether the name is that of a part and nothing else.
    exact: bool,
}

impl Layout {
    /// Finds the parts among the folders in `root`.
    ///
    /// A folder is a part if it is called so in upper or lower case, and holds folders. Longer
    /// names, such as `train_set`, count only where each folder has one. Where no folder is a part,
    /// all of them are classes.
    pub(super) fn of(root: &Path) -> Result<Self, DataError> {
        let all = class_folders(root)?;
        let mut named: Vec<Named> = all.iter().filter_map(|path| Named::new(path)).collect();
        let only_parts = named.len() == all.len();
        named.retain(|folder| only_parts || folder.exact);
        let mut parts = vec![];
        let mut flat = vec![];
        for folder in named {
            let holds_classes = !folders(&folder.path)?.is_empty();
            if holds_classes { parts.push(folder) } else { flat.push(folder) }
        }
        if parts.is_empty() {
            return match flat.into_iter().next() {
                Some(folder) if only_parts => Err(DataError::NoClassFolders { path: folder.path }),
                _ => Ok(Self { train: root.to_path_buf(), test: None, unread: vec![] }),
            };
        }
        let (train, test) = choose(parts, flat)?;
        let unread = all.into_iter().filter(|path| *path != train && Some(path) != test.as_ref());
        let unread = unread.map(|path| unread_folder(path, &train, test.as_deref())).collect();
        Ok(Self { train, test, unread })
    }
}

impl Named {
    fn new(path: &Path) -> Option<Self> {
        let name = name(path).to_lowercase();
        let of = |word: &str| NAMES.iter().find(|known| known.0 == word).map(|known| known.1);
        let new = |part, exact| Self { path: path.to_path_buf(), part, exact };
        if let Some(part) = of(&name) {
            return Some(new(part, true));
        }
        let mut parts: Vec<Part> = name.split(|c| BETWEEN_WORDS.contains(c)).filter_map(of).collect();
        parts.dedup();
        // `train_test` is neither
        match parts[..] {
            [part] => Some(new(part, false)),
            _ => None,
        }
    }
}

/// Chooses the folders of training and of test images among those that hold classes.
fn choose(parts: Vec<Named>, flat: Vec<Named>) -> Result<(PathBuf, Option<PathBuf>), DataError> {
    let one = |part: Part, word: &'static str| {
        let mut paths = parts.iter().filter(|folder| folder.part == part).map(|folder| folder.path.clone());
        match (paths.next(), paths.next()) {
            (Some(first), Some(second)) => Err(DataError::TwoParts { part: word, first, second }),
            (found, _) => Ok(found),
        }
    };
    let train = one(Part::Training, "training")?;
    let test = match one(Part::Test, "test")? {
        Some(test) => Some(test),
        None => one(Part::Validation, "validation")?,
    };
    // a part without classes stands in the way only where no other folder can take its place
    let without_classes = |wanted: fn(Part) -> bool| {
        for folder in flat.iter().filter(|folder| wanted(folder.part)) {
            if !images_below(&folder.path, &mut vec![])?.is_empty() {
                return Err(DataError::NoClassFolders { path: folder.path.clone() });
            }
        }
        Ok(())
    };
    if train.is_none() {
        without_classes(|part| part == Part::Training)?;
    }
    if test.is_none() {
        without_classes(|part| part != Part::Training)?;
    }
    match (train, test) {
        (Some(train), test) => Ok((train, test)),
        // one of both is there
        (None, test) => Err(DataError::NoTrainingPart { path: test.unwrap_or_default() }),
    }
}

/// Says why a folder is left unread.
fn unread_folder(path: PathBuf, train: &Path, test: Option<&Path>) -> Skipped {
    let reason = match (Named::new(&path), test) {
        (Some(folder), Some(test)) if folder.part != Part::Training => {
            format!("since test images are read from {}", test.display())
        }
        _ => format!("since training images are read from {}", train.display()),
    };
    Skipped::new(path, reason)
}

/// The class folders in `dir`, in alphabetical order.
pub(super) fn class_folders(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    if !dir.is_dir() {
        return Err(DataError::MissingFolder { path: dir.to_path_buf(), layout: LAYOUT });
    }
    folders(dir)
}

/// The class folders in `dir` and in those of its sub-folders that hold folders.
pub(super) fn grouped_class_folders(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut classes = vec![];
    for folder in class_folders(dir)? {
        let inner = folders(&folder)?;
        if inner.is_empty() { classes.push(folder) } else { classes.extend(inner) }
    }
    classes.sort_by_key(|folder| name(folder));
    Ok(classes)
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    /// A folder in which each path is an empty file.
    fn tree(files: &[&str]) -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for file in files {
            let path = dir.path().join(file);
            fs::create_dir_all(path.parent().unwrap()).unwrap();
            fs::write(path, "").unwrap();
        }
        dir
    }

    /// The folders of training and of test images, and those that are left unread.
    fn read(files: &[&str]) -> Result<(String, Option<String>, Vec<String>), DataError> {
        let dir = tree(files);
        let relative = |path: &Path| path.strip_prefix(dir.path()).unwrap().display().to_string();
        let layout = Layout::of(dir.path())?;
        let unread = layout.unread.iter().map(|folder| relative(&folder.path)).collect();
        Ok((relative(&layout.train), layout.test.as_deref().map(relative), unread))
    }

    // datasets/data_files.py: SPLIT_KEYWORDS, between NON_WORDS_CHARS
    #[test]
    fn every_customary_name_of_a_part_is_known() {
        for train in ["train", "training", "Train", "TRAIN", "train_set", "seg_train", "train2017"] {
            for test in
                ["test", "testing", "eval", "evaluation", "val", "valid", "validation", "dev", "TEST", "Val-set"]
            {
                let files = [format!("{train}/cat/1.png"), format!("{test}/cat/1.png")];
                let found = read(&[&files[0], &files[1]]).unwrap();
                assert_eq!(found, (train.to_string(), Some(test.to_string()), vec![]));
            }
        }
    }

    #[test]
    fn test_images_come_before_validation_images_and_the_rest_is_named() {
        let found = read(&["train/cat/1.png", "val/cat/1.png", "test/cat/1.png", "extra/cat/1.png"]).unwrap();
        assert_eq!(found, ("train".into(), Some("test".into()), vec!["extra".into(), "val".into()]));
        // unlabelled test images, as in competitions
        let found = read(&["train/cat/1.png", "val/cat/1.png", "test/1.png"]).unwrap();
        assert_eq!(found, ("train".into(), Some("val".into()), vec!["test".into()]));
        // longer names count only where every folder has one
        let found = read(&["train/cat/1.png", "test_set/cat/1.png", "extra/1.png"]).unwrap();
        assert_eq!(found, ("train".into(), None, vec!["extra".into(), "test_set".into()]));
    }

    #[test]
    fn classes_may_be_called_like_parts() {
        let flat = (String::new(), None, vec![]);
        assert_eq!(read(&["bus/1.png", "car/1.png", "train/1.png"]).unwrap(), flat);
        assert_eq!(read(&["bus/old/1.png", "test_tube/old/1.png", "train_station/a/1.png"]).unwrap(), flat);
        assert_eq!(read(&["valid/1.png", "invalid/1.png"]).unwrap(), flat);
        assert_eq!(read(&["cat/1.png", "dog/1.png"]).unwrap(), flat);
        assert_eq!(read(&["train_test/1.png", "other/1.png"]).unwrap(), flat);
    }

    #[test]
    fn errors_name_the_folder_and_what_it_is_taken_for() {
        let error = |files: &[&str]| read(files).unwrap_err();
        let named = |path: &Path, name: &str| path.ends_with(name);
        for files in [&["train/1.png", "test/1.png"][..], &["test/1.png", "train/cat/1.png"], &["test/1.png"]] {
            assert!(
                matches!(error(files), DataError::NoClassFolders { path } if named(&path, "test")),
                "{files:?}: {}",
                error(files)
            );
        }
        assert!(
            matches!(error(&["train/1.png", "val/a/1.png"]), DataError::NoClassFolders { path } if named(&path, "train"))
        );
        assert!(
            matches!(error(&["val/a/1.png", "b/1.png"]), DataError::NoTrainingPart { path } if named(&path, "val"))
        );
        let two = error(&["train/a/1.png", "Training/a/1.png"]);
        assert!(matches!(&two, DataError::TwoParts { part: "training", .. }), "{two}");
        assert!(two.to_string().contains("Training and "), "{two}");
        assert!(matches!(error(&["train/a/1.png", "val/a/1.png", "dev/a/1.png"]), DataError::TwoParts { .. }));
        assert!(matches!(Layout::of(Path::new("nowhere")), Err(DataError::MissingFolder { .. })));
    }
}
