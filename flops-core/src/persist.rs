//! Plain values that live inside a module and inside its checkpoints.

use std::fmt::Debug;
use std::marker::PhantomData;

use burn::module::{
    AutodiffModule, Content, Devices, Module, ModuleDisplay, ModuleDisplayDefault, ModuleMapper, ModuleVisitor,
};
use burn::prelude::Backend;
use burn::record::{PrecisionSettings, Record};
use burn::tensor::backend::AutodiffBackend;
use serde::{Serialize, de::DeserializeOwned};

/// A serialisable value as a field of a Burn module.
///
/// Fields marked `#[module(skip)]` are lost when a checkpoint is loaded. A `Persist` field is
/// written into the record and read back, at full precision whatever the recorder's precision is.
/// Parameters beside it are not, so a record in half precision warns. It has no parameters and no device. The backend in its type makes `#[derive(Module)]` treat the
/// field as a module.
///
/// ```
/// use burn::prelude::*;
/// use flops_core::persist::Persist;
///
/// #[derive(Module, Debug)]
/// struct Counter<B: Backend> {
///     weight: burn::module::Param<Tensor<B, 1>>,
///     steps: Persist<B, u64>,
/// }
/// ```
#[derive(Clone, Debug)]
pub struct Persist<B: Backend, T> {
    /// The value.
    pub value: T,
    backend: PhantomData<B>,
}

impl<B: Backend, T> Persist<B, T> {
    /// Wraps a value.
    pub fn new(value: T) -> Self {
        Self { value, backend: PhantomData }
    }
}

/// What a record in half precision says. It is as large as the recorder makes it, and no error.
const HALF: &str = "this record rounds parameters of 32 bits to 16: a run that resumes from it does not keep its \
                    bits; save at full precision, as by AtomicRecorder or FullPrecisionSettings, to go on exactly";

/// Record of a [`Persist`]: the value itself. One in half precision warns through `log` that the
/// parameters beside it lose bits.
#[derive(Clone, Debug)]
pub struct PersistRecord<T>(pub T);

impl<B: Backend, T: Serialize + DeserializeOwned + Clone + Send> Record<B> for PersistRecord<T> {
    type Item<S: PrecisionSettings> = T;

    fn into_item<S: PrecisionSettings>(self) -> T {
        if size_of::<S::FloatElem>() < size_of::<f32>() {
            log::warn!("{HALF}");
        }
        self.0
    }

    fn from_item<S: PrecisionSettings>(item: T, _: &B::Device) -> Self {
        Self(item)
    }
}

impl<B, T> Module<B> for Persist<B, T>
where
    B: Backend,
    T: Serialize + DeserializeOwned + Clone + Send + Debug,
{
    type Record = PersistRecord<T>;

    fn collect_devices(&self, devices: Devices<B>) -> Devices<B> {
        devices
    }

    fn fork(self, _: &B::Device) -> Self {
        self
    }

    fn to_device(self, _: &B::Device) -> Self {
        self
    }

    fn visit<V: ModuleVisitor<B>>(&self, _: &mut V) {}

    fn map<M: ModuleMapper<B>>(self, _: &mut M) -> Self {
        self
    }

    fn load_record(self, record: Self::Record) -> Self {
        Self::new(record.0)
    }

    fn into_record(self) -> Self::Record {
        PersistRecord(self.value)
    }
}

impl<B, T> AutodiffModule<B> for Persist<B, T>
where
    B: AutodiffBackend,
    T: Serialize + DeserializeOwned + Clone + Send + Debug,
{
    type InnerModule = Persist<B::InnerBackend, T>;

    fn valid(&self) -> Self::InnerModule {
        Persist::new(self.value.clone())
    }

    fn from_inner(module: Self::InnerModule) -> Self {
        Self::new(module.value)
    }
}

impl<B: Backend, T> ModuleDisplayDefault for Persist<B, T> {
    fn content(&self, content: Content) -> Option<Content> {
        content.add_formatted(&"Persist").optional()
    }
}

impl<B: Backend, T> ModuleDisplay for Persist<B, T> {}

#[cfg(test)]
mod tests {
    use std::sync::Mutex;

    use burn::record::{DoublePrecisionSettings, FullPrecisionSettings, HalfPrecisionSettings};

    use super::*;

    static SAID: Mutex<Vec<String>> = Mutex::new(vec![]);

    struct Listener;

    impl log::Log for Listener {
        fn enabled(&self, _: &log::Metadata) -> bool {
            true
        }
        fn log(&self, record: &log::Record) {
            SAID.lock().unwrap().push(record.args().to_string());
        }
        fn flush(&self) {}
    }

    #[test]
    fn a_record_in_half_precision_says_that_bits_are_lost() {
        type B = burn::backend::Flex;
        fn warnings<S: PrecisionSettings>() -> usize {
            let item = Record::<B>::into_item::<S>(PersistRecord(0.1f64));
            assert_eq!(item, 0.1);
            SAID.lock().unwrap().iter().filter(|said| *said == HALF).count()
        }
        log::set_logger(&Listener).unwrap();
        log::set_max_level(log::LevelFilter::Warn);
        assert_eq!((warnings::<FullPrecisionSettings>(), warnings::<DoublePrecisionSettings>()), (0, 0));
        assert_eq!(warnings::<HalfPrecisionSettings>(), 1);
    }
}
