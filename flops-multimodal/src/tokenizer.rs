//! Texts to token ids, by the `tokenizer.json` of a tower.

use std::panic::{AssertUnwindSafe, catch_unwind};
use std::path::Path;

use burn::prelude::*;
use flops_vit::checkpoint::tensors::read;
use flops_vit::error::CheckpointError;
use tokenizers::normalizers::{BertNormalizer, Lowercase, NormalizerWrapper, Sequence};
use tokenizers::{NormalizedString, Normalizer, Tokenizer};

use crate::error::MultimodalError;

mod check;

/// Token ids of texts, padded to the longest, and the mask of the padding.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Tokens {
    ids: Vec<Vec<i64>>,
    mask: Vec<Vec<i64>>,
    width: usize,
}

impl Tokens {
    /// Tokens from rows of ids and a mask of the same shape: 1 at a token, 0 at padding, in any
    /// position.
    ///
    /// # Errors
    /// If there is no row or no token, the rows differ in length, or the mask has another value.
    pub fn new(ids: Vec<Vec<i64>>, mask: Vec<Vec<i64>>) -> Result<Self, MultimodalError> {
        let width = ids.first().ok_or(MultimodalError::NoTexts)?.len();
        if width == 0 {
            return Err(MultimodalError::NoTokens { row: 0 });
        }
        for row in 0..ids.len().max(mask.len()) {
            let (ids, mask) = (ids.get(row).map_or(0, Vec::len), mask.get(row).map_or(0, Vec::len));
            if ids != width || mask != width {
                return Err(MultimodalError::Ragged { row, ids, mask, expected: width });
            }
        }
        for (row, values) in mask.iter().enumerate() {
            if let Some(&value) = values.iter().find(|value| !(0..=1).contains(*value)) {
                return Err(MultimodalError::Mask { row, value });
            }
        }
        Ok(Self { ids, mask, width })
    }

    /// The ids, a row for each text.
    pub fn ids(&self) -> &[Vec<i64>] {
        &self.ids
    }

    /// The mask, a row for each text.
    pub fn mask(&self) -> &[Vec<i64>] {
        &self.mask
    }

    /// Number of texts, and of tokens of each, padding included: `[rows, tokens]`.
    pub fn dims(&self) -> [usize; 2] {
        [self.ids.len(), self.width]
    }

    /// The ids as a tensor, `[rows, tokens]`.
    pub fn ids_tensor<B: Backend>(&self, device: &B::Device) -> Tensor<B, 2, Int> {
        self.tensor(&self.ids, device)
    }

    /// The mask as a tensor, `[rows, tokens]`.
    pub fn mask_tensor<B: Backend>(&self, device: &B::Device) -> Tensor<B, 2, Int> {
        self.tensor(&self.mask, device)
    }

    fn tensor<B: Backend>(&self, values: &[Vec<i64>], device: &B::Device) -> Tensor<B, 2, Int> {
        Tensor::from_data(TensorData::new(values.concat(), self.dims()), device)
    }

    /// Checks the tokens against a tower's number of positions and vocabulary.
    pub(crate) fn check(&self, context_length: usize, vocab_size: usize) -> Result<(), MultimodalError> {
        if self.width > context_length {
            return Err(MultimodalError::TooLong { tokens: self.width, context_length });
        }
        match self.ids.iter().flatten().find(|&&id| usize::try_from(id).map_or(true, |id| id >= vocab_size)) {
            Some(&id) => Err(MultimodalError::UnknownToken { id, vocab_size }),
            None => Ok(()),
        }
    }
}

/// Turns texts into the tokens of a tower.
///
/// Texts are padded to the longest of their batch, and truncated to the caller's length. The
/// lengths in `tokenizer.json` are ignored; the file of all-MiniLM-L6-v2 would pad every text to
/// 128 tokens.
#[derive(Clone, Debug)]
pub struct TextTokenizer {
    inner: Tokenizer,
    pad_id: i64,
}

impl TextTokenizer {
    /// The tokenizer of the contents of a `tokenizer.json`.
    ///
    /// Its padding token is the one that the file names, else `[PAD]`, `<pad>` or `<|endoftext|>`,
    /// else token 0.
    ///
    /// # Errors
    /// [`MultimodalError::Tokenizer`] if `json` is not a valid `tokenizer.json`: also if its template
    /// names tokens that it lacks, or gives tokens another type than 0.
    pub fn from_bytes(json: &[u8]) -> Result<Self, MultimodalError> {
        let added = check::check(json).map_err(MultimodalError::Tokenizer)?;
        let inner = guarded(|| Tokenizer::from_bytes(json))?;
        for (name, id) in added {
            if u32::try_from(id).ok().and_then(|id| inner.id_to_token(id)).is_none() {
                let why = format!("its special token {name} has the id {id}, which is not in its vocabulary");
                return Err(MultimodalError::Tokenizer(format!("{why}; use the id that the vocabulary has")));
            }
        }
        Self::from_inner(inner)
    }

    /// The tokenizer of a `tokenizer.json` file.
    ///
    /// # Errors
    /// [`MultimodalError::Checkpoint`] if the file cannot be read or is invalid.
    pub fn from_file(path: &Path) -> Result<Self, MultimodalError> {
        let failed = |why| MultimodalError::Checkpoint { path: path.display().to_string(), why };
        let json = read(path).map_err(failed)?;
        Self::from_bytes(&json).map_err(|e| failed(CheckpointError::Setting(e.to_string())))
    }

    fn from_inner(mut inner: Tokenizer) -> Result<Self, MultimodalError> {
        // an empty one is found between any two bytes of a text
        for token in inner.get_added_tokens_decoder().into_values().filter(|token| token.normalized) {
            let mut content = NormalizedString::from(token.content.as_str());
            if let Some(normalizer) = inner.get_normalizer() {
                guarded(|| normalizer.normalize(&mut content))?;
            }
            if content.is_empty() {
                let why = format!("its normalizer leaves nothing of the added token {:?}", token.content);
                return Err(MultimodalError::Tokenizer(format!("{why}; set normalized to false for that token")));
            }
        }
        let named = ["[PAD]", "<pad>", "<|endoftext|>"].into_iter().find_map(|token| inner.token_to_id(token));
        let pad_id = inner.get_padding().map(|padding| padding.pad_id).or(named).unwrap_or(0).into();
        inner.with_padding(None);
        inner.with_truncation(None).map_err(|e| MultimodalError::Tokenizer(e.to_string()))?;
        Ok(Self { inner, pad_id })
    }

    /// Sets the token that texts are padded with.
    #[must_use]
    pub fn with_pad_id(mut self, pad_id: i64) -> Self {
        self.pad_id = pad_id;
        self
    }

    /// The token that texts are padded with.
    pub fn pad_id(&self) -> i64 {
        self.pad_id
    }

    /// Puts texts into lower case first, unless the tokenizer does so as a step of its own.
    #[must_use]
    pub(crate) fn with_lower_case(mut self) -> Self {
        let lowers = |normalizer: &NormalizerWrapper| matches!(normalizer, NormalizerWrapper::Lowercase(_));
        let mut steps: Vec<NormalizerWrapper> = match self.inner.get_normalizer() {
            None => vec![],
            Some(NormalizerWrapper::Sequence(steps)) => steps.as_ref().to_vec(),
            Some(step) => vec![step.clone()],
        };
        if !steps.iter().any(lowers) {
            steps.insert(0, Lowercase.into());
            self.inner.with_normalizer(Some(Sequence::new(steps)));
        }
        self
    }

    /// The normaliser, if it is BERT's.
    pub(crate) fn bert_normalizer(&self) -> Option<BertNormalizer> {
        match self.inner.get_normalizer() {
            Some(NormalizerWrapper::BertNormalizer(normalizer)) => Some(*normalizer),
            _ => None,
        }
    }

    /// The id of a token by its name, such as `[CLS]`.
    pub fn id(&self, token: &str) -> Option<i64> {
        self.inner.token_to_id(token).map(i64::from)
    }

    /// The name of a token.
    pub fn token(&self, id: i64) -> Option<String> {
        u32::try_from(id).ok().and_then(|id| self.inner.id_to_token(id))
    }

    /// Number of tokens in the vocabulary.
    pub fn vocab_size(&self) -> usize {
        self.inner.get_vocab_size(true)
    }

    /// The contents of a `tokenizer.json`, without lengths.
    ///
    /// # Errors
    /// [`MultimodalError::Tokenizer`] if the tokenizer cannot be serialised.
    pub fn to_json(&self) -> Result<String, MultimodalError> {
        self.inner.to_string(false).map_err(|e| MultimodalError::Tokenizer(e.to_string()))
    }

    /// The tokens of texts with special tokens, at most `max_length` of each. A truncated text
    /// keeps the special tokens at its end.
    ///
    /// # Errors
    /// If there is no text, a text has no token, `max_length` is 0, or the tokenizer fails.
    pub fn encode(&self, texts: &[impl AsRef<str>], max_length: usize) -> Result<Tokens, MultimodalError> {
        if max_length == 0 {
            return Err(MultimodalError::MaxLength { max_length });
        }
        let mut ids = vec![];
        for (row, text) in texts.iter().enumerate() {
            let encoding = guarded(|| self.inner.encode_fast(text.as_ref(), true));
            let encoding = encoding.map_err(|e| match e {
                MultimodalError::Tokenizer(why) => MultimodalError::Tokenizer(format!("text {row}: {why}")),
                other => other,
            })?;
            let mut tokens: Vec<i64> = encoding.get_ids().iter().map(|&id| id.into()).collect();
            if tokens.is_empty() {
                return Err(MultimodalError::NoTokens { row });
            }
            if tokens.len() > max_length {
                let special = encoding.get_special_tokens_mask().iter().rev().take_while(|special| **special == 1);
                let end = tokens.split_off(tokens.len() - special.count().min(max_length));
                tokens.truncate(max_length - end.len());
                tokens.extend(end);
            }
            ids.push(tokens);
        }
        let longest = ids.iter().map(Vec::len).max().ok_or(MultimodalError::NoTexts)?;
        let mut mask = vec![];
        for row in &mut ids {
            mask.push((0..longest).map(|i| i64::from(i < row.len())).collect());
            row.resize(longest, self.pad_id);
        }
        Tokens::new(ids, mask)
    }
}

/// What the library `tokenizers` returns. Should it panic, which the checks of files prevent where
/// they know of it, that is an error as well.
fn guarded<T>(call: impl FnOnce() -> tokenizers::Result<T>) -> Result<T, MultimodalError> {
    match catch_unwind(AssertUnwindSafe(call)) {
        Ok(result) => result.map_err(|e| MultimodalError::Tokenizer(e.to_string())),
        Err(_) => {
            let why = "the library tokenizers panicked; use a tokenizer.json that transformers has saved";
            Err(MultimodalError::Tokenizer(why.into()))
        }
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use super::*;

    /// A vocabulary of whole words, with BERT's special tokens, and with fixed lengths as in
    /// all-MiniLM-L6-v2's file.
    pub(crate) const JSON: &str = r###"{
        "version": "1.0",
        "truncation": {"direction": "Right", "max_length": 4, "strategy": "LongestFirst", "stride": 0},
        "padding": {"strategy": {"Fixed": 8}, "direction": "Right", "pad_to_multiple_of": null, "pad_id": 0,
            "pad_type_id": 0, "pad_token": "[PAD]"},
        "added_tokens": [
            {"id": 0, "content": "[PAD]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 2, "content": "[CLS]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true},
            {"id": 3, "content": "[SEP]", "single_word": false, "lstrip": false, "rstrip": false, "normalized": false, "special": true}],
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {"type": "TemplateProcessing",
            "single": [{"SpecialToken": {"id": "[CLS]", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "[SEP]", "type_id": 0}}],
            "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {"[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]}}},
        "decoder": null,
        "model": {"type": "WordLevel", "unk_token": "[UNK]",
            "vocab": {"[PAD]": 0, "[UNK]": 1, "[CLS]": 2, "[SEP]": 3, "a": 4, "small": 5, "dog": 6, "runs": 7}}
    }"###;

    fn tokenizer() -> TextTokenizer {
        TextTokenizer::from_bytes(JSON.as_bytes()).unwrap()
    }

    #[test]
    fn texts_are_padded_to_the_longest_not_to_the_length_in_the_file() {
        let tokens = tokenizer().encode(&["a small dog runs", "A cat"], 32).unwrap();
        assert_eq!(tokens.ids(), [[2, 4, 5, 6, 7, 3], [2, 4, 1, 3, 0, 0]]);
        assert_eq!(tokens.mask(), [[1, 1, 1, 1, 1, 1], [1, 1, 1, 1, 0, 0]]);
        let other = tokenizer().with_pad_id(3).encode(&["dog", "a dog"], 32).unwrap();
        assert_eq!(other.ids()[0], [2, 6, 3, 3]);
        let again = TextTokenizer::from_bytes(tokenizer().to_json().unwrap().as_bytes()).unwrap();
        assert_eq!(again.encode(&["a small dog runs", "A cat"], 32).unwrap(), tokens);
    }

    #[test]
    fn a_truncated_text_keeps_its_end_token() {
        let ids = |max_length| tokenizer().encode(&["a small dog runs"], max_length).unwrap().ids()[0].clone();
        assert_eq!(ids(6), [2, 4, 5, 6, 7, 3]);
        assert_eq!(ids(5), [2, 4, 5, 6, 3]);
        assert_eq!(ids(2), [2, 3]);
        assert_eq!(ids(1), [3]);
    }

    /// transformers truncates the words to what the special tokens leave.
    #[test]
    fn a_truncated_text_keeps_all_tokens_at_its_end() {
        let mut json: serde_json::Value = serde_json::from_str(JSON).unwrap();
        let end = serde_json::json!({"SpecialToken": {"id": "[CLS]", "type_id": 0}});
        json["post_processor"]["single"].as_array_mut().unwrap().push(end);
        let tokenizer = TextTokenizer::from_bytes(json.to_string().as_bytes()).unwrap();
        let ids = |max_length| tokenizer.encode(&["a small dog runs"], max_length).unwrap().ids()[0].clone();
        assert_eq!(ids(7), [2, 4, 5, 6, 7, 3, 2]);
        assert_eq!(ids(5), [2, 4, 5, 3, 2]);
        assert_eq!(ids(1), [2]);
    }

    /// `do_lower_case` of sentence-transformers' `Transformer`: a step in front, where there is none.
    #[test]
    fn lower_case_is_a_step_in_front() {
        let with = |normalizer: &str| {
            let json = JSON.replace(r#"{"type": "Lowercase"}"#, normalizer);
            let tokenizer = TextTokenizer::from_bytes(json.as_bytes()).unwrap();
            let ids = |t: &TextTokenizer| t.encode(&["DOG"], 8).unwrap().ids()[0][1];
            (ids(&tokenizer), ids(&tokenizer.with_lower_case()))
        };
        assert_eq!(with("null"), (1, 6));
        assert_eq!(with(r#"{"type": "NFC"}"#), (1, 6));
        assert_eq!(with(r#"{"type": "Sequence", "normalizers": [{"type": "NFC"}, {"type": "Lowercase"}]}"#), (6, 6));
        // "DOG" only: the new step comes first
        let upper = r#"{"type": "Replace", "pattern": {"String": "dog"}, "content": "runs"}"#;
        assert_eq!(with(upper), (1, 7));
    }

    /// A panic of the library is an error: there may be files that no check knows of.
    #[test]
    fn a_panic_of_the_library_is_an_error() {
        let found = guarded(|| -> tokenizers::Result<()> { panic!("this one is part of a test") });
        assert!(found.unwrap_err().to_string().contains("panicked"));
    }

    #[test]
    fn invalid_texts_and_files_are_errors() {
        let none: [&str; 0] = [];
        assert!(matches!(tokenizer().encode(&none, 8), Err(MultimodalError::NoTexts)));
        assert!(matches!(tokenizer().encode(&["a"], 0), Err(MultimodalError::MaxLength { max_length: 0 })));
        assert_eq!(tokenizer().encode(&[""], 8).unwrap().ids(), [[2, 3]]);
        let mut bare: serde_json::Value = serde_json::from_str(JSON).unwrap();
        bare["post_processor"] = serde_json::Value::Null;
        let bare = TextTokenizer::from_bytes(bare.to_string().as_bytes()).unwrap();
        assert!(matches!(bare.encode(&["a", ""], 8), Err(MultimodalError::NoTokens { row: 1 })));
        assert_eq!(bare.encode(&["a small dog"], 2).unwrap().ids(), [[4, 5]]);
        assert!(matches!(TextTokenizer::from_bytes(b"{}"), Err(MultimodalError::Tokenizer(_))));
        let error = TextTokenizer::from_file(Path::new("nowhere/tokenizer.json")).unwrap_err().to_string();
        assert!(error.contains("nowhere/tokenizer.json") && error.contains("cannot be read"), "{error}");
    }

    #[test]
    fn ragged_rows_and_masks_are_errors() {
        let error = |ids: Vec<Vec<i64>>, mask: Vec<Vec<i64>>| Tokens::new(ids, mask).unwrap_err().to_string();
        assert!(error(vec![vec![1, 2], vec![1]], vec![vec![1, 1], vec![1]]).contains("row 1 has 1 ids"));
        assert!(error(vec![vec![1, 2]], vec![vec![1]]).contains("1 mask values"));
        assert!(error(vec![vec![1]], vec![]).contains("row 0"));
        assert!(error(vec![vec![1]], vec![vec![2]]).contains("value 2"));
        assert!(error(vec![vec![]], vec![vec![]]).contains("no token"));
        assert!(error(vec![], vec![]).contains("no texts"));
    }
}
