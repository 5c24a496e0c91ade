//! Checkpoints that are whole or absent.

use std::fs;
use std::path::{Path, PathBuf};

use burn::prelude::Backend;
use burn::record::{FileRecorder, FullPrecisionSettings, NamedMpkBytesRecorder, Recorder, RecorderError};
use serde::{Serialize, de::DeserializeOwned};

use crate::artifacts::write_atomic;

/// Records at full precision into named MessagePack files, as Burn's default recorder does, but writes each beside its place
/// and renames it: whenever the program or the machine stops, the file there is a complete one.
#[derive(Clone, Debug, Default)]
pub struct AtomicRecorder {
    bytes: NamedMpkBytesRecorder<FullPrecisionSettings>,
}

/// The extension of the files.
pub const EXTENSION: &str = "mpk";

impl<B: Backend> FileRecorder<B> for AtomicRecorder {
    fn file_extension() -> &'static str {
        EXTENSION
    }
}

impl<B: Backend> Recorder<B> for AtomicRecorder {
    type Settings = FullPrecisionSettings;
    type RecordArgs = PathBuf;
    type RecordOutput = ();
    type LoadArgs = PathBuf;

    fn save_item<I: Serialize>(&self, item: I, file: PathBuf) -> Result<(), RecorderError> {
        let bytes = Recorder::<B>::save_item(&self.bytes, item, ())?;
        write_atomic(&file.with_extension(EXTENSION), &bytes).map_err(|e| RecorderError::Unknown(format!("{e:#}")))
    }

    fn load_item<I: DeserializeOwned>(&self, file: &mut PathBuf) -> Result<I, RecorderError> {
        let path: &Path = &file.with_extension(EXTENSION);
        let mut bytes = fs::read(path).map_err(|e| RecorderError::FileNotFound(format!("{}: {e}", path.display())))?;
        Recorder::<B>::load_item(&self.bytes, &mut bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::module::{Module, Param};
    use burn::tensor::Tensor;
    type B = burn::backend::Flex;

    #[test]
    fn a_record_survives_and_leaves_nothing_else() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("model-1");
        let (recorder, device) = (AtomicRecorder::default(), Default::default());
        for value in [1.0f32, 2.5] {
            let param = Param::from_tensor(Tensor::<B, 1>::full([3], value, &device));
            Recorder::<B>::record(&recorder, param.into_record(), path.clone()).unwrap();
        }
        let param: Param<Tensor<B, 1>> = Recorder::<B>::load(&recorder, path, &device).unwrap();
        assert_eq!(param.val().into_data().to_vec::<f32>().unwrap(), [2.5; 3]);
        let names: Vec<_> = fs::read_dir(dir.path()).unwrap().map(|e| e.unwrap().file_name()).collect();
        assert_eq!(names, ["model-1.mpk"]);
    }

    #[test]
    fn a_cut_record_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model-1.mpk"), [1, 2, 3]).unwrap();
        let loaded: Result<Param<Tensor<B, 1>>, _> =
            Recorder::<B>::load(&AtomicRecorder::default(), dir.path().join("model-1"), &Default::default());
        assert!(loaded.is_err());
    }
}
