//! Towers from HuggingFace folders, a sentence encoder back into one, and alignments as files.
//!
//! A folder holds `config.json` and the weights: `model.safetensors` or `pytorch_model.bin`, or
//! either in shards with an index. For texts it also holds `tokenizer.json`. Weights in f16 and
//! bf16 become f32. If a file does not match the model, the error lists the parameters at fault.

pub mod alignment;
pub mod bert;
pub mod clip;
mod folder;
