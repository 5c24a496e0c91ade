//! Errors of models, scopes and checkpoints.

use std::path::PathBuf;

/// An error of a model, a scope or a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VitError {
    /// There is no preset of that name.
    #[error("unknown preset '{name}'; choose one of {}", choices.join(", "))]
    UnknownPreset {
        /// The name given.
        name: String,
        /// The names there are.
        choices: &'static [&'static str],
    },
    /// The text names no source of weights.
    #[error(
        "'{name}' is no place for weights; give a file, a folder, or hf:ORG/NAME, with @REVISION where it is not main"
    )]
    UnknownSource {
        /// The text given.
        name: String,
    },
    /// Sizes that do not fit together.
    #[error("invalid ViT configuration: {field} = {value}; {remedy}")]
    Config {
        /// The size at fault.
        field: &'static str,
        /// Its value.
        value: usize,
        /// What to do about it.
        remedy: &'static str,
    },
    /// The ε of the layer normalisations is out of range.
    #[error("invalid ViT configuration: layer_norm_eps = {value}; use a number above 0 and below 1")]
    LayerNormEps {
        /// Its value.
        value: f64,
    },
    /// There is no scope of that name.
    #[error("unknown scope '{name}'; choose one of {}", choices.join(", "))]
    UnknownScope {
        /// The text given.
        name: String,
        /// The scopes there are.
        choices: &'static [&'static str],
    },
    /// There are no sites of that name.
    #[error("unknown sites '{name}'; choose linear or branch")]
    UnknownSites {
        /// The text given.
        name: String,
    },
    /// `last:K` with no block, or with more blocks than the model has.
    #[error(
        "scope last:{blocks} does not fit a model of {depth} blocks; choose K from 1 to {depth}, or one of {}",
        choices.join(", ")
    )]
    ScopeDepth {
        /// The blocks asked for.
        blocks: usize,
        /// The blocks of the model.
        depth: usize,
        /// The scopes there are.
        choices: &'static [&'static str],
    },
    /// `cls_tail` for a model that classifies by its pooled patch tokens.
    #[error(
        "scope cls_tail needs a head on the class token, and this model's looks at the mean of the patch \
         tokens or their maximum; use last:1"
    )]
    ScopeToken,
    /// The rank of adapters is 0 or above the width of the model.
    #[error("adapters of rank {rank} do not fit an embed_dim of {embed_dim}; choose a rank from 1 to {embed_dim}")]
    LoraRank {
        /// The rank asked for.
        rank: usize,
        /// Width of the model.
        embed_dim: usize,
    },
    /// `lora:R` for a model that has no adapters of rank R.
    #[error(
        "scope lora:{rank} needs adapters of rank {rank} in every block, the model has {}; put them in with \
         ViT::with_lora({rank}, seed) first",
        .found.map_or("none".to_string(), |found| format!("some of rank {found}"))
    )]
    NoAdapters {
        /// The rank asked for.
        rank: usize,
        /// The rank of the model's adapters, where it has any.
        found: Option<usize>,
    },
    /// A checkpoint cannot be loaded.
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
        path: PathBuf,
        /// What went wrong.
        why: String,
    },
    /// A file cannot be written; the message names it and a remedy.
    #[error(transparent)]
    Write(std::io::Error),
}

/// What is wrong with a checkpoint.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum CheckpointError {
    /// The file is missing or cannot be read.
    #[error("it cannot be read ({0}); check the path")]
    Read(std::io::Error),
    /// The file has no content.
    #[error("the file is empty; fetch or save it again")]
    Empty,
    /// A pointer of git-lfs lies in the place of the file.
    #[error("it is a pointer of git-lfs, not the file itself; run 'git lfs pull' in its folder")]
    Pointer,
    /// A web page lies in the place of the file.
    #[error(
        "it is a web page, not the file itself; fetch the file by its download link, logged in where that is needed"
    )]
    WebPage,
    /// The file is truncated, or no safetensors file at all.
    #[error("it is no intact safetensors file ({0}); fetch or save it again")]
    Malformed(String),
    /// The file has neither a card nor timm's names.
    #[error(
        "its metadata have no card (key '{key}') and its tensors are not named as timm's; open the folder that it lies \
         in, with its config.json"
    )]
    NoCard {
        /// The key looked for in the file's metadata.
        key: &'static str,
    },
    /// The file holds adapters, and a whole model is expected.
    #[error(
        "it holds the adapters of a model, not the model; load that first, then this file with \
         checkpoint::load_adapters"
    )]
    OnlyAdapters,
    /// The file holds a whole model, and adapters are expected.
    #[error("it holds a whole model and no adapters; load it with checkpoint::load")]
    NoAdapters,
    /// The adapters belong to a model with other settings.
    #[error("the adapters were made for another base model: {}; load the one they were trained on", .0.join(", "))]
    OtherBase(Vec<String>),
    /// The card is no JSON of the right form, or contradicts itself.
    #[error("its card is damaged ({0}); fetch or save it again")]
    Card(String),
    /// A JSON file beside the weights cannot be used.
    #[error("it cannot be understood ({0}); fetch it again")]
    Json(String),
    /// A JSON file beside the weights has a setting of another form, or out of range.
    #[error("{0}")]
    Setting(String),
    /// The folder has no weights.
    #[error("there are no weights in the folder; looked for {looked_for}")]
    NoWeights {
        /// The files looked for.
        looked_for: String,
    },
    /// A model of the hub is not in the cache, and was not fetched.
    #[error("it is not in the cache {}, looked for {}: {why}", cache.display(), looked_for.join(", "))]
    Hub {
        /// The folder of the cache.
        cache: PathBuf,
        /// The files looked for.
        looked_for: Vec<String>,
        /// Why it was not fetched.
        why: String,
    },
    /// A shard of the weights cannot be used.
    #[error("{name}: {why}")]
    Shard {
        /// The file.
        name: String,
        /// What is wrong with it.
        why: Box<CheckpointError>,
    },
    /// A file in PyTorch's format cannot be read.
    #[error("it is no file of PyTorch's that can be read: {0}")]
    Pytorch(#[from] PytorchError),
    /// The file lacks parameters of the model.
    #[error("{} missing: {}; the weights belong to another model", plural(.0.len(), "parameter is", "parameters are"), .0.join(", "))]
    Missing(Vec<String>),
    /// The file has tensors that the model has not.
    #[error("{} no parameter of the model: {}; the weights belong to another one", plural(.0.len(), "tensor is", "tensors are"), .0.join(", "))]
    Unexpected(Vec<String>),
    /// Parameters have other shapes in the file.
    #[error("wrong shapes: {}; the weights belong to another model", .0.join(", "))]
    Shapes(Vec<String>),
    /// A tensor does not hold floating-point values.
    #[error("'{name}' holds {dtype}; weights are f16, bf16, f32 or f64")]
    DType {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A weight is NaN or infinite.
    #[error(
        "parameter '{name}' has values that are not finite; the training that wrote it diverged, use an \
         earlier checkpoint"
    )]
    NonFinite {
        /// The parameter.
        name: String,
    },
    /// A name of timm's that does not say what the model's settings are.
    #[error(
        "architecture = '{name}' is none of timm's that are known, so its heads, activation and norm are not; put \
         num_heads into model_args of config.json, with act_layer and global_pool where they are not timm's defaults"
    )]
    UnknownArchitecture {
        /// The name.
        name: String,
    },
    /// The model is of a kind that this crate does not have.
    #[error("{field} = '{value}' is not supported; only {supported} is")]
    Unsupported {
        /// The setting.
        field: &'static str,
        /// Its value.
        value: String,
        /// What can be loaded.
        supported: String,
    },
}

/// What is wrong with a file of PyTorch's.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum PytorchError {
    /// The file is of another kind.
    #[error("it is neither a zip archive nor of the older format of torch.save")]
    Unknown,
    /// The file is a pickle of other software.
    #[error("it is a plain pickle, not a file of torch.save")]
    PlainPickle,
    /// The archive is damaged, or made in a way that `torch.save` never does.
    #[error("its zip archive is damaged: {0}")]
    Archive(String),
    /// The archive lacks a file.
    #[error("its zip archive has no {0}")]
    NoEntry(String),
    /// The file cannot be read.
    #[error("{0}")]
    Io(#[from] std::io::Error),
    /// The values are those of a machine of the other byte order.
    #[error("its values are big-endian; save it again on a little-endian machine")]
    BigEndian,
    /// The pickle is damaged.
    #[error("its pickle is damaged at byte {at}: {why}")]
    Pickle {
        /// Where.
        at: usize,
        /// In what way.
        why: &'static str,
    },
    /// The pickle is longer than any of weights.
    #[error("its pickle has {bytes} bytes, and at most {limit} are read")]
    LongPickle {
        /// Its length.
        bytes: u64,
        /// The most that is read.
        limit: usize,
    },
    /// The file holds an object other than a dictionary.
    #[error("it holds {found}, not a state dict; save model.state_dict() instead")]
    NoStateDict {
        /// What it holds.
        found: String,
    },
    /// The file holds a dictionary without tensors.
    #[error("it holds no tensors; its keys are {keys}")]
    NoTensors {
        /// The keys of the dictionary.
        keys: String,
    },
    /// The file holds several dictionaries with tensors.
    #[error("it holds several state dicts, {keys}; save the one that is meant on its own")]
    Ambiguous {
        /// The keys of those dictionaries.
        keys: String,
    },
    /// A tensor of a kind that is not read.
    #[error("the tensor '{name}' {why}")]
    Tensor {
        /// Its name.
        name: String,
        /// What is not read.
        why: String,
    },
}

impl CheckpointError {
    /// Replaces the names of parameters by what `theirs` returns; without an answer a name stays.
    #[must_use]
    pub fn renamed(self, theirs: impl Fn(&str) -> Option<String>) -> Self {
        let rename = |name: String| theirs(&name).unwrap_or(name);
        match self {
            Self::Missing(names) => Self::Missing(names.into_iter().map(rename).collect()),
            Self::Unexpected(names) => Self::Unexpected(names.into_iter().map(rename).collect()),
            Self::NonFinite { name } => Self::NonFinite { name: rename(name) },
            other => other,
        }
    }
}

fn plural(count: usize, one: &str, many: &str) -> String {
    format!("{count} {}", if count == 1 { one } else { many })
}
