//! Damage to files: of their bytes, and of what their format calls a value.

use std::io::{Cursor, Read, Write};

use rand::rngs::StdRng;
use rand::seq::IndexedRandom;
use rand::{RngExt, SeedableRng};
use safetensors::tensor::TensorView;
use safetensors::{Dtype, SafeTensors};
use serde_json::{Value, json};
use zip::write::SimpleFileOptions;
use zip::{CompressionMethod, ZipArchive, ZipWriter};

/// Bytes and integers at the edges of their types.
const EDGES: [u64; 14] = [
    0,
    1,
    7,
    0x7f,
    0x80,
    0xff,
    0x7fff,
    0xffff,
    0x7fff_ffff,
    0x8000_0000,
    0xffff_ffff,
    1 << 40,
    i64::MAX as u64,
    u64::MAX,
];

/// Returns `file` with one to four changes, as a function of `seed` alone. `others` are files from
/// which parts are taken.
///
/// Half of the changes respect the format that the name says: the values of a JSON file or of a
/// safetensors header, the entries of a zip archive. Without that, most files would end at their
/// first check.
pub fn damaged(name: &str, file: &[u8], others: &[&[u8]], seed: u64) -> Vec<u8> {
    let mut rng = StdRng::seed_from_u64(seed);
    let mut bytes = file.to_vec();
    for _ in 0..rng.random_range(1..=4) {
        let within = rng.random_bool(0.5).then(|| within_format(name, &bytes, &mut rng)).flatten();
        bytes = within.unwrap_or_else(|| of_bytes(bytes, others, &mut rng));
    }
    bytes
}

/// Changes what the format calls a value; `None` where the bytes do not have the format.
fn within_format(name: &str, bytes: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    match name.rsplit('.').next()? {
        "json" => of_json(bytes, rng),
        "safetensors" if rng.random_bool(0.5) => of_tensors(bytes, rng),
        "safetensors" => {
            let length = u64::from_le_bytes(bytes.get(..8)?.try_into().ok()?);
            let end = usize::try_from(length).ok()?.checked_add(8)?;
            let header = of_json(bytes.get(8..end)?, rng)?;
            Some([(header.len() as u64).to_le_bytes().as_slice(), &header, &bytes[end..]].concat())
        }
        "bin" => of_archive(bytes, rng),
        _ => None,
    }
}

/// Gives one tensor of a file of safetensors another shape or name, with as many values as fit.
fn of_tensors(bytes: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let (_, header) = SafeTensors::read_metadata(bytes).ok()?;
    let file = SafeTensors::deserialize(bytes).ok()?;
    let mut all: Vec<(String, Dtype, Vec<usize>, Vec<u8>)> = vec![];
    for (name, tensor) in file.tensors() {
        all.push((name, tensor.dtype(), tensor.shape().to_vec(), tensor.data().to_vec()));
    }
    all.sort_by(|a, b| a.0.cmp(&b.0));
    let other = all.choose(rng)?.clone();
    let at = rng.random_range(0..all.len());
    let (name, dtype, shape, data) = &mut all[at];
    match rng.random_range(0..8) {
        0 => name.push('s'),
        1 => shape.reverse(),
        2 => drop(shape.pop()),
        3 => shape.insert(0, 1),
        4 => (*shape, *data) = (other.2, other.3),
        _ => {
            let axis = rng.random_range(0..shape.len().max(1));
            let size = shape.get_mut(axis)?;
            *size = [0, 1, *size + 1, *size * 2, *size / 2, size.saturating_sub(1)].choose(rng).copied()?;
        }
    }
    let values = shape.iter().product::<usize>();
    if values > 1 << 20 {
        return None;
    }
    let width = dtype.bitsize() / 8;
    *data = data.iter().copied().cycle().take(if data.is_empty() { 0 } else { values * width }).collect();
    data.resize(values * width, 0);
    let views: Result<Vec<_>, _> = all
        .iter()
        .map(|(name, dtype, shape, data)| Ok((name, TensorView::new(*dtype, shape.clone(), data)?)))
        .collect();
    let views = views.map_err(|_: safetensors::SafeTensorError| ()).ok()?;
    safetensors::serialize(views, header.metadata().clone()).ok()
}

/// Changes one value of a JSON text.
fn of_json(text: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut whole: Value = serde_json::from_slice(text).ok()?;
    let mut pointers = vec![];
    list(&whole, String::new(), &mut pointers);
    let donor = whole.pointer(pointers.choose(rng)?)?.clone();
    let pointer = pointers.choose(rng)?;
    let (parent, key) = pointer.rsplit_once('/').unwrap_or(("", ""));
    let removed = rng.random_bool(0.15) && !pointer.is_empty();
    if let (true, Some(Value::Object(map))) = (removed, whole.pointer_mut(parent)) {
        map.remove(&key.replace("~1", "/").replace("~0", "~"));
    } else {
        let value = whole.pointer_mut(pointer)?;
        *value = changed(value, donor, rng);
    }
    serde_json::to_vec(&whole).ok()
}

/// Lists the pointers to all values, the whole first.
fn list(value: &Value, at: String, pointers: &mut Vec<String>) {
    // long lists, as of a vocabulary, are known by their first values
    match value {
        Value::Object(map) => map.iter().take(400).for_each(|(key, value)| {
            list(value, format!("{at}/{}", key.replace('~', "~0").replace('/', "~1")), pointers);
        }),
        Value::Array(all) => all.iter().take(40).enumerate().for_each(|(i, value)| {
            list(value, format!("{at}/{i}"), pointers);
        }),
        _ => {}
    }
    pointers.push(at);
}

/// Returns another value: near the old one, of another kind, or found elsewhere in the text.
fn changed(old: &Value, donor: Value, rng: &mut StdRng) -> Value {
    let number = |rng: &mut StdRng| match rng.random_range(0..8) {
        0 => json!(-1),
        1 => json!(-0.5),
        2 => json!(1e308),
        3 => json!(5e-324),
        4 => json!(i64::MIN),
        5 => json!(1u64 << 32),
        _ => json!(EDGES.choose(rng).copied().unwrap_or(0)),
    };
    match (rng.random_range(0..10), old) {
        (0..=3, Value::Number(n)) => {
            let n = n.as_f64().unwrap_or(0.0);
            let near = [n + 1.0, n - 1.0, 2.0 * n, n / 2.0, -n, n * 4_294_967_296.0];
            let near = near.choose(rng).copied().unwrap_or(0.0);
            if near.fract() == 0.0 && near.abs() < 9e15 { json!(near as i64) } else { json!(near) }
        }
        (0..=3, Value::String(text)) => match rng.random_range(0..4) {
            0 => json!(text.chars().rev().collect::<String>()),
            1 => json!(format!("{text}{text}")),
            2 => json!(text.chars().skip(1).collect::<String>()),
            _ => json!("../".repeat(rng.random_range(1..4)) + text),
        },
        (0..=1, Value::Array(all)) if !all.is_empty() => {
            let mut all = all.clone();
            all.swap_remove(rng.random_range(0..all.len()));
            json!(all)
        }
        (2..=3, Value::Array(all)) => json!([all.as_slice(), all.as_slice()].concat()),
        (4..=5, _) => number(rng),
        (6..=7, _) => donor,
        (8, _) => [json!(null), json!(true), json!(""), json!([]), json!({}), json!([[]]), json!("\u{0}é…")]
            .choose(rng)
            .cloned()
            .unwrap_or_default(),
        _ => (0..rng.random_range(1..100)).fold(json!(1), |inner, _| json!([inner])),
    }
}

/// Changes the bytes of one entry of an archive, whose checksums then hold.
fn of_archive(bytes: &[u8], rng: &mut StdRng) -> Option<Vec<u8>> {
    let mut archive = ZipArchive::new(Cursor::new(bytes)).ok()?;
    let mut entries = vec![];
    for index in 0..archive.len() {
        let mut entry = archive.by_index(index).ok()?;
        let mut content = vec![];
        entry.by_ref().take(1 << 20).read_to_end(&mut content).ok()?;
        entries.push((entry.name().to_string(), content));
    }
    if entries.is_empty() {
        return None;
    }
    let chosen = rng.random_range(0..entries.len());
    if rng.random_bool(0.05) {
        entries.swap_remove(chosen);
    } else {
        let content = std::mem::take(&mut entries.get_mut(chosen)?.1);
        entries[chosen].1 = of_bytes(content, &[], rng);
    }
    let mut zip = ZipWriter::new(Cursor::new(vec![]));
    let stored = SimpleFileOptions::default().compression_method(CompressionMethod::Stored);
    for (name, content) in entries {
        zip.start_file(name, stored).ok()?;
        zip.write_all(&content).ok()?;
    }
    Some(zip.finish().ok()?.into_inner())
}

/// Changes bytes, whatever they mean.
fn of_bytes(mut bytes: Vec<u8>, others: &[&[u8]], rng: &mut StdRng) -> Vec<u8> {
    // headers lie at the start, directories at the end
    let place = |len: usize, rng: &mut StdRng| match rng.random_range(0..4) {
        0 => rng.random_range(0..len.clamp(1, 64)),
        1 => len.saturating_sub(rng.random_range(1..=len.clamp(1, 64))),
        _ => rng.random_range(0..len.max(1)),
    };
    let at = place(bytes.len(), rng);
    let most = 1 << rng.random_range(0..10);
    let length = rng.random_range(0..=(bytes.len() - at).min(most));
    match rng.random_range(0..8) {
        0 | 1 if !bytes.is_empty() => bytes[at] ^= 1 << rng.random_range(0..8),
        2 | 3 => {
            let value = EDGES.choose(rng).copied().unwrap_or(0);
            let width = [1, 2, 4, 8][rng.random_range(0..4)];
            let (little, big) = (value.to_le_bytes(), value.to_be_bytes());
            let new = if rng.random_bool(0.5) { &little[..width] } else { &big[8 - width..] };
            bytes.iter_mut().skip(at).zip(new).for_each(|(byte, &new)| *byte = new);
        }
        4 => bytes.truncate(at),
        5 => drop(bytes.drain(at..at + length)),
        6 => {
            let part = bytes[at..at + length].to_vec();
            let to = place(bytes.len(), rng).min(bytes.len());
            bytes.splice(to..to, part);
        }
        _ => {
            let Some(other) = others.choose(rng).filter(|other| !other.is_empty()) else { return bytes };
            let from = rng.random_range(0..other.len());
            let part = other[from..].iter().copied().take(1 << rng.random_range(0..10)).collect::<Vec<_>>();
            bytes.splice(at..at + length, part);
        }
    }
    bytes
}
