//! What can be wrong with a data set, with its place and the remedy.

use std::path::{Path, PathBuf};

/// Why a data set cannot be loaded.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DataError {
    /// The name is none of the known data sets.
    #[error("unknown data set `{0}`: choose cifar10, digits or folder:PATH")]
    UnknownDataset(String),
    /// A file or folder cannot be read.
    #[error("cannot read {}: {source}", path.display())]
    Io {
        /// The file or folder.
        path: PathBuf,
        /// What the system said.
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
    /// No CIFAR-10 where it was looked for.
    #[error(
        "no CIFAR-10 {wanted} in {}: name the folder of the official binary files (data_batch_1.bin … test_batch.bin) with \
         --data-dir, or fetch the data with --download",
        path.display()
    )]
    MissingCifar {
        /// The folder that was looked into.
        path: PathBuf,
        /// What it lacks.
        wanted: &'static str,
    },
    /// A binary file whose size is no whole number of records.
    #[error(
        "{} is truncated: {found} bytes, expected a positive multiple of {record_size} (one label and 32×32×3 pixels); the next \
         whole size is {expected}: fetch the file again",
        path.display()
    )]
    Truncated {
        /// The file.
        path: PathBuf,
        /// Its size in bytes.
        found: usize,
        /// The smallest whole size that is not below it.
        expected: usize,
        /// The size of a record.
        record_size: usize,
    },
    /// A label beyond the classes.
    #[error("{}: record {record} has label {label}, expected 0 to {}: this is no CIFAR-10 file", path.display(), classes - 1)]
    Label {
        /// The file.
        path: PathBuf,
        /// The record, counted from 0.
        record: usize,
        /// Its label.
        label: usize,
        /// The number of classes.
        classes: usize,
    },
    /// A file that is not what its name says.
    #[error("{} is malformed: {reason}", path.display())]
    Malformed {
        /// The file or folder.
        path: PathBuf,
        /// What is wrong with it, and what to do.
        reason: String,
    },
    /// An image that cannot be decoded.
    #[error("cannot decode the image {}: {source}; remove or replace the file", path.display())]
    Decode {
        /// The image file.
        path: PathBuf,
        /// What the decoder said.
        source: image::ImageError,
    },
    /// A class folder without images.
    #[error("no .png, .jpg or .jpeg image in {}: add images or remove the folder", path.display())]
    NoImages {
        /// The folder.
        path: PathBuf,
    },
    /// A folder that does not hold at least two classes.
    #[error("{} holds {found} class folders, at least 2 are needed: expected {}/CLASS/IMAGE.png", path.display(), path.display())]
    TooFewClasses {
        /// The folder.
        path: PathBuf,
        /// How many sub-folders it has.
        found: usize,
    },
    /// A class of the test images that the training images do not have.
    #[error("{} is a class without training images; the training classes are {}", path.display(), classes.join(", "))]
    UnknownClass {
        /// The class folder.
        path: PathBuf,
        /// The classes of the training images.
        classes: Vec<String>,
    },
    /// The side of the model's input is zero.
    #[error("the image size is 0: it must be at least 1 pixel")]
    ZeroImageSize,
    /// The download was asked for and did not succeed.
    #[error(
        "CIFAR-10 could not be downloaded ({reason}): check the network, or name a folder that holds it with --data-dir"
    )]
    Download {
        /// What went wrong.
        reason: String,
    },
    /// The download was asked for in a build without it.
    #[error(
        "this build cannot download: build with `--features download`, or name a folder that holds CIFAR-10 with --data-dir"
    )]
    DownloadDisabled,
}

impl DataError {
    pub(crate) fn io(path: &Path, source: std::io::Error) -> Self {
        Self::Io { path: path.to_path_buf(), source }
    }

    pub(crate) fn malformed(path: &Path, reason: impl Into<String>) -> Self {
        Self::Malformed { path: path.to_path_buf(), reason: reason.into() }
    }
}
