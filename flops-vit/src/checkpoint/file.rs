//! Files as bytes: read, checked, and their header sorted.

use std::collections::{BTreeMap, HashMap};
use std::fs::File;
use std::io::Read;
use std::path::Path;

use safetensors::SafeTensors;
use serde::de::DeserializeOwned;

use crate::error::CheckpointError;

/// Reads a whole file.
///
/// # Errors
/// [`CheckpointError::Read`], or [`CheckpointError::Pointer`] and [`CheckpointError::WebPage`] where
/// something else lies in its place.
pub fn read(path: &Path) -> Result<Vec<u8>, CheckpointError> {
    let bytes = std::fs::read(path).map_err(CheckpointError::Read)?;
    check_start(&bytes)?;
    Ok(bytes)
}

/// The most bytes by which [`check_start`] and [`Format::of`] know a file.
pub(super) const START: u64 = 64;

/// Refuses what a download may leave in the place of a file: a pointer of git-lfs, a web page.
pub(super) fn check_start(bytes: &[u8]) -> Result<(), CheckpointError> {
    let start = bytes.trim_ascii_start();
    let page = [b"<!doctype html".as_slice(), b"<html"];
    if start.starts_with(b"version https://git-lfs.github.com/") {
        return Err(CheckpointError::Pointer);
    }
    match page.iter().any(|tag| start.get(..tag.len()).is_some_and(|s| s.eq_ignore_ascii_case(tag))) {
        true => Err(CheckpointError::WebPage),
        false => Ok(()),
    }
}

/// The format of a file of tensors.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum Format {
    /// PyTorch's, a zip archive or older.
    Pytorch,
    /// safetensors.
    Safetensors,
}

impl Format {
    /// Tells the format of a file by its first bytes, for its name may be anything.
    ///
    /// # Errors
    /// As [`read`], and [`CheckpointError::Empty`].
    pub fn of(path: &Path) -> Result<Self, CheckpointError> {
        let mut start = vec![];
        let file = File::open(path).map_err(CheckpointError::Read)?;
        file.take(START).read_to_end(&mut start).map_err(CheckpointError::Read)?;
        check_start(&start)?;
        match start.as_slice() {
            [] => Err(CheckpointError::Empty),
            // a zip archive, a pickle
            [b'P', b'K', ..] | [0x80, 2..=5, ..] => Ok(Self::Pytorch),
            _ => Ok(Self::Safetensors),
        }
    }
}

/// Reads a JSON file.
///
/// # Errors
/// [`CheckpointError::Read`], [`CheckpointError::Json`] where it is no JSON, and
/// [`CheckpointError::Setting`] where a value has another form.
pub fn json<T: DeserializeOwned>(path: &Path) -> Result<T, CheckpointError> {
    serde_json::from_slice(&read(path)?).map_err(|e| match e.is_data() {
        true => CheckpointError::Setting(format!("a setting is not understood: {e}")),
        false => CheckpointError::Json(e.to_string()),
    })
}

/// Checks that the bytes are a whole safetensors file.
pub(super) fn check_intact(bytes: &[u8]) -> Result<(), CheckpointError> {
    if bytes.is_empty() {
        return Err(CheckpointError::Empty);
    }
    SafeTensors::deserialize(bytes).map(|_| ()).map_err(|e| CheckpointError::Malformed(e.to_string()))
}

/// Reads the metadata of a safetensors file.
pub(super) fn metadata(bytes: &[u8]) -> Result<HashMap<String, String>, CheckpointError> {
    let (_, header) = SafeTensors::read_metadata(bytes).map_err(|e| CheckpointError::Malformed(e.to_string()))?;
    Ok(header.metadata().clone().unwrap_or_default())
}

/// Sorts the entries of a safetensors file's header, so that the same model gives the same bytes.
///
/// The store writes its metadata in random order. The result is `None` where the header is
/// malformed.
pub(super) fn reproducible(bytes: &[u8]) -> Option<Vec<u8>> {
    let (length, rest) = bytes.split_first_chunk::<8>()?;
    let (header, tensors) = rest.split_at_checked(u64::from_le_bytes(*length) as usize)?;
    let header: BTreeMap<String, BTreeMap<String, serde_json::Value>> = serde_json::from_slice(header).ok()?;
    let mut header = serde_json::to_vec(&header).ok()?;
    // tensors start at a multiple of 8
    header.resize(header.len().next_multiple_of(8), b' ');
    Some([&(header.len() as u64).to_le_bytes(), header.as_slice(), tensors].concat())
}
