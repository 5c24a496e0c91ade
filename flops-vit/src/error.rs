//! What can go wrong with a model.

/// The errors of models, scopes and checkpoints.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum VitError {
    /// A preset that does not exist.
    #[error("unknown preset '{name}'; choose one of {}", crate::config::PRESETS.join(", "))]
    UnknownPreset {
        /// The name given.
        name: String,
    },
    /// Weights from a place that cannot be.
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
    /// A scope that does not exist.
    #[error("unknown scope '{name}'; choose one of {}", crate::scope::CHOICES)]
    UnknownScope {
        /// The text given.
        name: String,
    },
    /// A scope of more blocks than there are, or of none.
    #[error(
        "scope last:{blocks} does not fit a model of {depth} blocks; choose K from 1 to {depth}, or one of {}",
        crate::scope::CHOICES
    )]
    ScopeDepth {
        /// The blocks asked for.
        blocks: usize,
        /// The blocks of the model.
        depth: usize,
    },
    /// A scope of the class token for a model whose head looks at the mean of the patch tokens.
    #[error(
        "scope cls_tail needs a head on the class token, and this model's looks at the mean of the patch tokens; use last:1"
    )]
    ScopeToken,
    /// Adapters of a rank that no projection has.
    #[error("adapters of rank {rank} do not fit an embed_dim of {embed_dim}; choose a rank from 1 to {embed_dim}")]
    LoraRank {
        /// The rank asked for.
        rank: usize,
        /// Width of the model.
        embed_dim: usize,
    },
    /// A scope of adapters that the model does not have.
    #[error(
        "scope lora:{rank} needs adapters of rank {rank} in every block, the model has {}; put them in with \
         ViT::with_lora({rank}, seed) first",
        .found.map_or("none".to_string(), |found| format!("some of rank {found}"))
    )]
    NoAdapters {
        /// The rank asked for.
        rank: usize,
        /// The rank of the adapters that are there.
        found: Option<usize>,
    },
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
        /// The file.
        path: std::path::PathBuf,
        /// What went wrong.
        why: String,
    },
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
    /// The file is truncated, or no safetensors file at all.
    #[error("it is no intact safetensors file ({0}); fetch or save it again")]
    Malformed(String),
    /// The file comes from somewhere else.
    #[error(
        "its metadata have no card (key '{}') and its tensors are not named as timm's; open the folder that it lies in, with its config.json",
        crate::checkpoint::CARD_KEY
    )]
    NoCard,
    /// The file has adapters, where a whole model is asked for.
    #[error(
        "it holds the adapters of a model, not the model; load that first, then this file with checkpoint::load_adapters"
    )]
    OnlyAdapters,
    /// The file has a whole model, where adapters are asked for.
    #[error("it holds a whole model and no adapters; load it with checkpoint::load")]
    NoAdapters,
    /// Adapters of a model with other settings.
    #[error("the adapters were made for another base model: {}; load the one they were trained on", .0.join(", "))]
    OtherBase(Vec<String>),
    /// The card is no JSON of the right form, or contradicts itself.
    #[error("its card is damaged ({0}); fetch or save it again")]
    Card(String),
    /// A JSON file beside the weights cannot be used.
    #[error("it cannot be understood ({0}); fetch it again")]
    Json(String),
    /// A folder without weights.
    #[error("there are no weights in the folder; looked for {looked_for}")]
    NoWeights {
        /// The files looked for.
        looked_for: String,
    },
    /// A model of the hub that is not in the cache, and was not fetched.
    #[error("it is not in the cache {}, looked for {}: {why}", cache.display(), looked_for.join(", "))]
    Hub {
        /// The folder of the cache.
        cache: std::path::PathBuf,
        /// The files looked for.
        looked_for: Vec<String>,
        /// Why it was not fetched.
        why: String,
    },
    /// A part of the weights cannot be used.
    #[error("{name}: {why}")]
    Shard {
        /// The file.
        name: String,
        /// What is wrong with it.
        why: Box<CheckpointError>,
    },
    /// A file that PyTorch would not have written.
    #[error("it is no file of PyTorch's that can be read ({0}); fetch it again, or convert it to safetensors")]
    Pytorch(String),
    /// Parameters of the model that the file does not have.
    #[error("{} missing: {}; the weights belong to another model", plural(.0.len(), "parameter is", "parameters are"), .0.join(", "))]
    Missing(Vec<String>),
    /// Tensors in the file that the model does not have.
    #[error("{} no parameter of the model: {}; the weights belong to another one", plural(.0.len(), "tensor is", "tensors are"), .0.join(", "))]
    Unexpected(Vec<String>),
    /// Parameters of another shape.
    #[error("wrong shapes: {}; the weights belong to another model", .0.join(", "))]
    Shapes(Vec<String>),
    /// A tensor that is not of floating-point numbers.
    #[error("'{name}' holds {dtype}; weights are f16, bf16, f32 or f64")]
    DType {
        /// The tensor.
        name: String,
        /// Its type.
        dtype: String,
    },
    /// A weight is NaN or infinite.
    #[error(
        "parameter '{name}' has values that are not finite; the training that wrote it diverged, use an earlier checkpoint"
    )]
    NonFinite {
        /// The parameter.
        name: String,
    },
    /// A model of another kind than this crate has.
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

impl CheckpointError {
    /// The same with the names of parameters as `theirs` gives them; one that it does not know keeps its own.
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
