//! Files that `torch.save` wrote, read to the last stride.
//!
//! A tensor is a view of a storage: it has an offset, a size and a stride. All of them are
//! followed, and a storage that is missing or has another length is an error. The pickle that
//! describes the tensors is read as data ([`Pickle`]): nothing in it is executed.

mod pickle;
mod storage;

use std::cell::Cell;
use std::collections::BTreeMap;
use std::path::Path;
use std::rc::Rc;

use burn::tensor::{Bytes, TensorData};
use burn_store::{TensorSnapshot, TensorSnapshotError};

use pickle::{Id, Object, Pickle};
use storage::{Storage, Storages};

use crate::error::PytorchError;

/// Keys under which training scripts save the weights beside other things, such as an optimizer's
/// state or a running mean of the weights.
const NESTED: [&str; 3] = ["state_dict", "model", "model_state_dict"];
/// The deepest dictionary whose tensors are read.
const DEEPEST: usize = 8;
/// The longest key of a tensor, in bytes.
const LONGEST_NAME: usize = 1000;

/// Reads the tensors of a file in the order of their names; their values are read later.
///
/// They are those of the dictionary in the file, or of the one that it holds under one of the keys
/// [`NESTED`], or else of the only one in it that has tensors.
pub(super) fn read(path: &Path) -> Result<Vec<TensorSnapshot>, PytorchError> {
    let (storages, pickle) = Storages::open(path)?;
    // dictionaries may be in each other over and over; in a healthy file each is looked at twice
    let left = Cell::new(4 * pickle.objects().len());
    let (storages, reader) = (Rc::new(storages), Reader { pickle: &pickle, left });
    let whole = reader.items(pickle.root).ok_or_else(|| reader.no_state_dict())?;
    let nested = NESTED.iter().find_map(|key| reader.state_dict(reader.find(whole, key)?));
    let views = match nested {
        Some(views) => views,
        None => reader.of_whole(whole)?,
    };
    if reader.left.get() == 0 {
        return Err(PytorchError::Pickle { at: 0, why: "its dictionaries are in each other over and over" });
    }
    let tensor = |(name, view): (String, Result<View, String>)| {
        let checked = view.and_then(|view| {
            storages.check(&view.storage)?;
            view.check()?;
            Ok(view)
        });
        match checked {
            Ok(view) => Ok(view.snapshot(&name, storages.clone())),
            Err(why) => Err(PytorchError::Tensor { name, why }),
        }
    };
    views.into_iter().map(tensor).collect()
}

/// The objects of a file as dictionaries and tensors.
struct Reader<'a> {
    pickle: &'a Pickle,
    /// How many items of dictionaries are still looked at.
    left: Cell<usize>,
}

/// The tensors of a dictionary by their names, or what is wrong with each.
type Views = BTreeMap<String, Result<View, String>>;

impl Reader<'_> {
    fn items(&self, id: Id) -> Option<&[(Id, Id)]> {
        match self.pickle.get(id) {
            Object::Dict(items) => Some(items),
            _ => None,
        }
    }

    fn find(&self, items: &[(Id, Id)], key: &str) -> Option<Id> {
        // as in Python the last of equal keys counts
        items.iter().rev().find(|(name, _)| self.pickle.text(*name) == Some(key)).map(|(_, value)| *value)
    }

    /// Returns the tensors of the dictionary in the file, or those of the only one in it.
    fn of_whole(&self, whole: &[(Id, Id)]) -> Result<Views, PytorchError> {
        let own = whole.iter().any(|&(_, value)| self.view(value).is_some());
        let inside = |&(key, value): &(Id, Id)| Some((self.pickle.text(key)?, self.state_dict(value)?));
        let mut inside: Vec<(&str, Views)> = if own { vec![] } else { whole.iter().filter_map(inside).collect() };
        match inside.len() {
            0 => self.state_dict(self.pickle.root).ok_or_else(|| self.no_tensors(whole)),
            1 => Ok(inside.remove(0).1),
            _ => {
                let keys: Vec<&str> = inside.iter().map(|(key, _)| *key).take(10).collect();
                Err(PytorchError::Ambiguous { keys: keys.join(", ") })
            }
        }
    }

    /// Returns the tensors of a dictionary, and of those in it, with their keys joined by dots;
    /// `None` where there are none.
    fn state_dict(&self, id: Id) -> Option<Views> {
        let mut views = Views::new();
        self.collect(id, "", DEEPEST, &mut views);
        (!views.is_empty()).then_some(views)
    }

    fn collect(&self, id: Id, prefix: &str, depth: usize, views: &mut Views) {
        let Some(items) = self.items(id).filter(|_| depth > 0) else { return };
        for &(key, value) in items {
            self.left.set(self.left.get().saturating_sub(1));
            if self.left.get() == 0 {
                return;
            }
            let Some(key) = self.pickle.text(key) else { continue };
            let short = key.get(..LONGEST_NAME.min(key.len())).unwrap_or("?");
            let name = format!("{prefix}{short}");
            match self.view(value) {
                Some(_) if short.len() < key.len() => {
                    views.insert(name, Err(format!("has a name of {} bytes", key.len())));
                }
                // as in Python the last of equal keys counts
                Some(view) => drop(views.insert(name, view)),
                None => self.collect(value, &format!("{name}."), depth - 1, views),
            }
        }
    }

    /// Reads a tensor; `None` where the object is none.
    fn view(&self, mut id: Id) -> Option<Result<View, String>> {
        // a parameter or a subclass around a tensor
        for _ in 0..4 {
            let &Object::Call { function, arguments } = self.pickle.get(id) else { return None };
            let (name, arguments) = (self.pickle.global(function)?, self.pickle.list(arguments)?);
            match (name, arguments) {
                ("torch._utils._rebuild_tensor_v2" | "torch._utils._rebuild_tensor", arguments) => {
                    return Some(self.tensor(arguments));
                }
                ("torch._utils._rebuild_parameter" | "torch._utils._rebuild_parameter_with_state", &[data, ..]) => {
                    id = data;
                }
                (other, _) if other.starts_with("torch.") && other.contains("_rebuild") => {
                    return Some(Err(format!("is made by {other}, which is not read")));
                }
                _ => return None,
            }
        }
        Some(Err("is wrapped too often".into()))
    }

    /// Reads the arguments of a tensor: storage, offset, size, stride.
    fn tensor(&self, arguments: &[Id]) -> Result<View, String> {
        let &[storage, offset, shape, stride, ..] = arguments else { return Err("has too few arguments".into()) };
        let storage = Storage::read(self.pickle, self.pickle.get(storage))?;
        let numbers = (self.pickle.size(offset), self.pickle.sizes(shape), self.pickle.sizes(stride));
        let (Some(offset), Some(shape), Some(stride)) = numbers else {
            return Err("has an offset, a size or a stride that is no number of at least 0".into());
        };
        Ok(View { storage, offset, shape, stride })
    }

    fn no_state_dict(&self) -> PytorchError {
        let class = |id: Id| self.pickle.global(id).unwrap_or("an unknown class").to_string();
        let found = match self.pickle.get(self.pickle.root) {
            _ if self.view(self.pickle.root).is_some() => "a single tensor".into(),
            &Object::Call { function, .. } => format!("an object of {}", class(function)),
            Object::List(_) => "a list".into(),
            _ => "a single value".into(),
        };
        PytorchError::NoStateDict { found }
    }

    fn no_tensors(&self, items: &[(Id, Id)]) -> PytorchError {
        let keys: Vec<&str> = items.iter().filter_map(|(key, _)| self.pickle.text(*key)).take(10).collect();
        PytorchError::NoTensors { keys: if keys.is_empty() { "none".into() } else { keys.join(", ") } }
    }
}

/// A tensor as a view of a storage.
#[derive(Clone, Debug)]
struct View {
    storage: Storage,
    /// The first value, in values from the start of the storage.
    offset: usize,
    shape: Vec<usize>,
    /// Values from one index of an axis to the next.
    stride: Vec<usize>,
}

impl View {
    /// Checks that all its values lie in the storage.
    fn check(&self) -> Result<(), String> {
        let Self { storage, offset, shape, stride } = self;
        if shape.len() != stride.len() {
            return Err(format!("is {shape:?} with the stride {stride:?}"));
        }
        let count = shape.iter().try_fold(1usize, |count, &size| count.checked_mul(size));
        let last = shape
            .iter()
            .zip(stride)
            .try_fold(*offset, |last, (&size, &stride)| last.checked_add(size.saturating_sub(1).checked_mul(stride)?));
        match (count, last) {
            (Some(0), _) => Ok(()),
            // an expanded tensor repeats values; a module holds none, and a hostile one any number
            (Some(count), Some(last)) if last < storage.count && count <= storage.count => Ok(()),
            _ => Err(format!(
                "is {shape:?} with the stride {stride:?} from value {offset} on, and its storage has {} values",
                storage.count
            )),
        }
    }

    fn snapshot(self, name: &str, storages: Rc<Storages>) -> TensorSnapshot {
        let (dtype, shape) = (self.storage.dtype, self.shape.clone());
        let values = move || {
            let bytes = storages.bytes(&self.storage);
            let bytes = bytes.map_err(|e| TensorSnapshotError::DataError(e.to_string()))?;
            Ok(self.gather(&bytes))
        };
        let path = name.split('.').map(String::from).collect();
        TensorSnapshot::from_closure(Rc::new(values), dtype, shape.into(), path, vec![], Default::default())
    }

    /// Returns its values in the order of its indices, from the bytes of the storage.
    fn gather(&self, storage: &[u8]) -> TensorData {
        let (size, dtype) = (self.storage.dtype.size(), self.storage.dtype);
        let count = self.shape.iter().product::<usize>();
        let data = |bytes| TensorData { bytes: Bytes::from_bytes_vec(bytes), shape: self.shape.clone().into(), dtype };
        if self.is_contiguous() {
            return data(storage[self.offset * size..][..count * size].to_vec());
        }
        let mut bytes = Vec::with_capacity(count * size);
        let mut index = vec![0; self.shape.len()];
        let mut at = self.offset;
        for _ in 0..count {
            bytes.extend_from_slice(&storage[at * size..(at + 1) * size]);
            // the next index, the last axis first
            for axis in (0..index.len()).rev() {
                index[axis] += 1;
                at += self.stride[axis];
                if index[axis] < self.shape[axis] {
                    break;
                }
                at -= self.shape[axis] * self.stride[axis];
                index[axis] = 0;
            }
        }
        data(bytes)
    }

    /// Returns whether its values lie in the order of its indices.
    fn is_contiguous(&self) -> bool {
        let mut expected = 1;
        self.shape.iter().zip(&self.stride).rev().all(|(&size, &stride)| {
            let fits = size <= 1 || stride == expected;
            expected *= size;
            fits
        })
    }
}

#[cfg(test)]
mod tests;
