//! What is trained: a scope of the pretrained ViT, or a network from scratch.

use std::fmt;
use std::str::FromStr;

use flops_vit::Scope;

/// What is trained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Subject {
    /// A scope of the pretrained ViT with a new head.
    Pretrained(Scope),
    /// All parameters of a network with random weights.
    Scratch(Network),
}

/// A network that is trained from scratch.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Network {
    /// Two hidden layers.
    Mlp,
    /// Two convolutions.
    Cnn,
    /// The configuration of the pretrained ViT.
    Vit,
}

impl Network {
    const ALL: [Self; 3] = [Self::Mlp, Self::Cnn, Self::Vit];

    fn name(self) -> &'static str {
        match self {
            Self::Mlp => "mlp",
            Self::Cnn => "cnn",
            Self::Vit => "vit",
        }
    }
}

impl FromStr for Network {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        let found = Self::ALL.into_iter().find(|network| network.name() == name);
        found.ok_or_else(|| format!("choose from {}", Self::ALL.map(Self::name).join(", ")))
    }
}

impl fmt::Display for Network {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(self.name())
    }
}

impl fmt::Display for Subject {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Pretrained(scope) => scope.fmt(f),
            Self::Scratch(network) => network.fmt(f),
        }
    }
}
