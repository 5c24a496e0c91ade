//! Sizes of a vision transformer, in timm's vocabulary, and the presets.

use burn::prelude::*;
use burn::tensor::activation::{gelu_approximate, sigmoid};
use flops_core::ops::gelu;
use serde::{Deserialize, Serialize};

use crate::error::VitError;

/// Configuration of a [`ViT`](crate::ViT); `ViTConfig::vit_micro_patch4_32().init(&device)`.
///
/// The field names are timm's.
#[derive(Config, Debug, PartialEq)]
pub struct ViTConfig {
    /// Height and width of the input, in pixels; a multiple of `patch_size`.
    #[config(default = 224)]
    pub img_size: usize,
    /// Height and width of a patch, in pixels.
    #[config(default = 16)]
    pub patch_size: usize,
    /// Input channels.
    #[config(default = 3)]
    pub in_chans: usize,
    /// Width of the residual stream; a multiple of `num_heads`.
    #[config(default = 768)]
    pub embed_dim: usize,
    /// Number of blocks, at least 1.
    #[config(default = 12)]
    pub depth: usize,
    /// Attention heads of a block.
    #[config(default = 12)]
    pub num_heads: usize,
    /// Hidden width of a block's MLP, as a multiple of `embed_dim`.
    #[config(default = 4.0)]
    pub mlp_ratio: f64,
    /// Whether queries, keys and values have a bias.
    #[config(default = true)]
    pub qkv_bias: bool,
    /// ε of the layer normalisations.
    #[config(default = 1e-6)]
    pub layer_norm_eps: f64,
    /// The activation between the layers of a block's MLP.
    #[config(default = "Activation::Gelu")]
    pub activation: Activation,
    /// Classes of the head.
    #[config(default = 1000)]
    pub num_classes: usize,
    /// Which features the head classifies.
    #[config(default = "Pool::Token")]
    pub pool: Pool,
    /// Whether pooled patch tokens are normalised after pooling, timm's `fc_norm`; otherwise all
    /// tokens are, before it. Under [`Pool::Token`] both are the same.
    #[config(default = true)]
    pub fc_norm: bool,
    /// Whether there is a class token; [`Pool::Token`] needs one.
    #[config(default = true)]
    pub class_token: bool,
    /// DeiT's distillation token, with or without its own head; needs a class token.
    #[config(default = "Distillation::None")]
    pub distillation: Distillation,
}

/// Which features the head of a [`ViT`](crate::ViT) classifies.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Pool {
    /// The class token after the final normalisation.
    #[default]
    Token,
    /// The mean of the patch tokens: timm's `global_pool='avg'`.
    Avg,
    /// The maximum over the patch tokens, of each feature: timm's `global_pool='max'`.
    Max,
    /// The mean of both: timm's `global_pool='avgmax'`.
    AvgMax,
}

impl Pool {
    /// Pools tokens: the first one, or all of them from `prefix` on.
    ///
    /// # Shapes
    /// - x: `[rows, tokens, embed_dim]`
    /// - returns: `[rows, 1, embed_dim]`
    pub(crate) fn apply<B: Backend>(self, x: Tensor<B, 3>, prefix: usize) -> Tensor<B, 3> {
        let patches = || x.clone().narrow(1, prefix, x.dims()[1] - prefix);
        match self {
            Self::Token => x.narrow(1, 0, 1),
            Self::Avg => patches().mean_dim(1),
            Self::Max => patches().max_dim(1),
            Self::AvgMax => (patches().mean_dim(1) + patches().max_dim(1)).mul_scalar(0.5),
        }
    }
}

/// The activation of a block's MLP.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Activation {
    /// x·Φ(x), with the exact distribution function Φ of the standard normal.
    #[default]
    Gelu,
    /// GELU with a tanh in the place of Φ, as in SigLIP 2: timm's `gelu_tanh`.
    GeluTanh,
    /// x·σ(1.702 x), which OpenAI's CLIP uses.
    QuickGelu,
}

impl Activation {
    /// Applies the function to each element.
    pub fn forward<B: Backend, const D: usize>(self, x: Tensor<B, D>) -> Tensor<B, D> {
        match self {
            Self::Gelu => gelu(x),
            Self::GeluTanh => gelu_approximate(x),
            Self::QuickGelu => x.clone() * sigmoid(x.mul_scalar(1.702)),
        }
    }
}

/// The distillation token of DeiT (Touvron et al. 2021, arXiv 2012.12877).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "snake_case")]
#[non_exhaustive]
pub enum Distillation {
    /// No distillation token.
    #[default]
    None,
    /// A token without a head: HuggingFace's `DeiTForImageClassification`.
    Token,
    /// A token with a head; the logits are the mean of both heads.
    ///
    /// HuggingFace's `DeiTForImageClassificationWithTeacher`, and timm's distilled models.
    Head,
}

/// Names of the presets, as in timm.
pub const PRESETS: [&str; 5] = [
    "vit_micro_patch4_32",
    "vit_tiny_patch16_224",
    "vit_small_patch16_224",
    "vit_base_patch16_224",
    "vit_large_patch16_224",
];

impl ViTConfig {
    /// 128 wide, 6 blocks, 4 heads, 32 px in patches of 4: 1.2 M parameters, 65 tokens.
    ///
    /// Small enough to train on a laptop.
    #[must_use]
    pub fn vit_micro_patch4_32() -> Self {
        Self::new()
            .with_img_size(32)
            .with_patch_size(4)
            .with_embed_dim(128)
            .with_depth(6)
            .with_num_heads(4)
            .with_num_classes(10)
    }

    /// 192 wide, 12 blocks, 3 heads.
    #[must_use]
    pub fn vit_tiny_patch16_224() -> Self {
        Self::new().with_embed_dim(192).with_num_heads(3)
    }

    /// 384 wide, 12 blocks, 6 heads.
    #[must_use]
    pub fn vit_small_patch16_224() -> Self {
        Self::new().with_embed_dim(384).with_num_heads(6)
    }

    /// 768 wide, 12 blocks, 12 heads.
    #[must_use]
    pub fn vit_base_patch16_224() -> Self {
        Self::new()
    }

    /// 1,024 wide, 24 blocks, 16 heads.
    #[must_use]
    pub fn vit_large_patch16_224() -> Self {
        Self::new().with_embed_dim(1024).with_depth(24).with_num_heads(16)
    }

    /// Returns the preset of that name.
    ///
    /// # Errors
    /// [`VitError::UnknownPreset`] with the choices.
    pub fn preset(name: &str) -> Result<Self, VitError> {
        match name {
            "vit_micro_patch4_32" => Ok(Self::vit_micro_patch4_32()),
            "vit_tiny_patch16_224" => Ok(Self::vit_tiny_patch16_224()),
            "vit_small_patch16_224" => Ok(Self::vit_small_patch16_224()),
            "vit_base_patch16_224" => Ok(Self::vit_base_patch16_224()),
            "vit_large_patch16_224" => Ok(Self::vit_large_patch16_224()),
            _ => Err(VitError::UnknownPreset { name: name.into(), choices: &PRESETS }),
        }
    }

    /// Checks that the sizes fit together.
    ///
    /// # Errors
    /// [`VitError::Config`], which names the size at fault.
    pub fn validate(&self) -> Result<(), VitError> {
        let check = |ok: bool, field: &'static str, value: usize, remedy: &'static str| {
            if ok { Ok(()) } else { Err(VitError::Config { field, value, remedy }) }
        };
        // products of sizes within these bounds do not overflow
        let sizes = [
            ("img_size", self.img_size),
            ("patch_size", self.patch_size),
            ("in_chans", self.in_chans),
            ("embed_dim", self.embed_dim),
            ("num_classes", self.num_classes),
            ("mlp_ratio × embed_dim", self.mlp_dim()),
        ];
        for (field, value) in sizes {
            check(value <= 1 << 20, field, value, "use at most 1,048,576")?;
        }
        let head = self.num_classes * self.embed_dim;
        check(head <= 1 << 26, "num_classes × embed_dim", head, "use at most 67,108,864")?;
        check(self.depth <= 1 << 14, "depth", self.depth, "use at most 16,384")?;
        check(self.patch_size > 0, "patch_size", self.patch_size, "use at least 1")?;
        check(
            self.img_size > 0 && self.img_size.is_multiple_of(self.patch_size),
            "img_size",
            self.img_size,
            "use a positive multiple of patch_size",
        )?;
        check(self.in_chans > 0, "in_chans", self.in_chans, "use at least 1")?;
        check(self.num_heads > 0, "num_heads", self.num_heads, "use at least 1")?;
        check(
            self.embed_dim > 0 && self.embed_dim.is_multiple_of(self.num_heads),
            "embed_dim",
            self.embed_dim,
            "use a positive multiple of num_heads",
        )?;
        check(self.depth > 0, "depth", self.depth, "use at least 1")?;
        check(self.mlp_dim() > 0, "mlp_ratio × embed_dim", self.mlp_dim(), "use a larger mlp_ratio")?;
        check(self.num_classes > 0, "num_classes", self.num_classes, "use at least 1")?;
        let needs = "use Pool::Avg, Max or AvgMax and no distillation token, or a class token";
        let token = self.pool == Pool::Token || self.distillation != Distillation::None;
        check(self.class_token || !token, "class_token", 0, needs)?;
        let pooled = self.pool != Pool::Token && self.distillation == Distillation::Head;
        check(!pooled, "distillation heads under Pool::Avg, Max or AvgMax", 1, "use Pool::Token")?;
        let eps = self.layer_norm_eps;
        if eps > 0.0 && eps < 1.0 { Ok(()) } else { Err(VitError::LayerNormEps { value: eps }) }
    }

    /// Number of class and distillation tokens.
    pub fn num_prefix_tokens(&self) -> usize {
        usize::from(self.class_token) + usize::from(self.distillation != Distillation::None)
    }

    /// Number of tokens of an image: patches, class and distillation token.
    pub fn num_tokens(&self) -> usize {
        (self.img_size / self.patch_size).pow(2) + self.num_prefix_tokens()
    }

    /// Hidden width of a block's MLP.
    pub fn mlp_dim(&self) -> usize {
        (self.embed_dim as f64 * self.mlp_ratio).round() as usize
    }

    /// Number of parameters of the model, computed without making it.
    pub fn num_params(&self) -> usize {
        let (d, hidden) = (self.embed_dim, self.mlp_dim());
        let linear = |d_in: usize, d_out: usize| d_in * d_out + d_out;
        let tokens = self.num_prefix_tokens() + self.num_tokens();
        let embed = linear(self.in_chans * self.patch_size.pow(2), d) + tokens * d;
        let qkv = if self.qkv_bias { 3 * linear(d, d) } else { 3 * d * d };
        let norm = 2 * d;
        let block = 2 * norm + qkv + linear(d, d) + linear(d, hidden) + linear(hidden, d);
        let heads = if self.distillation == Distillation::Head { 2 } else { 1 };
        embed + self.depth * block + norm + heads * linear(d, self.num_classes)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn presets_have_timm_parameter_counts() {
        // sum(p.numel() for p in timm.create_model(name).parameters())
        for (name, params) in [
            ("vit_tiny_patch16_224", 5_717_416),
            ("vit_small_patch16_224", 22_050_664),
            ("vit_base_patch16_224", 86_567_656),
            ("vit_large_patch16_224", 304_326_632),
        ] {
            assert_eq!(ViTConfig::preset(name).unwrap().num_params(), params, "{name}");
        }
    }

    #[test]
    fn num_params_matches_the_model() {
        let micro = ViTConfig::vit_micro_patch4_32();
        let pooled = micro.clone().with_pool(Pool::Avg);
        for config in [
            micro.clone(),
            micro.clone().with_qkv_bias(false),
            micro.clone().with_distillation(Distillation::Token),
            micro.clone().with_distillation(Distillation::Head),
            pooled.clone(),
            pooled.clone().with_fc_norm(false),
            pooled.with_class_token(false),
            ViTConfig::vit_tiny_patch16_224(),
        ] {
            let model = config.init::<Flex>(&Default::default()).unwrap();
            assert_eq!(config.num_params(), Module::num_params(&model));
        }
    }

    /// torch.nn.functional.gelu(x), gelu(x, approximate='tanh') and x * torch.sigmoid(1.702 * x).
    #[test]
    fn activations_match_pytorch() {
        let x = || Tensor::<Flex, 1>::from_floats([-2.0, -0.5, 0.0, 1.0, 3.0], &Default::default());
        for (activation, expected) in [
            (Activation::Gelu, [-0.045_500_26, -0.154_268_77, 0.0, 0.841_344_7, 2.995_950_2]),
            (Activation::GeluTanh, [-0.045_402_306, -0.154_286, 0.0, 0.841_192, 2.996_362_6]),
            (Activation::QuickGelu, [-0.064_341_38, -0.149_611_56, 0.0, 0.845_795_75, 2.981_928_7]),
        ] {
            let found: Vec<f32> = activation.forward(x()).to_data().to_vec().unwrap();
            for (found, expected) in found.iter().zip(expected) {
                assert!((found - expected).abs() < 2e-6, "{activation:?}: {found} instead of {expected}");
            }
        }
    }

    #[test]
    fn pooling_leaves_out_the_prefix() {
        // one row, tokens (9, 9), (1, 4), (3, 2)
        let x = || Tensor::<Flex, 3>::from_floats([[[9.0, 9.0], [1.0, 4.0], [3.0, 2.0]]], &Default::default());
        for (pool, expected) in
            [(Pool::Token, [9.0f32, 9.0]), (Pool::Avg, [2.0, 3.0]), (Pool::Max, [3.0, 4.0]), (Pool::AvgMax, [2.5, 3.5])]
        {
            assert_eq!(pool.apply(x(), 1).to_data(), TensorData::from([[expected]]), "{pool:?}");
        }
    }

    #[test]
    fn errors_name_the_missing_token() {
        let micro = ViTConfig::vit_micro_patch4_32();
        let message = |config: ViTConfig| config.validate().unwrap_err().to_string();
        assert!(message(micro.clone().with_class_token(false)).contains("class_token = 0"));
        let pooled = micro.with_pool(Pool::Avg);
        assert!(message(pooled.clone().with_distillation(Distillation::Head)).contains("Pool::Avg"));
        assert!(message(pooled.with_class_token(false).with_distillation(Distillation::Token)).contains("class_token"));
    }

    #[test]
    fn errors_name_the_size_out_of_range() {
        let micro = ViTConfig::vit_micro_patch4_32();
        for (config, expected) in [
            // a multiple of the patch whose square overflows
            (micro.clone().with_img_size(4 << 32), "img_size = 17179869184"),
            (micro.clone().with_embed_dim(1 << 40), "embed_dim = 1099511627776"),
            (micro.clone().with_depth(1 << 40), "depth = 1099511627776"),
            (micro.clone().with_mlp_ratio(f64::INFINITY), "mlp_ratio × embed_dim = "),
            (micro.clone().with_mlp_ratio(f64::NAN), "mlp_ratio × embed_dim = 0"),
            (micro.clone().with_num_classes(1 << 20), "num_classes × embed_dim = 134217728"),
            (micro.clone().with_layer_norm_eps(-1e-6), "layer_norm_eps = -0.000001"),
            (micro.clone().with_layer_norm_eps(f64::NAN), "layer_norm_eps = NaN"),
        ] {
            let error = config.validate().unwrap_err().to_string();
            assert!(error.contains(expected), "{error}");
        }
    }

    #[test]
    fn presets_are_valid_and_errors_list_them() {
        for name in PRESETS {
            ViTConfig::preset(name).unwrap().validate().unwrap();
        }
        let error = ViTConfig::preset("vit_huge").unwrap_err().to_string();
        assert!(error.contains("'vit_huge'") && error.contains("vit_base_patch16_224"), "{error}");
    }
}
