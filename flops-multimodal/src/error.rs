//! Errors of encoders, alignments, prompts and their files. Black boxes have [errors of their
//! own](crate::blackbox::BlackBoxError).

use crate::blackbox::BlackBoxError;
use flops_vit::error::{CheckpointError, VitError};

/// An error of an encoder, an alignment, a prompt, a tokenizer or a file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MultimodalError {
    /// An error of `flops-vit` about a source or a folder of weights.
    #[error(transparent)]
    Vit(#[from] VitError),
    /// A checkpoint that cannot be loaded.
    #[error("cannot load {path}: {why}")]
    Checkpoint {
        /// The file.
        path: String,
        /// What is wrong with it.
        why: CheckpointError,
    },
    /// A model that cannot be saved as it is.
    #[error("cannot write {}: {why}", path.display())]
    Save {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What went wrong.
        why: String,
    },
    /// A file cannot be written; the message names it and a remedy.
    #[error(transparent)]
    Write(std::io::Error),
    /// A size that is invalid, or does not match another.
    #[error("invalid configuration: {field} = {value}; {remedy}")]
    Config {
        /// The size at fault.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What to do about it.
        remedy: &'static str,
    },
    /// A setting outside its range.
    #[error("invalid setting: {name} = {value}; {remedy}")]
    Setting {
        /// The setting at fault.
        name: &'static str,
        /// Its value.
        value: String,
        /// What to do about it.
        remedy: &'static str,
    },
    /// An error of a black box.
    #[error(transparent)]
    BlackBox(#[from] BlackBoxError),
    /// A text encoder without its tokenizer.
    #[error("the text encoder has no tokenizer.json; put its tokenizer.json into its folder")]
    NoTokenizer,
    /// An invalid `tokenizer.json`, or a text that it cannot tokenize.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// No texts where at least one is required.
    #[error("there are no texts to encode; give at least one")]
    NoTexts,
    /// A text that the tokenizer turns into no token.
    #[error("text {row} has no token; leave it out, or use a tokenizer that adds special tokens")]
    NoTokens {
        /// Its index, from 0.
        row: usize,
    },
    /// A maximum length of 0 tokens.
    #[error("texts cannot be truncated to {max_length} tokens; choose at least 1")]
    MaxLength {
        /// The maximum length.
        max_length: usize,
    },
    /// Rows of token ids that differ in length, or a mask of another shape.
    #[error("row {row} has {ids} ids and {mask} mask values, expected {expected} of each; pad the rows first")]
    Ragged {
        /// The row at fault, from 0.
        row: usize,
        /// The number of its ids.
        ids: usize,
        /// The number of its mask values.
        mask: usize,
        /// The length of the first row.
        expected: usize,
    },
    /// A mask with a value other than 0 and 1.
    #[error("row {row} of the mask has the value {value}; use 1 for a token and 0 for padding")]
    Mask {
        /// The row at fault, from 0.
        row: usize,
        /// The value.
        value: i64,
    },
    /// A text with more tokens than the tower has positions.
    #[error(
        "{tokens} tokens are more than the {context_length} positions of the tower; truncate the texts to that length"
    )]
    TooLong {
        /// Tokens of the text.
        tokens: usize,
        /// Positions of the tower.
        context_length: usize,
    },
    /// A token outside the vocabulary of the tower.
    #[error("token {id} is not in the tower's vocabulary of {vocab_size}; use the tower's own tokenizer")]
    UnknownToken {
        /// The id.
        id: i64,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
}
