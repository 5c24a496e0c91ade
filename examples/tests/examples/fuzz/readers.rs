//! The readers, each with its files and a use of what it returns.

use std::fmt::Display;
use std::fs;
use std::path::Path;

use burn::backend::Flex;
use burn::data::dataloader::batcher::Batcher;
use burn::prelude::*;
use flops_core::{ForwardModel, Probe};
use flops_examples::run::artifacts::Artifacts;
use flops_examples::run::history::{self, History, Row, Split};
use flops_multimodal::blackbox::protocol::{ScoreRequest, encode};
use flops_multimodal::blackbox::{BlackBox, FromFn, Info, Metered, Query};
use flops_multimodal::checkpoint::{alignment, bert, clip};
use flops_multimodal::{AlignmentConfig, BertConfig, TextEncoder, TextTokenizer};
use flops_vit::Pretrained;
use flops_vit::checkpoint::{self, Source};
use flops_vit::data::{DatasetSpec, ImageBatch, ImageBatcher, LoadOptions};

use super::{Files, fuzz, seeds};

fn text(error: impl Display) -> String {
    error.to_string()
}

/// Classifies a grey image.
fn classify(pretrained: &Pretrained<Flex>) -> Result<(), String> {
    let config = &pretrained.card.config;
    let size = [1, config.in_chans, config.img_size, config.img_size];
    // an image of many million values is a use, too, but a slow one
    if size.iter().product::<usize>() > 1 << 20 {
        return Ok(());
    }
    let images = Tensor::full(size, 0.5, &Default::default());
    let logits = pretrained.model.forward(images, &mut Probe::clean());
    assert_eq!(logits.dims(), [1, config.num_classes]);
    assert_eq!(pretrained.card.classes.len(), config.num_classes);
    Ok(())
}

/// Opens weights of any origin in the folder, and uses them.
fn open(dir: &Path) -> Result<(), String> {
    let opened = checkpoint::open::<Flex>(&Source::Path(dir.to_path_buf()), &Default::default()).map_err(text)?;
    classify(&opened.pretrained)
}

fn huggingface() -> Files {
    seeds::written(|dir| seeds::model().save_huggingface(dir).unwrap())
}

#[test]
fn native() {
    let files = seeds::written(|dir| seeds::model().save(&dir.join("model.safetensors")).unwrap());
    fuzz("native", &files, &|dir| {
        let path = dir.join("model.safetensors");
        classify(&checkpoint::load::<Flex>(&path, &Default::default()).map_err(text)?)
    });
}

#[test]
fn huggingface_folders() {
    fuzz("huggingface", &huggingface(), &open);
}

#[test]
fn pytorch_files() {
    fuzz("pytorch", &seeds::in_pytorch(huggingface()), &open);
}

#[test]
fn shards() {
    fuzz("shards", &seeds::in_shards(huggingface()), &open);
}

#[test]
fn timm_folders() {
    fuzz("timm", &seeds::timm(), &open);
}

#[test]
fn adapters() {
    let base = seeds::model();
    let tuned = base.clone().with_lora(2, 1).unwrap();
    let files = seeds::written(|dir| tuned.save_adapters(&dir.join("adapters.safetensors")).unwrap());
    fuzz("adapters", &files, &|dir| {
        let path = dir.join("adapters.safetensors");
        classify(&checkpoint::load_adapters(base.model.clone(), &path).map_err(text)?)
    });
}

#[test]
fn alignments() {
    let device = Default::default();
    let model = AlignmentConfig::new(5, 4).with_embed_dim(2).with_hidden_dim(3).init::<Flex>(&device).unwrap();
    let files = seeds::written(|dir| alignment::save(&model, &dir.join("a.safetensors"), false).unwrap());
    fuzz("alignment", &files, &|dir| {
        alignment::load::<Flex>(&dir.join("a.safetensors"), &Default::default()).map(drop).map_err(text)
    });
}

/// The tokenizer of the shipped text encoder.
const TOKENIZER: &str = include_str!("../../../../flops-multimodal/weights/scenes_text/tokenizer.json");

#[test]
fn sentence_encoders() {
    let vocab_size = TextTokenizer::from_bytes(TOKENIZER.as_bytes()).unwrap().vocab_size();
    let config = BertConfig::new().with_vocab_size(vocab_size).with_embed_dim(8).with_depth(1).with_num_heads(2);
    let config = config.with_mlp_dim(16).with_context_length(16);
    let model = config.init::<Flex>(&Default::default()).unwrap();
    let mut files = seeds::written(|dir| bert::save(&model, &config, TOKENIZER, dir, false).unwrap());
    let settings = r#"{"max_seq_length": 12, "do_lower_case": false}"#;
    files.push(("sentence_bert_config.json".into(), settings.into()));
    fuzz("sentence encoder", &files, &|dir| {
        let source = Source::Path(dir.to_path_buf());
        let encoder = TextEncoder::<Flex>::open(&source, &Default::default()).map_err(text)?;
        encoder.encode(&["a photo of a cat", "dogs"]).map(drop).map_err(text)
    });
}

#[test]
fn clip_folders() {
    let Some(dir) = seeds::fixture("clip") else {
        eprintln!("skipped: there is no CLIP fixture (set FLOPS_SHARED)");
        return;
    };
    let mut files = seeds::of_folder(&dir);
    files.retain(|(name, _)| ["config.json", "model.safetensors"].contains(&name.as_str()));
    fuzz("clip", &files, &|dir| {
        let opened = clip::open::<Flex>(&Source::Path(dir.to_path_buf()), &Default::default()).map_err(text)?;
        let vision = &opened.config.vision;
        let images = Tensor::full([1, 3, vision.img_size, vision.img_size], 0.5, &Default::default());
        let _ = opened.model.encode_image(images, &mut Probe::clean());
        Ok(())
    });
}

#[test]
fn tokenizers() {
    let files = vec![("tokenizer.json".to_string(), TOKENIZER.into())];
    fuzz("tokenizer", &files, &|dir| {
        let tokenizer = TextTokenizer::from_file(&dir.join("tokenizer.json")).map_err(text)?;
        tokenizer.encode(&["a photo of a cat", "¡dogs 12!"], 16).map(drop).map_err(text)
    });
}

/// Loads a data set, and makes a batch of it.
fn batch(spec: &str, dir: &Path) -> Result<(), String> {
    let options = LoadOptions::new(4).with_data_dir(Some(dir.to_path_buf()));
    let split = spec.parse::<DatasetSpec>().map_err(text)?.load(&options).map_err(text)?;
    let batcher = ImageBatcher::new(4, flops_vit::Normalization::HALF).map_err(text)?;
    let items: Vec<_> = split.train.items.into_iter().chain(split.test.items).collect();
    let (images, classes) = (items.len(), split.train.classes.len());
    let batch: ImageBatch<Flex> = batcher.batch(items, &Default::default());
    assert_eq!(batch.input.dims(), [images, 3, 4, 4]);
    assert!(batch.target.into_data().iter::<i64>().all(|label| (label as usize) < classes));
    Ok(())
}

#[test]
fn cifar10() {
    fuzz("cifar10", &seeds::cifar10(), &|dir| batch("cifar10", dir));
}

#[test]
fn image_folders() {
    fuzz("images", &seeds::images(), &|dir| {
        batch(&format!("folder:{}", dir.display()), dir)?;
        // an image that is left out is named
        let options = LoadOptions::new(4).with_strict(true);
        flops_vit::data::folder::load(dir, &options).map(drop).map_err(text)
    });
}

fn black_box() -> Result<impl BlackBox, String> {
    let info = Info::new(["cat", "dog"], [1, 2, 2]).map_err(text)?;
    let scores = |queries: &[Query]| Ok::<_, String>(vec![vec![0.25, 0.5]; queries.len()]);
    FromFn::new(info, scores).map_err(text)
}

#[test]
fn journals() {
    let ask = |path: &Path| -> Result<(), String> {
        let metered = Metered::new(black_box()?, 1000).with_journal(path).map_err(text)?;
        for value in [0.0, 0.5, 1.0] {
            let scores = metered.scores(&[Query::new(vec![value; 4]), Query::new(vec![0.1; 4])]).map_err(text)?;
            assert!(scores.iter().flatten().all(|score| score.is_finite()));
        }
        Ok(())
    };
    let files = seeds::written(|dir| ask(&dir.join("journal")).unwrap());
    fuzz("journal", &files, &|dir| ask(&dir.join("journal")));
}

#[test]
fn protocol() {
    let info = Info::new(["cat", "dog"], [1, 2, 2]).unwrap();
    let request = ScoreRequest { images: vec![encode(&[0.5; 4]); 2], image_of: Some(vec![0, 1, 1]), contexts: None };
    let files = vec![
        ("info.json".to_string(), serde_json::to_vec(&info).unwrap()),
        ("request.json".to_string(), serde_json::to_vec(&request).unwrap()),
    ];
    fuzz("protocol", &files, &|dir| {
        let read = |name: &str| fs::read(dir.join(name)).unwrap();
        let info: Info = serde_json::from_slice(&read("info.json")).map_err(text)?;
        let info = info.checked().map_err(text)?;
        let request: ScoreRequest = serde_json::from_slice(&read("request.json")).map_err(text)?;
        let queries = request.queries(&info).map_err(text)?;
        assert_eq!(queries.len(), request.rows());
        Ok(())
    });
}

#[test]
fn histories() {
    let files = seeds::written(|dir| {
        let mut history = History { rows: vec![], sites: vec![] };
        (1..4).for_each(|epoch| history.push(Row::new(Split::Train, epoch, 0.5, 0.75)));
        history.write(&Artifacts::open(dir).unwrap()).unwrap();
    });
    fuzz("history", &files, &|dir| {
        History::read(&dir.join(history::FILE)).map(drop).map_err(|error| format!("{error:#}"))
    });
}
