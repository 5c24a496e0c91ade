//! Folders of sentence-transformers: which modules follow the transformer, and their settings.
//!
//! `modules.json` lists the modules: the transformer, its pooling, and what comes behind. Each has a
//! folder of its own with a `config.json`. A folder without that list is one of transformers' alone.

use std::io::ErrorKind;
use std::path::{Path, PathBuf};

use burn::nn::{LayerNorm, LayerNormConfig};
use burn::prelude::*;
use flops_vit::checkpoint::tensors::{Table, fill, json, of_folder, to_theirs};
use flops_vit::error::CheckpointError;
use flops_vit::model::linear;
use serde::de::DeserializeOwned;
use serde_json::json;

use super::folder::{CONFIG, error_in, renamed};
use crate::error::MultimodalError;
use crate::tokenizer::TextTokenizer;
use crate::towers::{Dense, HeadLayer, Pooling, SentenceHead};

mod settings;

use settings::{
    DenseSettings, Entry, LayerNormSettings, ModelSettings, NormalizeSettings, PoolingSettings, TokenizerSettings,
    TransformerSettings, check_entries,
};

/// Name of the list of modules.
const MODULES: &str = "modules.json";
/// Name of the settings of the whole encoder.
const MODEL: &str = "config_sentence_transformers.json";
/// Name of the settings of the transformer, beside the model's own.
const TRANSFORMER: &str = "sentence_bert_config.json";
/// Names of that file for other models, which older versions wrote.
const OTHERS: [&str; 6] = ["roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet"];
/// Name of the settings of the tokenizer.
const TOKENIZER_CONFIG: &str = "tokenizer_config.json";
/// ε of `torch.nn.LayerNorm`.
const LAYER_NORM_EPS: f64 = 1e-5;

/// A folder of sentence-transformers, or one of transformers.
pub(super) struct SentenceFolder {
    /// The folder of the transformer: the folder itself, or one in it.
    pub transformer: PathBuf,
    /// Remarks for the user: what was assumed, a line each.
    pub notes: Vec<String>,
    dir: PathBuf,
    /// The modules behind the transformer, first to last; `None` without a list of modules.
    modules: Option<Vec<Entry>>,
    settings: TransformerSettings,
    tokenizer: TokenizerSettings,
    truncate_dim: Option<usize>,
}

impl SentenceFolder {
    /// Reads the settings of a folder.
    ///
    /// # Errors
    /// If a file cannot be read, or a setting is not supported.
    pub fn read(dir: &Path) -> Result<Self, MultimodalError> {
        let Some(mut entries) = optional::<Vec<Entry>>(dir, MODULES)? else { return Self::plain(dir) };
        let in_list = |why| error_in(dir, MODULES, why);
        check_entries(&entries).map_err(in_list)?;
        let none = || in_list(CheckpointError::Setting("it lists no module; fetch it again".into()));
        let first = entries.first().ok_or_else(none)?;
        match first.class() {
            Some("Transformer") => {}
            Some("CLIPModel") if !first.path.is_empty() => {
                let why = format!("its first module is CLIP, in the folder {}; open that folder", first.path);
                return Err(in_list(CheckpointError::Setting(why)));
            }
            _ => return Err(in_list(first.unsupported("Transformer as the first module"))),
        }
        let transformer = inside(dir, &first.path);
        let model = optional::<ModelSettings>(dir, MODEL)?.unwrap_or_default();
        let notes = model.check().map_err(|why| error_in(dir, MODEL, why))?;
        let (name, settings) = match optional(&transformer, TRANSFORMER)? {
            Some(settings) => (TRANSFORMER.into(), settings),
            None => older(&transformer)?,
        };
        TransformerSettings::check(&settings).map_err(|why| error_in(&transformer, &name, why))?;
        let tokenizer = tokenizer_settings(&transformer)?;
        let modules = Some(entries.split_off(1));
        let truncate_dim = model.truncate_dim;
        Ok(Self { dir: dir.into(), transformer, notes, modules, settings, tokenizer, truncate_dim })
    }

    /// A folder without a list of modules.
    fn plain(dir: &Path) -> Result<Self, MultimodalError> {
        if let Some(part) =
            ["1_Pooling/config.json", MODEL, TRANSFORMER].into_iter().find(|part| dir.join(part).exists())
        {
            let why = format!("{MODULES} is missing, but {part} is there; copy the whole folder, or remove {part}");
            return Err(MultimodalError::Checkpoint {
                path: dir.display().to_string(),
                why: CheckpointError::Setting(why),
            });
        }
        let note = format!(
            "there is no {MODULES}: a text's embedding is the mean of its tokens, not normalised, as \
             sentence-transformers has it for such a folder"
        );
        Ok(Self { tokenizer: tokenizer_settings(dir)?, notes: vec![note], ..Self::empty(dir) })
    }

    fn empty(dir: &Path) -> Self {
        Self {
            transformer: dir.into(),
            notes: vec![],
            dir: dir.into(),
            modules: None,
            settings: TransformerSettings::default(),
            tokenizer: TokenizerSettings::default(),
            truncate_dim: None,
        }
    }

    /// The longest text, in tokens, of a model with `positions` positions.
    pub fn max_length(&self, positions: usize) -> usize {
        // as numbers above usize's range, too, are converted to the nearest one in it
        let of_tokenizer = self.tokenizer.model_max_length.map(|length| length as usize);
        self.settings.max_seq_length.or(of_tokenizer).unwrap_or(positions).min(positions)
    }

    /// Sets up the tokenizer.
    ///
    /// # Errors
    /// If `tokenizer.json` and `tokenizer_config.json` contradict each other.
    pub fn prepared(&self, tokenizer: TextTokenizer) -> Result<TextTokenizer, MultimodalError> {
        if let Some(found) = tokenizer.bert_normalizer() {
            let agree = self.tokenizer.agree(found.lowercase, found.strip_accents, found.handle_chinese_chars);
            agree.map_err(|why| error_in(&self.transformer, TOKENIZER_CONFIG, why))?;
        }
        Ok(if self.settings.do_lower_case == Some(true) { tokenizer.with_lower_case() } else { tokenizer })
    }

    /// Loads the modules behind a transformer of the width `embed_dim`.
    ///
    /// # Errors
    /// If a module is not supported or its files do not fit.
    pub fn head<B: Backend>(&self, embed_dim: usize, device: &B::Device) -> Result<SentenceHead<B>, MultimodalError> {
        let Some(modules) = &self.modules else { return Ok(SentenceHead::new(Pooling::Mean)) };
        let in_list = |why| error_in(&self.dir, MODULES, why);
        let Some((first, rest)) = modules.split_first().filter(|(first, _)| first.class() == Some("Pooling")) else {
            let missing = || CheckpointError::Setting("no Pooling follows the Transformer; fetch it again".into());
            let why = modules.first().map(|other| other.unsupported("Pooling behind the Transformer"));
            return Err(in_list(why.unwrap_or_else(missing)));
        };
        let mut head = SentenceHead::new(Pooling::Mean);
        head.truncate_dim = self.truncate_dim;
        head.pooling = self.required(first, |settings: &PoolingSettings| settings.pooling(embed_dim))?.1;
        let mut width = head.pooling.len() * embed_dim;
        for entry in rest {
            let dir = inside(&self.dir, &entry.path);
            head.layers.push(match entry.class() {
                Some("Dense") => {
                    let (settings, activation) = self.required(entry, |s: &DenseSettings| s.activation(width))?;
                    let empty = linear(width, settings.out_features, settings.bias, device);
                    width = settings.out_features;
                    HeadLayer::Dense(filled(&dir, Dense { linear: empty, activation }, &[])?)
                }
                Some("LayerNorm") => {
                    self.required(entry, |settings: &LayerNormSettings| settings.check(width))?;
                    let empty: LayerNorm<B> = LayerNormConfig::new(width).with_epsilon(LAYER_NORM_EPS).init(device);
                    HeadLayer::LayerNorm(filled(&dir, empty, NORM)?)
                }
                Some("Normalize") => {
                    let settings = optional::<NormalizeSettings>(&dir, CONFIG)?.unwrap_or_default();
                    settings.check().map_err(|why| error_in(&dir, CONFIG, why))?;
                    HeadLayer::Normalize
                }
                // inference drops nothing
                Some("Dropout") => continue,
                _ => return Err(in_list(entry.unsupported("Dense, LayerNorm, Dropout or Normalize behind Pooling"))),
            });
        }
        Ok(head)
    }

    /// Reads the settings of a module, and what `check` makes of them.
    fn required<S: DeserializeOwned, T>(
        &self,
        entry: &Entry,
        check: impl FnOnce(&S) -> Result<T, CheckpointError>,
    ) -> Result<(S, T), MultimodalError> {
        let dir = inside(&self.dir, &entry.path);
        let found = json::<S>(&dir.join(CONFIG)).and_then(|settings| check(&settings).map(|found| (settings, found)));
        found.map_err(|why| error_in(&dir, CONFIG, why))
    }
}

/// The parameter names of the module `LayerNorm`, and ours.
const NORM: Table = &[("norm.weight", "gamma"), ("norm.bias", "beta")];

/// Fills a module from the weights of a folder.
fn filled<B: Backend, M: Module<B>>(dir: &Path, module: M, names: Table) -> Result<M, MultimodalError> {
    let (file, tensors) = of_folder(dir)?;
    let named = tensors.into_iter().map(|tensor| (tensor.full_path(), tensor)).collect();
    let filled = fill(module, renamed(names, named)).map_err(|why| why.renamed(|name| to_theirs(names, name)));
    filled.map_err(|why| error_in(dir, file, why))
}

/// The folder at `path` in `dir`.
fn inside(dir: &Path, path: &str) -> PathBuf {
    if path.is_empty() { dir.into() } else { dir.join(path) }
}

/// A JSON file of a folder, if it is there.
fn optional<T: DeserializeOwned>(dir: &Path, name: &str) -> Result<Option<T>, MultimodalError> {
    match json(&dir.join(name)) {
        Ok(found) => Ok(Some(found)),
        Err(CheckpointError::Read(e)) if [ErrorKind::NotFound, ErrorKind::NotADirectory].contains(&e.kind()) => {
            Ok(None)
        }
        Err(why) => Err(error_in(dir, name, why)),
    }
}

/// The settings of a transformer in a file of an older name, and that name.
fn older(dir: &Path) -> Result<(String, TransformerSettings), MultimodalError> {
    for model in OTHERS {
        let name = format!("sentence_{model}_config.json");
        if let Some(settings) = optional(dir, &name)? {
            return Ok((name, settings));
        }
    }
    Ok((TRANSFORMER.into(), TransformerSettings::default()))
}

fn tokenizer_settings(dir: &Path) -> Result<TokenizerSettings, MultimodalError> {
    let settings = optional::<TokenizerSettings>(dir, TOKENIZER_CONFIG)?.unwrap_or_default();
    settings.check().map_err(|why| error_in(dir, TOKENIZER_CONFIG, why))?;
    Ok(settings)
}

/// Checks that nothing follows the CLIP model of a folder: its features are not processed further.
///
/// # Errors
/// If `modules.json` lists another module.
pub(super) fn check_alone(dir: &Path) -> Result<(), MultimodalError> {
    let entries = optional::<Vec<Entry>>(dir, MODULES)?.unwrap_or_default();
    let more = entries.iter().enumerate().find(|(i, entry)| {
        *i > 0 || !matches!(entry.class(), Some("CLIPModel" | "Transformer")) || !entry.path.is_empty()
    });
    match more {
        Some((_, entry)) => Err(error_in(dir, MODULES, entry.unsupported("CLIPModel alone"))),
        None => Ok(()),
    }
}

/// The files by which a folder is an encoder of sentences: the mean of the tokens, normalised.
pub(super) fn mean_normalised(embed_dim: usize) -> [(&'static str, serde_json::Value); 2] {
    let module = |idx: usize, path: &str, class: &str| json!({"idx": idx, "name": idx.to_string(), "path": path, "type": format!("sentence_transformers.models.{class}")});
    let pooling = json!({
        "word_embedding_dimension": embed_dim,
        "pooling_mode_cls_token": false,
        "pooling_mode_mean_tokens": true,
        "pooling_mode_max_tokens": false,
        "pooling_mode_mean_sqrt_len_tokens": false,
    });
    let modules =
        [module(0, "", "Transformer"), module(1, "1_Pooling", "Pooling"), module(2, "2_Normalize", "Normalize")];
    [(MODULES, json!(modules)), ("1_Pooling/config.json", pooling)]
}

#[cfg(test)]
mod tests;
