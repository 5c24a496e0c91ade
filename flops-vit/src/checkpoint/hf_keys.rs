//! Names of parameters: HuggingFace's `ViTForImageClassification` and ours.

/// (HuggingFace's name, ours), in the order of the forward pass; `N` stands for the index of a block.
#[rustfmt::skip]
pub(super) const KEYS: [(&str, &str); 24] = [
    ("vit.embeddings.cls_token", "cls_token"),
    ("vit.embeddings.position_embeddings", "pos_embed"),
    ("vit.embeddings.patch_embeddings.projection.weight", "patch_embed.weight"),
    ("vit.embeddings.patch_embeddings.projection.bias", "patch_embed.bias"),
    ("vit.encoder.layer.N.layernorm_before.weight", "blocks.N.norm1.gamma"),
    ("vit.encoder.layer.N.layernorm_before.bias", "blocks.N.norm1.beta"),
    ("vit.encoder.layer.N.attention.attention.query.weight", "blocks.N.attn.query.weight"),
    ("vit.encoder.layer.N.attention.attention.query.bias", "blocks.N.attn.query.bias"),
    ("vit.encoder.layer.N.attention.attention.key.weight", "blocks.N.attn.key.weight"),
    ("vit.encoder.layer.N.attention.attention.key.bias", "blocks.N.attn.key.bias"),
    ("vit.encoder.layer.N.attention.attention.value.weight", "blocks.N.attn.value.weight"),
    ("vit.encoder.layer.N.attention.attention.value.bias", "blocks.N.attn.value.bias"),
    ("vit.encoder.layer.N.attention.output.dense.weight", "blocks.N.attn.proj.weight"),
    ("vit.encoder.layer.N.attention.output.dense.bias", "blocks.N.attn.proj.bias"),
    ("vit.encoder.layer.N.layernorm_after.weight", "blocks.N.norm2.gamma"),
    ("vit.encoder.layer.N.layernorm_after.bias", "blocks.N.norm2.beta"),
    ("vit.encoder.layer.N.intermediate.dense.weight", "blocks.N.fc1.weight"),
    ("vit.encoder.layer.N.intermediate.dense.bias", "blocks.N.fc1.bias"),
    ("vit.encoder.layer.N.output.dense.weight", "blocks.N.fc2.weight"),
    ("vit.encoder.layer.N.output.dense.bias", "blocks.N.fc2.bias"),
    ("vit.layernorm.weight", "norm.gamma"),
    ("vit.layernorm.bias", "norm.beta"),
    ("classifier.weight", "head.weight"),
    ("classifier.bias", "head.bias"),
];

/// Our name of a parameter that HuggingFace calls `key`.
pub(super) fn from_hf(key: &str) -> Option<String> {
    KEYS.iter().find_map(|(theirs, ours)| rename(key, theirs, ours))
}

/// HuggingFace's name of our parameter `key`.
pub(super) fn to_hf(key: &str) -> Option<String> {
    KEYS.iter().find_map(|(theirs, ours)| rename(key, ours, theirs))
}

fn rename(key: &str, from: &str, to: &str) -> Option<String> {
    match from.split_once('N') {
        None => (key == from).then(|| to.into()),
        Some((before, after)) => {
            let block = key.strip_prefix(before)?.strip_suffix(after)?;
            block.parse::<usize>().ok().map(|block| to.replace('N', &block.to_string()))
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn renames_both_ways() {
        assert_eq!(from_hf("vit.encoder.layer.11.output.dense.bias").unwrap(), "blocks.11.fc2.bias");
        assert_eq!(from_hf("vit.encoder.layer.x.output.dense.bias"), None);
        assert_eq!(from_hf("vit.pooler.dense.bias"), None);
        for (theirs, ours) in KEYS {
            let (theirs, ours) = (theirs.replace('N', "7"), ours.replace('N', "7"));
            assert_eq!(from_hf(&theirs).unwrap(), ours);
            assert_eq!(to_hf(&ours).unwrap(), theirs);
        }
    }
}
