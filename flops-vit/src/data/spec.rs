//! The choice of a data set, as written on a command line.

use super::{DataError, DataSplit, cifar, digits, folder};
use std::fmt;
use std::path::{Path, PathBuf};
use std::str::FromStr;

/// A data set by name: `cifar10`, `digits` or `folder:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
pub enum DatasetSpec {
    /// CIFAR-10: see [`cifar`].
    Cifar10,
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
            Self::Digits => f.write_str("digits"),
            Self::Folder(path) => write!(f, "folder:{}", path.display()),
        }
    }
}

impl DatasetSpec {
    /// Loads the images.
    ///
    /// `data_dir` is where CIFAR-10 lies; without it Burn's data set cache is looked up. Where it is not found, `download` fetches
    /// it into that cache (cargo feature `download`). Digits and folders are resized to `img_size`; CIFAR-10 stays at 32×32 for
    /// the batcher to resize.
    ///
    /// # Errors
    /// What is missing, truncated or cannot be decoded, with its path and the remedy.
    pub fn load(&self, data_dir: Option<&Path>, download: bool, img_size: usize) -> Result<DataSplit, DataError> {
        match self {
            Self::Cifar10 => cifar::load(data_dir, download),
            Self::Digits => digits::load(img_size),
            Self::Folder(path) => folder::load(path, img_size),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_are_read_back() {
        for name in ["cifar10", "digits", "folder:some/where"] {
            assert_eq!(name.parse::<DatasetSpec>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn unknown_names_get_the_choices() {
        for name in ["mnist", "folder:", ""] {
            let message = name.parse::<DatasetSpec>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
            assert!(message.contains("choose cifar10, digits or folder:PATH"), "{message}");
        }
    }
}
