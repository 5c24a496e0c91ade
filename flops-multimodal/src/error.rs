//! What can go wrong with encoders, alignments, prompts and their files; black boxes have [errors of their own](crate::blackbox::BlackBoxError).

use crate::blackbox::BlackBoxError;
use flops_vit::error::{CheckpointError, VitError};

/// The errors of towers, tokenizers and checkpoints of text and image models.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum MultimodalError {
    /// What `flops-vit` says of a source of weights or a folder of them.
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
    /// A checkpoint that cannot be written.
    #[error("cannot write {}: {why}", path.display())]
    Save {
        /// The file or folder.
        path: std::path::PathBuf,
        /// What went wrong.
        why: String,
    },
    /// Sizes that do not fit together.
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
    /// What a black box says.
    #[error(transparent)]
    BlackBox(#[from] BlackBoxError),
    /// A text encoder without the tokenizer that belongs to it.
    #[error("the text encoder has no tokenizer.json; put the one that belongs to it into its folder")]
    NoTokenizer,
    /// A `tokenizer.json` that cannot be used, or a text that it cannot cut up.
    #[error("the tokenizer failed: {0}")]
    Tokenizer(String),
    /// No text where at least one is asked for.
    #[error("there are no texts to encode; give at least one")]
    NoTexts,
    /// A text of which the tokenizer makes no token.
    #[error("text {row} gives no token; leave it out, or use a tokenizer that adds special tokens")]
    NoTokens {
        /// Its index, from 0.
        row: usize,
    },
    /// A length that leaves no room for a token.
    #[error("texts cannot be cut to {max_length} tokens; choose at least 1")]
    MaxLength {
        /// The length asked for.
        max_length: usize,
    },
    /// Token ids that are no table: rows of different lengths, or a mask of another shape.
    #[error("row {row} has {ids} ids and {mask} values of the mask, expected {expected} of each; pad the rows first")]
    Ragged {
        /// The row at fault, from 0.
        row: usize,
        /// Its ids.
        ids: usize,
        /// The values of its mask.
        mask: usize,
        /// The length of the first row.
        expected: usize,
    },
    /// A mask that says something else than yes and no.
    #[error("row {row} of the mask has the value {value}; a mask is 1 at a token and 0 at padding")]
    Mask {
        /// The row at fault, from 0.
        row: usize,
        /// The value.
        value: i64,
    },
    /// A text longer than the tower has positions.
    #[error("{tokens} tokens are more than the {context_length} positions of the tower; cut the texts to that length")]
    TooLong {
        /// Tokens of the text.
        tokens: usize,
        /// Positions of the tower.
        context_length: usize,
    },
    /// A token that the tower does not have.
    #[error("token {id} is not in the tower's vocabulary of {vocab_size}; use the tokenizer that belongs to it")]
    UnknownToken {
        /// The id.
        id: i64,
        /// Size of the vocabulary.
        vocab_size: usize,
    },
}
