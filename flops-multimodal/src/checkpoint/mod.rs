//! Towers from HuggingFace folders, a sentence encoder back into one, and alignments as files.
//!
//! A folder holds `config.json` and the weights: `model.safetensors` or `pytorch_model.bin`, or
//! either in shards with an index. For texts it also holds `tokenizer.json`. Weights in f16 and
//! bf16 become f32. If a file does not match the model, the error lists the parameters at fault.
//!
//! What sentence-transformers has beside a BERT decides its embeddings: `modules.json` with the
//! modules that it lists, the longest text, lower case. A setting that would change them and is not
//! supported is an error that names it.

pub mod alignment;
pub mod bert;
pub mod clip;
mod folder;
mod sentence;
