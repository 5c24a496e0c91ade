//! Errors of data sets; each names the place and the remedy.

use super::decode::ImageFault;
use std::fmt::Display;
use std::path::{Path, PathBuf};

/// An error of loading a data set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// There is no data set of that name.
    #[error("unknown data set `{0}`: choose cifar10, cifar100, digits or folder:PATH")]
    UnknownDataset(String),
    /// A file or folder cannot be read.
    #[error("cannot read {}: {why}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        why: std::io::Error,
    },
    /// The folder does not exist.
    #[error("there is no folder {}: give one with {layout}", path.display())]
    MissingFolder {
        /// The folder that was looked for.
        path: PathBuf,
        /// What it should hold.
        layout: &'static str,
    },
    /// CIFAR is not where it was looked for.
    #[error(
        "no {data_set} {wanted} in {}: name the folder of the official binary files ({files}) with \
         --data-dir, or fetch the data with --download",
        path.display()
    )]
    MissingCifar {
        /// CIFAR-10 or CIFAR-100.
        data_set: &'static str,
        /// The folder that was searched.
        path: PathBuf,
        /// What it lacks.
        wanted: &'static str,
        /// The official files.
        files: String,
    },
    /// The folder holds CIFAR's Python form instead of the binary one.
    #[error(
        "{} holds {data_set} in its Python form, which is not read: convert it with `python3 \
         flops-vit/data/pickle_to_binary.py {}`, then name that folder with --data-dir",
        path.display(),
        path.display()
    )]
    PythonCifar {
        /// CIFAR-10 or CIFAR-100.
        data_set: &'static str,
        /// The folder of the pickles.
        path: PathBuf,
    },
    /// The size of a binary file is not a whole number of records.
    #[error(
        "{} is truncated: {found} bytes, expected a positive multiple of {record_size} (labels and 32×32×3 \
         pixels); the next whole size is {expected}: fetch the file again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: usize,
        /// The smallest whole size that is not smaller.
        expected: usize,
        /// The size of a record in bytes.
        record_size: usize,
    },
    /// A label is out of range.
    #[error("{}: record {record} has label {label}, expected 0 to {}: this is no {data_set} file", path.display(), classes - 1)]
    Label {
        /// CIFAR-10 or CIFAR-100.
        data_set: &'static str,
        /// The file.
        path: PathBuf,
        /// The record, counted from 0.
        record: usize,
        /// Its label.
        label: usize,
        /// The number of classes.
        classes: usize,
    },
    /// A file does not hold what its name says.
    #[error("{} is malformed: {reason}", path.display())]
    Malformed {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// An image cannot be decoded.
    #[error("cannot decode the image {}: {why}; remove or replace the file", path.display())]
    Decode {
        /// The image file.
        path: PathBuf,
        /// What is wrong with it.
        why: ImageFault,
    },
    /// A class folder has no images.
    #[error(
        "no image (such as .png, .jpg or .webp) in {} or in folders below it: add images or remove the \
         folder",
        path.display()
    )]
    NoImages {
        /// The folder.
        path: PathBuf,
    },
    /// No image of a class folder can be decoded.
    #[error(
        "none of the {files} images of the class in {} can be decoded (the first: {reason}): replace them \
         or remove the folder",
        path.display()
    )]
    BrokenClass {
        /// The folder.
        path: PathBuf,
        /// The number of its images in the training or the test part.
        files: usize,
        /// The decoder's error for the first.
        reason: String,
    },
    /// A folder holds fewer than two classes.
    #[error(
        "{} holds {found} class folders, at least 2 are needed: expected {}/CLASS/IMAGE.png{}",
        path.display(), path.display(), hint(path, beside, inner.as_deref())
    )]
    TooFewClasses {
        /// The folder.
        path: PathBuf,
        /// The number of its sub-folders.
        found: usize,
        /// Folders beside it that are left unread, where it counts as a part of the data by its name.
        beside: Vec<String>,
        /// The only folder in it, if that one holds several.
        inner: Option<PathBuf>,
    },
    /// A class of the test images has no training images.
    #[error("{} is a class without training images; {}", path.display(), training_classes(path, classes))]
    UnknownClass {
        /// The class folder.
        path: PathBuf,
        /// The classes of the training images.
        classes: Vec<String>,
    },
    /// A folder is called like a part of the data, and holds images in place of classes.
    #[error(
        "{} is called like a part of a data set, but holds no class folders: sort its images into a folder \
         per class; if it is a class, put all classes into a folder train",
        path.display()
    )]
    NoClassFolders {
        /// The folder.
        path: PathBuf,
    },
    /// There are test images without training images.
    #[error(
        "{} holds test images, but no folder of training images (train, training) lies beside it: add one, or \
         give {} itself, of which a fifth then become test images",
        path.display(), path.display()
    )]
    NoTrainingPart {
        /// The folder of test images.
        path: PathBuf,
    },
    /// Two folders hold the same part of the data by their names.
    #[error(
        "{} and {} are both folders of {part} images by their names: keep one of them there",
        first.display(), second.display()
    )]
    TwoParts {
        /// Training, test or validation.
        part: &'static str,
        /// One of the folders.
        first: PathBuf,
        /// Another one.
        second: PathBuf,
    },
    /// No class has an image that could become a test image.
    #[error(
        "each class in {} has a single image, and a test image needs a second one: add images, or test images \
         in {}/train and {}/test",
        path.display(), path.display(), path.display()
    )]
    NoTestImages {
        /// The folder of classes.
        path: PathBuf,
    },
    /// Few-shot training with 0 images of each class.
    #[error("0 images of every class were asked for: use at least 1")]
    ZeroShots,
    /// A class has fewer images than the shots asked for.
    #[error(
        "class {class} has {found} training images, {shots} of every class were asked for: ask for at most {found}"
    )]
    TooFewShots {
        /// The class.
        class: String,
        /// The number of its images.
        found: usize,
        /// The number asked for.
        shots: usize,
    },
    /// The image size is 0.
    #[error("the image size is 0: it must be at least 1 pixel")]
    ZeroImageSize,
    /// A model takes images of another number of channels.
    #[error("the model takes images of {in_chans} channels: use one of 3 channels, or of 1 for grey images")]
    Channels {
        /// Channels of the model.
        in_chans: usize,
    },
    /// The download failed.
    #[error(
        "{data_set} could not be downloaded ({reason}): check the network, or name a folder that holds it \
         with --data-dir"
    )]
    Download {
        /// CIFAR-10 or CIFAR-100.
        data_set: &'static str,
        /// What went wrong.
        reason: String,
    },
    /// The build has no download.
    #[error(
        "this build cannot download: build with `--features download`, or name a folder that holds \
         {data_set} with --data-dir"
    )]
    DownloadDisabled {
        /// CIFAR-10 or CIFAR-100.
        data_set: &'static str,
    },
}

impl DataError {
    pub(crate) fn io(path: &Path, why: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), why }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), reason: reason.into() }
    }
}

/// What to do where too few folders lie in one that has some beside or inside it.
fn hint(path: &Path, beside: &[String], inner: Option<&Path>) -> String {
    let part = path.file_name().unwrap_or_default().to_string_lossy();
    match (beside, inner) {
        ([], None) => String::new(),
        ([], Some(inner)) => format!("; {} holds several folders: give that one", inner.display()),
        _ => format!(
            "; it counts as a part of the data by its name and its folders, so {} would be left unread: if {part} \
             is a class, put all classes into a folder train",
            some(beside.iter())
        ),
    }
}

/// Names the classes of the training images, or the one that differs in case alone.
fn training_classes(path: &Path, classes: &[String]) -> String {
    let name = path.file_name().unwrap_or_default().to_string_lossy().to_lowercase();
    match classes.iter().find(|class| class.to_lowercase() == name) {
        Some(class) => format!("the training class {class} differs in upper and lower case alone: rename one of them"),
        None => format!("the training classes are {}: rename it, or add training images", some(classes.iter())),
    }
}

/// Number of things that a message names.
const NAMED: usize = 5;

/// Names the first things, and says how many follow.
pub(super) fn some<T: Display>(mut things: impl ExactSizeIterator<Item = T>) -> String {
    let named: Vec<String> = things.by_ref().take(NAMED).map(|thing| thing.to_string()).collect();
    let more = if things.len() > 0 { format!(" and {} more", things.len()) } else { String::new() };
    named.join(", ") + &more
}
