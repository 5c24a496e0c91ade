//! Alignments as safetensors files, in PyTorch's layout. The sizes are taken from the shapes of the
//! tensors.

use std::path::Path;

use burn::prelude::*;
use flops_core::train::files::write_atomic;
use flops_vit::checkpoint::tensors::{TensorSnapshot, fill, of_safetensors, read, to_pytorch};
use flops_vit::error::CheckpointError;

use crate::alignment::{Alignment, AlignmentConfig};
use crate::error::MultimodalError;

/// The largest width of a layer.
const MAX_WIDTH: usize = 1 << 20;

/// Writes an alignment atomically, in f16 if `half`.
///
/// # Errors
/// [`MultimodalError::Save`] if a weight is not finite or too large for f16,
/// [`MultimodalError::Write`] if the file cannot be written.
pub fn save<B: Backend>(model: &Alignment<B>, path: &Path, half: bool) -> Result<(), MultimodalError> {
    let failed = |why: String| MultimodalError::Save { path: path.to_path_buf(), why };
    let bytes = to_pytorch(model, half, |name| Some(name.into())).map_err(failed)?;
    write_atomic(path, &bytes).map_err(MultimodalError::Write)
}

/// Loads an alignment that [`save`] wrote; f16 becomes f32.
///
/// # Errors
/// [`MultimodalError::Checkpoint`] if the file is missing, damaged, or not an alignment.
pub fn load<B: Backend>(path: &Path, device: &B::Device) -> Result<Alignment<B>, MultimodalError> {
    let loaded = read(path).and_then(|bytes| from_bytes(bytes, device));
    loaded.map_err(|why| MultimodalError::Checkpoint { path: path.display().to_string(), why })
}

/// The alignment shipped with this crate, for the shipped encoders; its embeddings have width 64.
///
/// It was trained with `examples/clip_align.rs` by backpropagation, on synthetic
/// [scenes](crate::data::scenes).
///
/// # Errors
/// If the file in the crate is damaged.
pub fn shipped<B: Backend>(device: &B::Device) -> Result<Alignment<B>, MultimodalError> {
    let loaded = from_bytes(include_bytes!("../../weights/scenes_alignment.safetensors").to_vec(), device);
    loaded.map_err(|why| MultimodalError::Checkpoint { path: "the shipped alignment".into(), why })
}

fn from_bytes<B: Backend>(bytes: Vec<u8>, device: &B::Device) -> Result<Alignment<B>, CheckpointError> {
    let tensors = of_safetensors(bytes)?;
    let shape = |name: &str| -> Result<[usize; 2], CheckpointError> {
        let found = tensors.iter().find(|t: &&TensorSnapshot| t.full_path() == name);
        let found = found.ok_or_else(|| CheckpointError::Missing(vec![name.into()]))?;
        let wrong = || CheckpointError::Shapes(vec![format!("{name} is {:?}, expected two sizes", found.shape)]);
        <[usize; 2]>::try_from(found.shape.to_vec()).map_err(|_| wrong())
    };
    let ([image_out, image_dim], [text_out, text_dim]) =
        (shape("image.layers.0.weight")?, shape("text.layers.0.weight")?);
    let hidden = tensors.iter().any(|t| t.full_path() == "image.layers.1.weight");
    let embed_dim = if hidden { shape("image.layers.1.weight")?[0] } else { image_out };
    let sizes = [image_dim, text_dim, image_out, embed_dim];
    if text_out != image_out || sizes.iter().any(|size| !(1..=MAX_WIDTH).contains(size)) {
        let why = format!(
            "the projections are {image_dim} to {image_out} and {text_dim} to {text_out} (embeddings of {embed_dim}), \
             expected equal outputs and widths of 1 to {MAX_WIDTH}"
        );
        return Err(CheckpointError::Shapes(vec![why]));
    }
    let config = AlignmentConfig::new(image_dim, text_dim).with_embed_dim(embed_dim);
    // shapes are compared before anything is allocated
    fill(config.with_hidden_dim(if hidden { image_out } else { 0 }).init_lazy(device), tensors)
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::Flex;

    #[test]
    fn a_saved_alignment_loads_unchanged() {
        let (dir, device) = (tempfile::tempdir().unwrap(), Default::default());
        let path = dir.path().join("a.safetensors");
        for hidden in [0, 3] {
            let model =
                AlignmentConfig::new(5, 4).with_embed_dim(2).with_hidden_dim(hidden).init::<Flex>(&device).unwrap();
            let x = Tensor::<Flex, 2>::ones([1, 5], &device);
            save(&model, &path, false).unwrap();
            let back = load::<Flex>(&path, &device).unwrap();
            assert_eq!(model.embed_images(x.clone()).into_data(), back.embed_images(x).into_data());
            assert_eq!(model.logit_scale.val().into_data(), back.logit_scale.val().into_data());
        }
        std::fs::write(&path, b"not a file of tensors").unwrap();
        assert!(load::<Flex>(&path, &device).unwrap_err().to_string().contains("a.safetensors"));
        assert!(load::<Flex>(&dir.path().join("none"), &device).is_err());
    }

    /// Shapes of which none holds a value, and shapes whose other sizes would multiply.
    #[test]
    fn absurd_sizes_are_refused_before_anything_is_allocated() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("a.safetensors");
        let message = |shapes: &[(&str, [usize; 2])]| {
            let zeros = vec![0; 1 << 20];
            let views = shapes.iter().map(|(name, shape)| {
                let bytes = &zeros[..4 * shape[0] * shape[1]];
                (*name, safetensors::tensor::TensorView::new(safetensors::Dtype::F32, shape.to_vec(), bytes).unwrap())
            });
            std::fs::write(&path, safetensors::serialize(views.collect::<Vec<_>>(), None).unwrap()).unwrap();
            load::<Flex>(&path, &Default::default()).unwrap_err().to_string()
        };
        let (image, text) = ("image.layers.0.weight", "text.layers.0.weight");
        let (image1, text1) = ("image.layers.1.weight", "text.layers.1.weight");
        let found = message(&[(image, [0, 1 << 50]), (text, [0, 1 << 50]), (image1, [4, 0])]);
        assert!(found.contains("1125899906842624 to 0") && found.lines().count() == 1, "{found}");
        let found = message(&[(image, [1 << 18, 1]), (text, [1 << 18, 1]), (image1, [1 << 18, 1]), (text1, [1, 1])]);
        assert!(found.contains("missing"), "{found}");
    }

    #[test]
    fn a_failed_save_names_the_path_and_a_remedy_once() {
        let (dir, device) = (tempfile::tempdir().unwrap(), Default::default());
        let model = AlignmentConfig::new(5, 4).init::<Flex>(&device).unwrap();
        let error = save(&model, dir.path(), false).unwrap_err().to_string();
        for once in [dir.path().to_str().unwrap(), "cannot write", "choose"] {
            assert_eq!(error.matches(once).count(), 1, "'{once}' in: {error}");
        }
    }

    #[test]
    fn the_shipped_alignment_fits_the_shipped_encoders() {
        let device = Default::default();
        let model = shipped::<Flex>(&device).unwrap();
        let image = crate::ImageEncoder::<Flex>::shipped(&device).unwrap();
        let text = crate::TextEncoder::<Flex>::shipped(&device).unwrap();
        let images = image.encode(Tensor::zeros([1, 3, 32, 32], &device));
        assert_eq!(images.dims()[1], model.image.layers[0].weight.dims()[0]);
        let texts = text.encode(&["a red circle", "a picture of a small striped thing in the middle"]).unwrap();
        assert_eq!(texts.dims()[1], model.text.layers[0].weight.dims()[0]);
    }
}
