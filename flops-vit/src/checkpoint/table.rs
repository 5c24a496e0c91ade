//! Renaming of parameters by a table.

use burn_store::TensorSnapshot;

/// Pairs (theirs, ours) of parameter names, in the order of the forward pass.
///
/// A part `N` stands for the index of a block. Where one of our names occurs twice, the first pair
/// is used for writing.
pub type Table = &'static [(&'static str, &'static str)];

/// Returns our name of the parameter that the other library calls `key`.
pub fn to_ours(table: Table, key: &str) -> Option<String> {
    table.iter().find_map(|(theirs, ours)| rename(key, theirs, ours))
}

/// Returns the other library's name of our parameter `key`.
pub fn to_theirs(table: Table, key: &str) -> Option<String> {
    table.iter().find_map(|(theirs, ours)| rename(key, ours, theirs))
}

/// Renames a tensor.
#[must_use]
pub fn called(mut tensor: TensorSnapshot, name: &str) -> TensorSnapshot {
    tensor.path_stack = Some(name.split('.').map(String::from).collect());
    tensor
}

fn rename(key: &str, from: &str, to: &str) -> Option<String> {
    match from.split_once(".N.") {
        None => (key == from).then(|| to.into()),
        Some((before, after)) => {
            let block = key.strip_prefix(before)?.strip_prefix('.')?.strip_suffix(after)?.strip_suffix('.')?;
            let block = block.parse::<usize>().ok()?;
            Some(to.replace(".N.", &format!(".{block}.")))
        }
    }
}
