//! `--method`: how gradients are obtained.

use std::str::FromStr;

use flops_core::Recipe;

/// How gradients are obtained.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Method {
    /// Forward passes only: a recipe, whose settings other flags may replace.
    Forward(Recipe),
    /// Burn's autodiff, with the same model, data and optimizer.
    Backprop,
}

impl Method {
    /// Returns the name on the command line.
    pub fn name(self) -> &'static str {
        match self {
            Self::Forward(Recipe::Default) => "forward",
            Self::Forward(recipe) => recipe.name(),
            Self::Backprop => "backprop",
        }
    }

    /// Returns the settings that it starts from.
    pub fn recipe(self) -> Recipe {
        if let Self::Forward(recipe) = self { recipe } else { Recipe::Default }
    }

    /// Returns whether the method uses forward passes only.
    pub fn is_forward(self) -> bool {
        self != Self::Backprop
    }
}

impl FromStr for Method {
    type Err = String;

    fn from_str(name: &str) -> Result<Self, String> {
        match name {
            "forward" => Ok(Self::Forward(Recipe::Default)),
            "backprop" => Ok(Self::Backprop),
            _ => name.parse().map(Self::Forward).map_err(|_| {
                let names: Vec<&str> = Recipe::ALL.into_iter().map(Recipe::name).collect();
                format!("choose one of forward, backprop, {}", names.join(", "))
            }),
        }
    }
}
