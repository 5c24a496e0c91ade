//! Atomic checkpoints, read from the tensors before the next epoch may change them.
//!
//! burn-train writes checkpoints on threads of its own while training goes on. Three things can go
//! wrong. The program may stop in the middle of a file: [`AtomicRecorder`] prevents that. A file
//! may be damaged later: a checksum at its end tells. The next epoch may take tensors that are still
//! to be read ([burn issue 4347](https://github.com/tracel-ai/burn/issues/4347)):
//! [`CheckpointBarrier`] prevents that.
//!
//! # Example
//! ```
//! use burn::train::checkpoint::KeepLastNCheckpoints;
//! use flops_core::train::recorder::AtomicRecorder;
//!
//! let recorder = AtomicRecorder::default();
//! let barrier = recorder.barrier();
//! let strategy = barrier.track(KeepLastNCheckpoints::new(2));
//! // SupervisedTraining::new(folder, barrier.gate(train_loader), valid_loader)
//! //     .with_file_checkpointer(recorder)
//! //     .with_checkpointing_strategy(strategy)
//! # let _ = (recorder, strategy);
//! ```

use std::fs;
use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::{Path, PathBuf};
use std::sync::{Arc, Condvar, Mutex};

use burn::data::dataloader::{DataLoader, DataLoaderIterator};
use burn::prelude::Backend;
use burn::record::{
    BurnRecord, FileRecorder, FullPrecisionSettings, NamedMpkBytesRecorder, Record, Recorder, RecorderError,
};
use burn::train::checkpoint::{CheckpointingAction, CheckpointingStrategy};
use burn::train::metric::store::EventStoreClient;
use serde::{Serialize, de::DeserializeOwned};

use super::checksum::{self, ChecksumError};
use crate::train::files::write_atomic;

/// The extension of the files.
pub const EXTENSION: &str = "mpk";

/// The parts that burn-train saves of a checkpoint: model, optimizer and schedule.
const RECORDS_PER_CHECKPOINT: usize = 3;

/// A file recorder whose files are complete or absent, whenever the program or the machine stops.
///
/// The format is that of Burn's default recorder: named MessagePack at full precision, with the
/// [extension](EXTENSION) `mpk`. SHA-256 over it follows, which Burn's recorder ignores. Each file
/// is [written atomically](write_atomic).
///
/// # Errors
/// [`RecorderError`] where a file is missing, has another checksum or none, or cannot be written,
/// or where the device does not give the state. Burn panics in that last case.
#[derive(Clone, Debug, Default)]
pub struct AtomicRecorder {
    bytes: NamedMpkBytesRecorder<FullPrecisionSettings>,
    barrier: CheckpointBarrier,
}

impl AtomicRecorder {
    /// Returns the barrier for the records of this recorder and all its clones.
    pub fn barrier(&self) -> CheckpointBarrier {
        self.barrier.clone()
    }

    /// Checks that a file is the one that was written, by its checksum.
    ///
    /// # Errors
    /// If it cannot be read, or has another checksum or none.
    pub fn verify(file: &Path) -> Result<(), VerifyError> {
        read(file).map(drop)
    }
}

/// Why a file is not the one that [`AtomicRecorder`] wrote.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VerifyError {
    /// It cannot be read.
    #[error("cannot read {}: {why}", path.display())]
    Read {
        /// The file.
        path: PathBuf,
        /// What the system says.
        why: std::io::Error,
    },
    /// It has another checksum or none.
    #[error("{}: {why}", path.display())]
    Checksum {
        /// The file.
        path: PathBuf,
        /// What is wrong with it.
        why: ChecksumError,
    },
}

/// Returns the content of a file whose checksum is right.
fn read(file: &Path) -> Result<Vec<u8>, VerifyError> {
    let path = file.with_extension(EXTENSION);
    let mut bytes = match fs::read(&path) {
        Ok(bytes) => bytes,
        Err(why) => return Err(VerifyError::Read { path, why }),
    };
    match checksum::checked(&bytes).map(<[u8]>::len) {
        Ok(length) => bytes.truncate(length),
        Err(why) => return Err(VerifyError::Checksum { path, why }),
    }
    Ok(bytes)
}

/// Lets an epoch begin only when the last checkpoint has been read from its tensors.
///
/// burn-train reads them on threads of its own, while the next epoch begins. With fusion, a tensor
/// that training consumes in the meantime is gone: `Should have handle for tensor` ([burn issue
/// 4347](https://github.com/tracel-ai/burn/issues/4347)). Therefore a [gated](Self::gate) loader
/// waits for the reading. It does not wait for the files.
///
/// Both halves belong together: [`track`](Self::track) counts the records to come, and the
/// [`AtomicRecorder`] that this barrier is from counts them down. With another recorder a gated
/// loader would wait forever.
#[derive(Clone, Debug, Default)]
pub struct CheckpointBarrier(Arc<(Mutex<usize>, Condvar)>);

impl CheckpointBarrier {
    fn update(&self, update: impl FnOnce(usize) -> usize) {
        let (pending, changed) = &*self.0;
        let mut pending = pending.lock().unwrap_or_else(|e| e.into_inner());
        *pending = update(*pending);
        changed.notify_all();
    }

    fn wait(&self) {
        let (pending, changed) = &*self.0;
        let pending = pending.lock().unwrap_or_else(|e| e.into_inner());
        drop(changed.wait_while(pending, |pending| *pending > 0));
    }

    /// Wraps a checkpointing strategy, and counts the records that it asks for.
    #[must_use]
    pub fn track<S: CheckpointingStrategy>(&self, strategy: S) -> impl CheckpointingStrategy + use<S> {
        struct Tracked<S>(S, CheckpointBarrier);
        impl<S: CheckpointingStrategy> CheckpointingStrategy for Tracked<S> {
            fn checkpointing(&mut self, epoch: usize, store: &EventStoreClient) -> Vec<CheckpointingAction> {
                let actions = self.0.checkpointing(epoch, store);
                let saves = actions.iter().filter(|action| **action == CheckpointingAction::Save).count();
                self.1.update(|pending| pending + RECORDS_PER_CHECKPOINT * saves);
                actions
            }
        }
        Tracked(strategy, self.clone())
    }

    /// Wraps a loader; its epochs begin when no record is left to read.
    #[must_use]
    pub fn gate<B: Backend, I: 'static>(&self, loader: Arc<dyn DataLoader<B, I>>) -> Arc<dyn DataLoader<B, I>> {
        struct Gated<B: Backend, I>(Arc<dyn DataLoader<B, I>>, CheckpointBarrier);
        impl<B: Backend, I: 'static> DataLoader<B, I> for Gated<B, I> {
            fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<I> + 'a> {
                self.1.wait();
                self.0.iter()
            }
            fn num_items(&self) -> usize {
                self.0.num_items()
            }
            fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, I>> {
                self.1.gate(self.0.to_device(device))
            }
            fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, I>> {
                self.1.gate(self.0.slice(start, end))
            }
        }
        Arc::new(Gated(loader, self.clone()))
    }
}

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

    fn record<R: Record<B>>(&self, record: R, file: PathBuf) -> Result<(), RecorderError> {
        // Burn panics where a device does not answer: that would end the writing thread alone, an
        // error ends training
        let item = catch_unwind(AssertUnwindSafe(|| record.into_item::<FullPrecisionSettings>()));
        self.barrier.update(|pending| pending.saturating_sub(1));
        let item = item.map_err(|_| {
            RecorderError::Unknown(format!("the state for {} could not be read from the device", file.display()))
        })?;
        Recorder::<B>::save_item(self, BurnRecord::<_, B>::new::<Self>(item), file)
    }

    fn save_item<I: Serialize>(&self, item: I, file: PathBuf) -> Result<(), RecorderError> {
        let mut bytes = Recorder::<B>::save_item(&self.bytes, item, ())?;
        checksum::append(&mut bytes);
        write_atomic(&file.with_extension(EXTENSION), &bytes).map_err(|e| RecorderError::Unknown(e.to_string()))
    }

    fn load_item<I: DeserializeOwned>(&self, file: &mut PathBuf) -> Result<I, RecorderError> {
        let mut bytes = read(file).map_err(|error| match error {
            VerifyError::Read { .. } => RecorderError::FileNotFound(error.to_string()),
            VerifyError::Checksum { .. } => RecorderError::Unknown(error.to_string()),
        })?;
        Recorder::<B>::load_item(&self.bytes, &mut bytes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::sync::mpsc;
    use std::time::Duration;

    use burn::data::dataloader::Progress;
    use burn::module::{Module, Param};
    use burn::record::PrecisionSettings;
    use burn::tensor::Tensor;
    use burn::tensor::backend::BackendTypes;

    type B = burn::backend::Flex;

    #[test]
    fn a_record_is_read_back_and_leaves_one_file() {
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

    /// A record whose tensors cannot be read.
    struct Broken;

    impl Record<B> for Broken {
        type Item<S: PrecisionSettings> = usize;
        fn into_item<S: PrecisionSettings>(self) -> usize {
            panic!("the device does not answer")
        }
        fn from_item<S: PrecisionSettings>(_: usize, _: &<B as BackendTypes>::Device) -> Self {
            Self
        }
    }

    /// A loader without batches.
    struct Nothing;

    impl Iterator for Nothing {
        type Item = ();
        fn next(&mut self) -> Option<()> {
            None
        }
    }

    impl DataLoaderIterator<()> for Nothing {
        fn progress(&self) -> Progress {
            Progress::new(0, 0)
        }
    }

    impl DataLoader<B, ()> for Nothing {
        fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<()> + 'a> {
            Box::new(Nothing)
        }
        fn num_items(&self) -> usize {
            0
        }
        fn to_device(&self, _: &<B as BackendTypes>::Device) -> Arc<dyn DataLoader<B, ()>> {
            Arc::new(Nothing)
        }
        fn slice(&self, _: usize, _: usize) -> Arc<dyn DataLoader<B, ()>> {
            Arc::new(Nothing)
        }
    }

    #[test]
    fn an_epoch_waits_until_every_record_was_read_or_failed() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, path) = (AtomicRecorder::default(), dir.path().join("model-1"));
        let loader = recorder.barrier().gate::<B, ()>(Arc::new(Nothing));
        for loader in [loader.to_device(&Default::default()), loader.slice(0, 0), loader] {
            assert_eq!(loader.iter().count(), 0, "there is nothing to wait for");
            recorder.barrier().update(|pending| pending + 2);
            let (begun, begins) = mpsc::channel();
            std::thread::spawn(move || begun.send(loader.iter().count()));
            Recorder::<B>::record(&recorder, 7usize, path.clone()).unwrap();
            let early = begins.recv_timeout(Duration::from_millis(100));
            assert_eq!(early, Err(mpsc::RecvTimeoutError::Timeout), "one record is still to be read");
            let broken = Recorder::<B>::record(&recorder, Broken, path.clone());
            assert!(broken.is_err_and(|e| e.to_string().contains("model-1")));
            assert_eq!(begins.recv_timeout(Duration::from_secs(60)), Ok(0));
        }
    }

    /// A bit flipped in a float used to be read as another float.
    #[test]
    fn a_damaged_record_is_an_error_that_names_the_file() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, device) = (AtomicRecorder::default(), Default::default());
        let (record, file) = (dir.path().join("model-1"), dir.path().join("model-1.mpk"));
        let param = || Param::from_tensor(Tensor::<B, 1>::full([3], 1.0, &device));
        Recorder::<B>::record(&recorder, param().into_record(), record.clone()).unwrap();
        AtomicRecorder::verify(&record).unwrap();
        // Burn's own recorder reads the file, too
        let plain = burn::record::NamedMpkFileRecorder::<FullPrecisionSettings>::new();
        let read: Param<Tensor<B, 1>> = Recorder::<B>::load(&plain, record.clone(), &device).unwrap();
        assert_eq!(read.val().into_data(), param().val().into_data());

        let whole = fs::read(&file).unwrap();
        // 1.0 in single precision, little-endian
        let one = whole.windows(4).position(|bytes| bytes == 1f32.to_le_bytes()).unwrap();
        let mut flipped = whole.clone();
        flipped[one] ^= 1;
        for (bytes, says) in [
            (flipped.as_slice(), "does not match"),
            (&whole[..whole.len() - 1], "no checksum"),
            (&[1, 2, 3], "no checksum"),
        ] {
            fs::write(&file, bytes).unwrap();
            let error = AtomicRecorder::verify(&record).unwrap_err().to_string();
            assert!(error.contains("model-1.mpk") && error.contains(says), "{error}");
            let loaded: Result<Param<Tensor<B, 1>>, _> = Recorder::<B>::load(&recorder, record.clone(), &device);
            assert!(loaded.is_err(), "{says}");
        }
        fs::remove_file(&file).unwrap();
        assert!(matches!(AtomicRecorder::verify(&record), Err(VerifyError::Read { .. })));
    }
}
