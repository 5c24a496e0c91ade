//! The classes of the made-up scenes, and the classifier that knows them.

use std::path::PathBuf;

use anyhow::Result;
use burn::prelude::*;
use clap::{Args, ValueEnum};
use flops_multimodal::checkpoint::alignment;
use flops_multimodal::data::scenes::{COLOURS, SHAPES, SIDE, Scene, TEXTURES};
use flops_multimodal::{Classifier, ImageEncoder, TextEncoder};

/// The attribute of a scene that is its class.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, ValueEnum)]
pub enum Classes {
    /// Its colour.
    #[default]
    Colour,
    /// Its shape.
    Shape,
    /// Its texture.
    Texture,
}

impl Classes {
    /// Returns the names of the classes.
    pub fn names(self) -> &'static [&'static str] {
        match self {
            Self::Colour => &COLOURS,
            Self::Shape => &SHAPES,
            Self::Texture => &TEXTURES,
        }
    }

    /// Returns the class of a scene, as its position in [`names`](Self::names).
    pub fn of(self, scene: &Scene) -> usize {
        match self {
            Self::Colour => scene.colour,
            Self::Shape => scene.shape,
            Self::Texture => scene.texture,
        }
    }

    /// Returns the zero-shot prompt, with `{}` for the name of the class.
    pub fn template(self) -> &'static str {
        match self {
            Self::Shape => "a picture of a {}",
            _ => "a picture of a {} thing",
        }
    }

    /// Returns the name on the command line.
    pub fn name(self) -> String {
        self.to_possible_value().map_or_else(String::new, |value| value.get_name().to_string())
    }
}

/// The flags of the classifier.
#[derive(Args, Clone, Debug)]
pub struct ClassifierArgs {
    /// The attribute of a scene that is its class.
    #[arg(long, value_enum, default_value_t)]
    pub classes: Classes,
    /// Projections for the shipped encoders, written by clip_align [default: those shipped with
    /// flops-multimodal].
    #[arg(long)]
    pub alignment: Option<PathBuf>,
}

impl ClassifierArgs {
    /// Returns the classifier, on the shipped encoders.
    ///
    /// # Errors
    /// Where the projections cannot be loaded.
    pub fn classifier<B: Backend>(&self, device: &B::Device) -> Result<Classifier<B>> {
        let alignment = match &self.alignment {
            Some(path) => alignment::load(path, device)?,
            None => alignment::shipped(device)?,
        };
        let (image, text) = (ImageEncoder::shipped(device)?, TextEncoder::shipped(device)?);
        let (names, template) = (self.classes.names(), self.classes.template());
        Ok(Classifier::new(image, text, alignment, names, template, [3, SIDE, SIDE])?)
    }
}
