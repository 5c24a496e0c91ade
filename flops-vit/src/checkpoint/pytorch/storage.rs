//! The storages of a file: where the values of its tensors lie.

use std::cell::RefCell;
use std::collections::BTreeMap;
use std::fs::File;
use std::io::{BufReader, Read, Seek, SeekFrom};
use std::path::Path;
use std::rc::Rc;

use burn::tensor::DType;
use zip::ZipArchive;
use zip::result::ZipError;

use super::pickle::{LONGEST, Object, Pickle};
use crate::error::PytorchError;

/// The start of a file in the format before PyTorch 1.6: a pickled number.
const MAGIC: [u8; 15] = [0x80, 2, 0x8a, 10, 0x6c, 0xfc, 0x9c, 0x46, 0xf9, 0x20, 0x6a, 0xa8, 0x50, 0x19, b'.'];

/// The storage of a tensor, as its pickle describes it.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Storage {
    /// Its name in the file.
    pub key: String,
    /// The type of its values.
    pub dtype: DType,
    /// The number of its values.
    pub count: usize,
}

impl Storage {
    /// Reads the description of a storage: ('storage', class, key, device, count).
    pub fn read(pickle: &Pickle, object: &Object) -> Result<Self, String> {
        let Object::Outside(description) = object else { return Err("has no storage".into()) };
        let parts = pickle.list(*description).unwrap_or_default();
        let &[kind, class, key, _device, count, ref view @ ..] = parts else {
            return Err("has a storage of an unknown form".into());
        };
        // the sixth part of the older format is a view of another storage
        let whole = view.iter().all(|&id| *pickle.get(id) == Object::Other);
        match (pickle.text(kind), pickle.global(class), pickle.text(key), pickle.size(count)) {
            (Some("storage"), Some(class), Some(key), Some(count)) if whole => {
                let dtype = dtype(class).ok_or_else(|| format!("holds values of {class}, which are not read"))?;
                Ok(Self { key: key.into(), dtype, count })
            }
            _ => Err("has a storage of an unknown form".into()),
        }
    }

    /// Returns the number of its bytes.
    fn bytes(&self) -> Option<usize> {
        self.count.checked_mul(self.dtype.size())
    }
}

/// Returns the type of the values in a class of storages.
fn dtype(class: &str) -> Option<DType> {
    Some(match class.strip_prefix("torch.")? {
        "FloatStorage" => DType::F32,
        "DoubleStorage" => DType::F64,
        "HalfStorage" => DType::F16,
        "BFloat16Storage" => DType::BF16,
        "LongStorage" => DType::I64,
        "IntStorage" => DType::I32,
        "ShortStorage" => DType::I16,
        "CharStorage" => DType::I8,
        "ByteStorage" => DType::U8,
        // as bytes of 0 and 1
        "BoolStorage" => DType::U8,
        _ => return None,
    })
}

/// A file with its storages.
pub(super) struct Storages {
    place: Place,
    /// The storage that was read last: tensors may share one.
    last: RefCell<Option<(String, Rc<[u8]>)>>,
}

/// Where storages lie.
enum Place {
    /// In a zip archive, a file each in this folder.
    Archive { archive: RefCell<ZipArchive<BufReader<File>>>, folder: String },
    /// One after the other, behind the pickles: their first bytes by their keys.
    Behind { file: RefCell<BufReader<File>>, starts: BTreeMap<String, u64> },
}

impl Storages {
    /// Opens a file. Returns its storages, and the pickle that describes its tensors.
    pub fn open(path: &Path) -> Result<(Self, Pickle), PytorchError> {
        let mut file = BufReader::new(File::open(path)?);
        let mut start = vec![];
        file.by_ref().take(MAGIC.len() as u64).read_to_end(&mut start)?;
        let (place, pickle) = if start.starts_with(b"PK") {
            of_archive(file)?
        } else if start == MAGIC {
            of_older_format(file)?
        } else {
            return Err(if start.first() == Some(&0x80) { PytorchError::PlainPickle } else { PytorchError::Unknown });
        };
        Ok((Self { place, last: RefCell::default() }, pickle))
    }

    /// Checks that the file has a storage, and as many bytes of it as its tensors need.
    pub fn check(&self, storage: &Storage) -> Result<(), String> {
        let expected = storage.bytes().ok_or("is larger than any memory")? as u64;
        let found = match &self.place {
            Place::Archive { archive, folder } => {
                let mut archive = archive.borrow_mut();
                let entry = archive.by_name(&format!("{folder}data/{}", storage.key));
                entry.map_err(|e| format!("has no data in the file: storage {}, {e}", storage.key))?.size()
            }
            // its bytes were counted when the file was opened
            Place::Behind { starts, .. } if starts.contains_key(&storage.key) => expected,
            Place::Behind { .. } => return Err(format!("has no data in the file: storage {}", storage.key)),
        };
        if found == expected {
            return Ok(());
        }
        Err(format!("needs {expected} bytes, and its storage {} has {found}", storage.key))
    }

    /// Reads the bytes of a storage, which has been checked.
    pub fn bytes(&self, storage: &Storage) -> Result<Rc<[u8]>, PytorchError> {
        if let Some((key, bytes)) = &*self.last.borrow()
            && *key == storage.key
        {
            return Ok(bytes.clone());
        }
        let length = storage.bytes().unwrap_or(usize::MAX);
        let bytes = match &self.place {
            Place::Archive { archive, folder } => {
                let mut archive = archive.borrow_mut();
                let entry = archive.by_name(&format!("{folder}data/{}", storage.key)).map_err(damaged)?;
                // one more, so that the end is reached and the checksum compared
                exactly(entry, length, length as u64 + 1)?
            }
            Place::Behind { file, starts } => {
                let mut file = file.borrow_mut();
                file.seek(SeekFrom::Start(starts.get(&storage.key).copied().unwrap_or(u64::MAX)))?;
                exactly(&mut *file, length, length as u64)?
            }
        };
        *self.last.borrow_mut() = Some((storage.key.clone(), bytes.clone()));
        Ok(bytes)
    }
}

/// Reads at most `most` bytes, which have to be `length` bytes.
fn exactly(source: impl Read, length: usize, most: u64) -> Result<Rc<[u8]>, PytorchError> {
    let mut bytes = vec![];
    source.take(most).read_to_end(&mut bytes)?;
    if bytes.len() != length {
        return Err(PytorchError::Archive(format!("a storage has {} bytes instead of {length}", bytes.len())));
    }
    Ok(bytes.into())
}

fn damaged(error: ZipError) -> PytorchError {
    PytorchError::Archive(error.to_string())
}

/// Reads a zip archive: `NAME/data.pkl`, `NAME/byteorder`, and the storages in `NAME/data`.
fn of_archive(file: BufReader<File>) -> Result<(Place, Pickle), PytorchError> {
    let mut archive = ZipArchive::new(file).map_err(damaged)?;
    let folder = archive.file_names().find_map(|name| {
        let folder = name.strip_suffix("data.pkl")?;
        (folder.is_empty() || folder.find('/') == Some(folder.len() - 1)).then(|| folder.to_string())
    });
    let folder = folder.ok_or_else(|| PytorchError::NoEntry("data.pkl".into()))?;
    let order = match archive.by_name(&format!("{folder}byteorder")) {
        Ok(entry) => {
            let mut order = vec![];
            entry.take(16).read_to_end(&mut order)?;
            order
        }
        // older versions do not write it
        Err(ZipError::FileNotFound) => b"little".to_vec(),
        Err(error) => return Err(damaged(error)),
    };
    if order.trim_ascii() != b"little" {
        return Err(PytorchError::BigEndian);
    }
    let bytes = {
        let entry = archive.by_name(&format!("{folder}data.pkl")).map_err(damaged)?;
        let length = entry.size();
        if length > LONGEST as u64 {
            return Err(PytorchError::LongPickle { bytes: length, limit: LONGEST });
        }
        exactly(entry, length as usize, length + 1)?
    };
    let pickle = Pickle::read(&bytes)?;
    Ok((Place::Archive { archive: RefCell::new(archive), folder }, pickle))
}

/// Reads the format before PyTorch 1.6: pickles of a magic number, a version, the machine, the
/// tensors and the keys of the storages. Each storage follows, behind the number of its values.
fn of_older_format(mut file: BufReader<File>) -> Result<(Place, Pickle), PytorchError> {
    file.seek(SeekFrom::Start(0))?;
    let mut bytes = vec![];
    file.by_ref().take(LONGEST as u64).read_to_end(&mut bytes)?;
    let mut at = 0;
    let mut next = || {
        let pickle = Pickle::read(&bytes[at..])?;
        at += pickle.length;
        Ok::<_, PytorchError>(pickle)
    };
    let [_magic, _version, machine, tensors, keys] = [next()?, next()?, next()?, next()?, next()?];
    little_endian(&machine)?;
    let mut described = BTreeMap::new();
    for object in tensors.objects() {
        if matches!(object, Object::Outside(_)) {
            let storage = Storage::read(&tensors, object);
            let storage = storage.map_err(|why| PytorchError::Tensor { name: "?".into(), why })?;
            let other = described.insert(storage.key.clone(), storage.clone()).filter(|other| *other != storage);
            if other.is_some() {
                return Err(PytorchError::Archive(format!("storage {} is described in two ways", storage.key)));
            }
        }
    }
    let cut = || PytorchError::Archive("the file ends inside a storage".into());
    let end = file.seek(SeekFrom::End(0))?;
    let (mut place, mut starts) = (at as u64, BTreeMap::new());
    for &key in keys.list(keys.root).unwrap_or_default() {
        let key = keys.text(key).unwrap_or_default();
        let Some(storage) = described.get(key) else {
            return Err(PytorchError::NoEntry(format!("tensor of storage {key}")));
        };
        file.seek(SeekFrom::Start(place))?;
        let mut count = [0; 8];
        file.read_exact(&mut count).map_err(|_| cut())?;
        if u64::from_le_bytes(count) != storage.count as u64 {
            let found = u64::from_le_bytes(count);
            let why = format!("storage {key} has {found} values, and its tensors expect {}", storage.count);
            return Err(PytorchError::Archive(why));
        }
        let start = place + 8;
        place = storage.bytes().and_then(|bytes| start.checked_add(bytes as u64)).ok_or_else(cut)?;
        if place > end {
            return Err(cut());
        }
        starts.insert(key.to_string(), start);
    }
    Ok((Place::Behind { file: RefCell::new(file), starts }, tensors))
}

/// Checks the description of the machine that wrote a file.
fn little_endian(machine: &Pickle) -> Result<(), PytorchError> {
    let Object::Dict(items) = machine.get(machine.root) else { return Ok(()) };
    let order = items.iter().find(|(key, _)| machine.text(*key) == Some("little_endian"));
    match order.map(|(_, value)| machine.get(*value)) {
        Some(Object::Truth(false)) => Err(PytorchError::BigEndian),
        _ => Ok(()),
    }
}
