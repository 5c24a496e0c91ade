//! Checks of a `tokenizer.json` before the library `tokenizers` reads it: for what it would panic,
//! when it reads the file or later at a text, and for tokens that are random.

use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use serde::Deserialize;
use serde_json::Value;

/// The parts of a `tokenizer.json` that are checked.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Parts {
    normalizer: Value,
    pre_tokenizer: Value,
    post_processor: Value,
    /// Not looked at: the library panics at a value that is not JSON here.
    #[serde(rename = "decoder")]
    _decoder: Value,
    model: Model,
}

/// What of a model is checked; other kinds than BPE have no merges.
#[derive(Default, Deserialize)]
#[serde(default)]
struct Model {
    continuing_subword_prefix: Value,
    merges: Value,
    dropout: Value,
}

/// A token that a text gets from its template, by name and id.
pub(super) type Added = (String, u64);

/// Checks the contents of a `tokenizer.json`, and returns the tokens that its template adds.
///
/// # Errors
/// What is wrong, and what to do about it.
pub(super) fn check(json: &[u8]) -> Result<Vec<Added>, String> {
    let parts: Parts =
        serde_json::from_slice(json).map_err(|e| format!("it is not understood ({e}); fetch it again"))?;
    every(&parts.normalizer, &mut charsmap)?;
    every(&parts.pre_tokenizer, &mut |part| match part.get("length").and_then(Value::as_u64) {
        Some(0) => Err("its pre_tokenizer cuts texts into pieces of length = 0; use at least 1".into()),
        _ => Ok(()),
    })?;
    merges(&parts.model)?;
    if parts.model.dropout.as_f64().is_some_and(|dropout| dropout > 0.0) {
        let dropout = &parts.model.dropout;
        return Err(format!("its model has dropout = {dropout}, so that a text's tokens are random; set it to null"));
    }
    let mut added = vec![];
    every(&parts.post_processor, &mut |part| {
        template(part, &mut added)?;
        // BertProcessing and RobertaProcessing
        let names = ["cls", "sep"].into_iter().filter_map(|name| part.get(name)?.as_array());
        added.extend(names.filter_map(|pair| Some((pair.first()?.as_str()?.to_string(), pair.get(1)?.as_u64()?))));
        Ok(())
    })?;
    Ok(added)
}

/// Applies a check to a value and all that it holds.
fn every(value: &Value, check: &mut impl FnMut(&Value) -> Result<(), String>) -> Result<(), String> {
    check(value)?;
    match value {
        Value::Array(values) => values.iter().try_for_each(|value| every(value, check)),
        Value::Object(values) => values.values().try_for_each(|value| every(value, check)),
        _ => Ok(()),
    }
}

/// Checks `TemplateProcessing`, and adds its special tokens to `added`.
fn template(part: &Value, added: &mut Vec<Added>) -> Result<(), String> {
    let Some(known) = part.get("special_tokens").and_then(Value::as_object) else { return Ok(()) };
    for name in ["single", "pair"] {
        for piece in part.get(name).and_then(Value::as_array).into_iter().flatten() {
            let text = |key: &str, of: &str| piece.get(key)?.get(of)?.as_str().map(String::from);
            if let Some(token) = text("SpecialToken", "id").filter(|token| !known.contains_key(token)) {
                let remedy = "add it there, with its id";
                return Err(format!(
                    "its template '{name}' has the token {token}, which special_tokens lacks; {remedy}"
                ));
            }
            if name == "single" && text("Sequence", "id").as_deref() == Some("B") {
                return Err("its template 'single' has a place for a second text, B; use A alone".into());
            }
            let types =
                ["SpecialToken", "Sequence"].into_iter().find_map(|key| piece.get(key)?.get("type_id")?.as_u64());
            if let (Some(1..), "single") = (types, name) {
                let found = types.unwrap_or_default();
                return Err(format!("its template 'single' has type_id = {found}; only the token type 0 is supported"));
            }
        }
    }
    for (name, token) in known {
        let list = |key: &str| token.get(key).and_then(Value::as_array).map_or(&[] as &[Value], Vec::as_slice);
        let (ids, tokens) = (list("ids"), list("tokens"));
        if ids.len() != tokens.len() {
            let (ids, tokens) = (ids.len(), tokens.len());
            return Err(format!("its special token {name} has {ids} ids and {tokens} tokens; give one for each"));
        }
        added.extend(ids.iter().filter_map(|id| Some((name.clone(), id.as_u64()?))));
    }
    Ok(())
}

/// Checks that the second part of each merge has the prefix that the library cuts off.
fn merges(model: &Model) -> Result<(), String> {
    let (Some(prefix), Some(merges)) = (model.continuing_subword_prefix.as_str(), model.merges.as_array()) else {
        return Ok(());
    };
    for merge in merges {
        let second = match merge {
            Value::String(both) => both.split(' ').nth(1),
            pair => pair.get(1).and_then(Value::as_str),
        };
        if let Some(second) = second.filter(|second| second.get(prefix.len()..).is_none()) {
            let remedy = "fetch it again";
            return Err(format!("its merge {merge} has '{second}', without the subword prefix '{prefix}'; {remedy}"));
        }
    }
    Ok(())
}

/// Checks the character map of a `Precompiled` normaliser: a double array of SentencePiece's, and
/// the texts that it maps to.
fn charsmap(part: &Value) -> Result<(), String> {
    let found = match (part.get("precompiled_charsmap"), part.get("type").and_then(Value::as_str)) {
        (Some(found), _) => found,
        (None, Some("Precompiled")) => &Value::Null,
        _ => return Ok(()),
    };
    let damaged = |why: &str| Err(format!("its precompiled_charsmap {why}; fetch it again"));
    let Some(bytes) = found.as_str().and_then(|text| STANDARD.decode(text).ok()) else {
        return damaged("is no base64");
    };
    let Some((size, rest)) = bytes.split_first_chunk::<4>() else { return damaged("is empty") };
    let Some((units, texts)) = rest.split_at_checked(u32::from_le_bytes(*size) as usize / 4 * 4) else {
        return damaged("is cut off");
    };
    let units: Vec<usize> =
        units.chunks_exact(4).map(|b| u32::from_le_bytes([b[0], b[1], b[2], b[3]]) as usize).collect();
    match std::str::from_utf8(texts) {
        Ok(texts) if stays_inside(&units, texts) => Ok(()),
        _ => damaged("is damaged"),
    }
}

/// Whether no walk through the double array leaves it, and all that it maps to are texts.
///
/// The layout is Darts': a unit has a label in its lowest byte, where its children are, and whether
/// one of them is a value.
fn stays_inside(units: &[usize], texts: &str) -> bool {
    let children = |place: usize| place ^ ((units[place] >> 10) << ((units[place] & (1 << 9)) >> 6));
    let mut seen = vec![false; units.len()];
    let mut waiting = match units.is_empty() {
        true => return false,
        false => vec![children(0)],
    };
    while let Some(place) = waiting.pop() {
        // any byte of a text may follow
        if place | 0xff >= units.len() {
            return false;
        }
        if std::mem::replace(&mut seen[place], true) {
            continue;
        }
        for byte in 1..=0xff {
            let unit = units[place ^ byte];
            if unit & ((1 << 31) | 0xff) != byte {
                continue;
            }
            let next = children(place ^ byte);
            let value =
                if (unit >> 8) & 1 == 1 { units.get(next).map(|value| value & ((1 << 31) - 1)) } else { Some(0) };
            if !value.is_some_and(|value| texts.is_char_boundary(value)) {
                return false;
            }
            waiting.push(next);
        }
    }
    true
}

#[cfg(test)]
mod tests;
