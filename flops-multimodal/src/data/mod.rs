//! Data shipped with the crate: synthetic scenes with captions.

pub mod scenes;

pub use scenes::{Mention, Scene, Scenes, Shift};
