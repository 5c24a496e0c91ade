//! Checkpoints that are whole or absent, and of the state that they were asked for in.

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

use crate::artifacts::write_atomic;

/// Records at full precision into named MessagePack files, as Burn's default recorder does, but writes each beside its place
/// and renames it: whenever the program or the machine stops, the file there is a complete one.
#[derive(Clone, Debug, Default)]
pub struct AtomicRecorder {
    bytes: NamedMpkBytesRecorder<FullPrecisionSettings>,
    unread: Unread,
}

impl AtomicRecorder {
    /// The records that are still to be read from their tensors, of this recorder and all its clones.
    pub fn unread(&self) -> Unread {
        self.unread.clone()
    }
}

/// Records that were asked for and are still to be read from their tensors.
///
/// burn-train reads them in threads of its own, while the next epoch begins. With fusion a tensor that training takes in the meantime is gone
/// (`Should have handle for tensor`, <https://github.com/tracel-ai/burn/issues/4347>), so that epoch [waits](Self::before_epochs),
/// for the reading alone, not for the files.
#[derive(Clone, Debug, Default)]
pub struct Unread(Arc<(Mutex<usize>, Condvar)>);

impl Unread {
    fn change(&self, change: impl FnOnce(usize) -> usize) {
        let (count, changed) = &*self.0;
        let mut count = count.lock().unwrap_or_else(|e| e.into_inner());
        *count = change(*count);
        changed.notify_all();
    }

    fn wait(&self) {
        let (count, changed) = &*self.0;
        let count = count.lock().unwrap_or_else(|e| e.into_inner());
        drop(changed.wait_while(count, |count| *count > 0));
    }

    /// A strategy that takes note of what it asks for.
    pub fn noted<S: CheckpointingStrategy>(&self, strategy: S) -> impl CheckpointingStrategy + use<S> {
        struct Noted<S>(S, Unread);
        impl<S: CheckpointingStrategy> CheckpointingStrategy for Noted<S> {
            fn checkpointing(&mut self, epoch: usize, store: &EventStoreClient) -> Vec<CheckpointingAction> {
                let actions = self.0.checkpointing(epoch, store);
                let saves = actions.iter().filter(|action| **action == CheckpointingAction::Save).count();
                // the model, the optimizer, the schedule
                self.1.change(|count| count + 3 * saves);
                actions
            }
        }
        Noted(strategy, self.clone())
    }

    /// A loader whose epochs begin when nothing is left to read.
    pub fn before_epochs<B: Backend, I: 'static>(
        &self,
        loader: Arc<dyn DataLoader<B, I>>,
    ) -> Arc<dyn DataLoader<B, I>> {
        struct Waiting<B: Backend, I>(Arc<dyn DataLoader<B, I>>, Unread);
        impl<B: Backend, I: 'static> DataLoader<B, I> for Waiting<B, I> {
            fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<I> + 'a> {
                self.1.wait();
                self.0.iter()
            }
            fn num_items(&self) -> usize {
                self.0.num_items()
            }
            fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, I>> {
                self.1.before_epochs(self.0.to_device(device))
            }
            fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, I>> {
                self.1.before_epochs(self.0.slice(start, end))
            }
        }
        Arc::new(Waiting(loader, self.clone()))
    }
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

    fn record<R: Record<B>>(&self, record: R, file: PathBuf) -> Result<(), RecorderError> {
        // Burn panics where a device does not answer, which would end the thread that writes; an error ends training
        let item = catch_unwind(AssertUnwindSafe(|| record.into_item::<FullPrecisionSettings>()));
        self.unread.change(|count| count.saturating_sub(1));
        let item = item.map_err(|_| {
            RecorderError::Unknown(format!("the state for {} could not be read from the device", file.display()))
        })?;
        Recorder::<B>::save_item(self, BurnRecord::<_, B>::new::<Self>(item), file)
    }

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
    use std::sync::mpsc;
    use std::time::Duration;

    use burn::data::dataloader::Progress;
    use burn::module::{Module, Param};
    use burn::record::PrecisionSettings;
    use burn::tensor::Tensor;
    use burn::tensor::backend::BackendTypes;
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

    /// A record whose tensors cannot be read.
    struct Broken;

    impl Record<B> for Broken {
        type Item<S: PrecisionSettings> = usize;
        fn into_item<S: PrecisionSettings>(self) -> usize {
            panic!("there is nothing to read")
        }
        fn from_item<S: PrecisionSettings>(_: usize, _: &<B as BackendTypes>::Device) -> Self {
            Self
        }
    }

    /// An epoch of nothing.
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
    fn an_epoch_begins_when_all_is_read_or_cannot_be() {
        let dir = tempfile::tempdir().unwrap();
        let (recorder, path) = (AtomicRecorder::default(), dir.path().join("model-1"));
        let loader = recorder.unread().before_epochs::<B, ()>(Arc::new(Nothing));
        for loader in [loader.to_device(&Default::default()), loader.slice(0, 0), loader] {
            assert_eq!(loader.iter().count(), 0, "there is nothing to wait for");
            recorder.unread().change(|count| count + 2);
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

    #[test]
    fn a_cut_record_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("model-1.mpk"), [1, 2, 3]).unwrap();
        let loaded: Result<Param<Tensor<B, 1>>, _> =
            Recorder::<B>::load(&AtomicRecorder::default(), dir.path().join("model-1"), &Default::default());
        assert!(loaded.is_err());
    }
}
