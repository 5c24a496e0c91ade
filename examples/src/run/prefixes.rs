//! How many frozen prefixes of images fit into memory.

use flops_vit::ViTConfig;

/// The most bytes of kept prefixes.
const MOST: usize = 1 << 30;

/// Returns the most bytes that the kept prefix of an image takes: keys, values and hidden state of
/// every token.
pub fn prefix_bytes(config: &ViTConfig) -> usize {
    3 * config.num_tokens() * config.embed_dim * size_of::<f32>()
}

/// Returns whether the prefixes of so many images take at most 1 GiB.
pub fn prefixes_fit(config: &ViTConfig, images: usize) -> bool {
    images.saturating_mul(prefix_bytes(config)) <= MOST
}
