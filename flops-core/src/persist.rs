//! Plain values that live inside a module and inside its checkpoints.

use std::fmt::Debug;
use std::marker::PhantomData;
use std::sync::Once;

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
/// Parameters beside it are not, so a record in half precision warns, once in a program. It has no
/// parameters and no device. The backend in its type makes `#[derive(Module)]` treat the field as a
/// module.
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

/// What a record in half precision says, once in a program.
const HALF: &str = "a record writes floats in 16 bits: a run that resumes from it does not keep its bits; save at \
                    full precision to go on exactly, as by AtomicRecorder";

static SAID: Once = Once::new();

/// Whether a recorder with these settings rounds floats of single precision.
fn loses_bits<S: PrecisionSettings>() -> bool {
    size_of::<S::FloatElem>() < size_of::<f32>()
}

/// Record of a [`Persist`]: the value itself. The first in half precision warns through `log` that
/// floats beside it lose bits.
#[derive(Clone, Debug)]
pub struct PersistRecord<T>(pub T);

impl<B: Backend, T: Serialize + DeserializeOwned + Clone + Send> Record<B> for PersistRecord<T> {
    type Item<S: PrecisionSettings> = T;

    fn into_item<S: PrecisionSettings>(self) -> T {
        if loses_bits::<S>() {
            SAID.call_once(|| log::warn!("{HALF}"));
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
    use burn::record::{DoublePrecisionSettings, FullPrecisionSettings, HalfPrecisionSettings};

    use super::*;

    #[test]
    fn half_precision_loses_bits_and_the_value_does_not() {
        let losses = [
            loses_bits::<FullPrecisionSettings>(),
            loses_bits::<DoublePrecisionSettings>(),
            loses_bits::<HalfPrecisionSettings>(),
        ];
        assert_eq!(losses, [false, false, true]);
        let item = Record::<burn::backend::Flex>::into_item::<HalfPrecisionSettings>(PersistRecord(0.1f64));
        assert_eq!(item, 0.1);
    }
}
