//! Errors of data sets; each names the place and the remedy.

use std::path::{Path, PathBuf};

/// An error of loading a data set.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// There is no data set of that name.
    #[error("unknown data set `{0}`: choose cifar10, cifar100, digits or folder:PATH")]
    UnknownDataset(String),
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// The system's error.
        source: std::io::Error,
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
    #[error("cannot decode the image {}: {source}; remove or replace the file", path.display())]
    Decode {
        /// The image file.
        path: PathBuf,
        /// The decoder's error.
        source: image::ImageError,
    },
    /// A class folder has no images.
    #[error("no .png, .jpg or .jpeg image in {}: add images or remove the folder", path.display())]
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
    #[error("{} holds {found} class folders, at least 2 are needed: expected {}/CLASS/IMAGE.png", path.display(), path.display())]
    TooFewClasses {
        /// The folder.
        path: PathBuf,
        /// The number of its sub-folders.
        found: usize,
    },
    /// A class of the test images has no training images.
    #[error("{} is a class without training images; the training classes are {}", path.display(), classes.join(", "))]
    UnknownClass {
        /// The class folder.
        path: PathBuf,
        /// The classes of the training images.
        classes: Vec<String>,
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
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), reason: reason.into() }
    }
}
