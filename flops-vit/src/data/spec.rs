//! A data set named by text, as on a command line.

use super::dataset::DataSplit;
use super::error::DataError;
use super::options::LoadOptions;
use super::{cifar, digits, folder};
use std::fmt;
use std::path::PathBuf;
use std::str::FromStr;

/// A data set, in text `cifar10`, `cifar100`, `digits` or `folder:PATH`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum DatasetSpec {
    /// CIFAR-10: see [`cifar`].
    Cifar10,
    /// CIFAR-100 with its 100 fine classes: see [`cifar`].
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

impl DatasetSpec {
    /// Loads the images.
    ///
    /// # Errors
    /// A file that is missing or truncated, with its path and the remedy. With
    /// [`strict`](LoadOptions::strict) also an image that cannot be decoded.
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
    fn names_round_trip() {
        for name in ["cifar10", "cifar100", "digits", "folder:some/where"] {
            assert_eq!(name.parse::<DatasetSpec>().unwrap().to_string(), name);
        }
    }

    #[test]
    fn errors_list_the_choices() {
        for name in ["mnist", "folder:", ""] {
            let message = name.parse::<DatasetSpec>().unwrap_err().to_string();
            assert!(message.contains(&format!("`{name}`")), "{message}");
            assert!(message.contains("choose cifar10, cifar100, digits or folder:PATH"), "{message}");
        }
    }
}
