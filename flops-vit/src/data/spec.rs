//! The choice of a data set, as written on a command line.

use super::{DataError, DataSplit, cifar, digits, folder};
use crate::resizing::Resizing;
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A data set by name: `cifar10`, `cifar100`, `digits` or `folder:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatasetSpec {
    /// CIFAR-10: see [`cifar`].
    Cifar10,
    /// CIFAR-100, by its 100 fine classes: see [`cifar`].
    Cifar100,
    /// The embedded handwritten digits: see [`digits`].
    Digits,
    /// A folder of images: see [`folder`].
    Folder(PathBuf),
}

impl FromStr for DatasetSpec {
    type Err = DataError;

    fn from_str(name: &str) -> Result<Self, DataError> {
        match name {
            "cifar10" => Ok(Self::Cifar10),
            "cifar100" => Ok(Self::Cifar100),
            "digits" => Ok(Self::Digits),
            _ => match name.strip_prefix("folder:") {
                Some(path) if !path.is_empty() => Ok(Self::Folder(path.into())),
                _ => Err(DataError::UnknownDataset(name.into())),
            },
        }
    }
}

impl fmt::Display for DatasetSpec {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Cifar10 => f.write_str("cifar10"),
            Self::Cifar100 => f.write_str("cifar100"),
            Self::Digits => f.write_str("digits"),
            Self::Folder(path) => write!(f, "folder:{}", path.display()),
        }
    }
}

/// Where images are looked for, and what becomes of them on the way.
#[derive(Clone, Debug, PartialEq)]
pub struct LoadOptions {
    /// Where CIFAR lies; without it Burn's data set cache is looked up.
    pub data_dir: Option<PathBuf>,
    /// Fetch CIFAR into that cache where it is not found (cargo feature `download`).
    pub download: bool,
    /// Side of the digits and of images from folders; CIFAR stays at 32×32 for the batcher to resize.
    pub img_size: usize,
    /// How images from folders are brought to that size.
    pub resizing: Resizing,
    /// Fail at the first image of a folder that cannot be decoded, instead of leaving it out.
    pub strict: bool,
    /// Threads that decode a folder's images; the result does not depend on it. At least one is used.
    pub threads: usize,
}

impl LoadOptions {
    /// Images of side `img_size`; no folder, no download, broken images left out, a thread per core, at most 8.
    pub fn new(img_size: usize) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        Self { data_dir: None, download: false, img_size, resizing: Resizing::default(), strict: false, threads }
    }

    /// Sets [`data_dir`](Self::data_dir).
    pub fn with_data_dir(mut self, data_dir: Option<PathBuf>) -> Self {
        self.data_dir = data_dir;
        self
    }

    /// Sets [`download`](Self::download).
    pub fn with_download(mut self, download: bool) -> Self {
        self.download = download;
        self
    }

    /// Sets [`resizing`](Self::resizing).
    pub fn with_resizing(mut self, resizing: Resizing) -> Self {
        self.resizing = resizing;
        self
    }

    /// Sets [`strict`](Self::strict).
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Sets [`threads`](Self::threads).
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }
}

impl DatasetSpec {
    /// Loads the images.
    ///
    /// # Errors
    /// What is missing or truncated, or cannot be decoded where `strict` asks for it, with its path and the remedy.
    pub fn load(&self, options: &LoadOptions) -> Result<DataSplit, DataError> {
        match self {
            Self::Cifar10 => cifar::CIFAR10.load(options),
            Self::Cifar100 => cifar::CIFAR100.load(options),
            Self::Digits => digits::load(options.img_size),
            Self::Folder(path) => folder::load(path, options),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in ["cifar10", "cifar100", "digits", "folder:some/where"] {
            assert_eq!(name.parse::<DatasetSpec>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn unknown_names_get_the_choices() {
        for name in ["mnist", "folder:", ""] {
            let message = name.parse::<DatasetSpec>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
            assert!(message.contains("choose cifar10, cifar100, digits or folder:PATH"), "{message}");
        }
    }
}
