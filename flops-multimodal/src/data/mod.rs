//! Data that come with the crate: made-up scenes with captions.

pub mod scenes;

pub use scenes::{Mention, Scene, Scenes, Shift};
