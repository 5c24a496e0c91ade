//! Pretrains the small text encoder that `flops-multimodal` ships: BERT as a sentence encoder, on
//! paraphrased captions.
//!
//! ```text
//! cargo run --release --example text_pretrain -- --out flops-multimodal/weights/scenes_text
//! ```
//!
//! It is trained by backpropagation. Two captions of one scene are to have similar embeddings, in
//! contrast to the other scenes of the batch: the loss of SimCSE (Gao et al. 2021, arXiv
//! 2104.08821). No image is used, and no scene that is held out for the test.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

use std::collections::BTreeSet;
use std::path::PathBuf;
use std::process::ExitCode;

use anyhow::{Result, ensure};
use burn::lr_scheduler::LrScheduler;
use burn::lr_scheduler::cosine::CosineAnnealingLrSchedulerConfig;
use burn::module::AutodiffModule;
use burn::optim::{AdamWConfig, GradientsParams, Optimizer};
use burn::prelude::*;
use burn::tensor::activation::log_softmax;
use clap::Parser;
use flops_core::Probe;
use flops_core::random::keyed_rng;
use flops_examples::backend::{self, AB};
use flops_examples::cli;
use flops_examples::run::artifacts::Artifacts;
use flops_multimodal::checkpoint::bert;
use flops_multimodal::data::{Mention, Scene};
use flops_multimodal::{Bert, BertConfig, TextTokenizer};
use rand::RngExt;
use serde_json::json;

/// Factor of the cosine similarities in the loss (the inverse temperature).
const SCALE: f64 = 20.0;

/// Pretrain the text encoder of flops-multimodal on paraphrases.
#[derive(Parser, Debug)]
struct Args {
    /// Training steps.
    #[arg(long, default_value_t = 800)]
    steps: usize,
    /// Scenes of a step, each with two captions.
    #[arg(long, default_value_t = 128)]
    batch_size: usize,
    /// AdamW's learning rate; it falls to zero as a cosine.
    #[arg(long, default_value_t = 2e-3)]
    lr: f64,
    /// Width of the encoder, a multiple of 4.
    #[arg(long, default_value_t = 64)]
    embed_dim: usize,
    /// Layers of the encoder.
    #[arg(long, default_value_t = 2)]
    depth: usize,
    /// Seed of the weights and the captions.
    #[arg(long, default_value_t = 0)]
    seed: u64,
    /// Folder of the result: config.json, model.safetensors in f16, tokenizer.json.
    #[arg(long, default_value = "artifacts/scenes_text")]
    out: PathBuf,
}

/// Returns every word that a caption can have.
fn words() -> BTreeSet<String> {
    let mut words = BTreeSet::new();
    for scene in Scene::all() {
        // so many variants contain every choice of every word
        for variant in 0..192 {
            words.extend(scene.caption(Mention::ALL, variant).split(' ').map(String::from));
        }
        words.extend(scene.caption(Mention::NONE, 0).split(' ').map(String::from));
    }
    words.insert("an".into());
    words
}

/// Returns a tokenizer of whole words, for captions.
fn tokenizer() -> Result<TextTokenizer> {
    let special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"];
    let all = special.iter().map(|s| s.to_string()).chain(words());
    let vocab: serde_json::Map<String, _> = all.enumerate().map(|(id, word)| (word, json!(id))).collect();
    let added: Vec<_> = special
        .iter()
        .enumerate()
        .map(|(id, token)| {
            json!({"id": id, "content": token, "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true})
        })
        .collect();
    let part = |name: &str| json!({"SpecialToken": {"id": name, "type_id": 0}});
    let described = json!({
        "version": "1.0", "truncation": null, "padding": null, "added_tokens": added,
        "normalizer": {"type": "Lowercase"},
        "pre_tokenizer": {"type": "Whitespace"},
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [part("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, part("[SEP]")],
            "pair": [part("[CLS]"), {"Sequence": {"id": "A", "type_id": 0}}, part("[SEP]"),
                {"Sequence": {"id": "B", "type_id": 1}}, part("[SEP]")],
            "special_tokens": {
                "[CLS]": {"id": "[CLS]", "ids": [2], "tokens": ["[CLS]"]},
                "[SEP]": {"id": "[SEP]", "ids": [3], "tokens": ["[SEP]"]},
            },
        },
        "decoder": null,
        "model": {"type": "WordLevel", "vocab": vocab, "unk_token": "[UNK]"},
    });
    Ok(TextTokenizer::from_bytes(&serde_json::to_vec(&described)?)?)
}

/// Returns the mean loss of a batch of pairs, and the share of captions whose most similar one is
/// their paraphrase.
///
/// `max_tokens` truncates the captions.
fn loss(
    model: &Bert<AB>,
    tokenizer: &TextTokenizer,
    captions: &[[String; 2]],
    max_tokens: usize,
) -> Result<(Tensor<AB, 1>, f64)> {
    let probe = &mut Probe::clean();
    let [a, b] = [0, 1].map(|side| {
        let texts: Vec<&str> = captions.iter().map(|pair| pair[side].as_str()).collect();
        tokenizer.encode(&texts, max_tokens)
    });
    let (a, b) = (model.encode(&a?, probe)?, model.encode(&b?, probe)?);
    let logits = a.matmul(b.transpose()).mul_scalar(SCALE);
    let n = captions.len();
    let own = Tensor::<AB, 1, Int>::arange(0..n as i64, &logits.device());
    let found: i64 = logits.clone().argmax(1).reshape([n]).equal(own.clone()).int().sum().into_scalar().elem();
    let pick = |x: Tensor<AB, 2>| log_softmax(x, 1).gather(1, own.clone().reshape([n, 1])).neg().mean();
    Ok(((pick(logits.clone()) + pick(logits.transpose())).mul_scalar(0.5), found as f64 / n as f64))
}

fn pretrain(args: Args) -> Result<()> {
    ensure!(args.steps > 0, "--steps 0: use at least 1");
    ensure!(args.batch_size > 1, "--batch-size {}: use at least 2", args.batch_size);
    // a folder that cannot be written to is reported before the training, not after it; another run
    // may not write into it meanwhile
    let _folder = Artifacts::open(&args.out)?;
    let device = backend::device()?;
    let tokenizer = tokenizer()?;
    let config = BertConfig::new()
        .with_vocab_size(tokenizer.vocab_size())
        .with_context_length(24)
        .with_embed_dim(args.embed_dim)
        .with_depth(args.depth)
        .with_num_heads(4)
        .with_mlp_dim(2 * args.embed_dim);
    <AB as burn::tensor::backend::Backend>::seed(&device, args.seed);
    let mut model = config.init::<AB>(&device)?;
    let scenes: Vec<Scene> = Scene::all().into_iter().filter(|scene| !scene.is_held_out()).collect();
    println!("{} words, {} parameters, {} scenes", config.vocab_size, model.num_params(), scenes.len());
    let mut optimizer = AdamWConfig::new().with_weight_decay(0.01).init();
    let mut schedule = CosineAnnealingLrSchedulerConfig::new(args.lr, args.steps)
        .init()
        .map_err(|e| anyhow::anyhow!("--lr {}: {e}", args.lr))?;
    let (mut sum, mut found) = (0.0, 0.0);
    for step in 0..args.steps {
        let mut rng = keyed_rng([args.seed, step as u64, 0, 0]);
        let captions: Vec<[String; 2]> = (0..args.batch_size)
            .map(|_| {
                let scene = scenes[rng.random_range(0..scenes.len())];
                let mention = Mention::draw(&mut rng);
                [scene.caption(mention, rng.random()), scene.caption(mention, rng.random())]
            })
            .collect();
        let (loss, share) = loss(&model, &tokenizer, &captions, config.context_length)?;
        sum += loss.clone().into_scalar().elem::<f64>();
        found += share;
        let grads = GradientsParams::from_grads(loss.backward(), &model);
        model = optimizer.step(schedule.step(), model, grads);
        if (step + 1) % 100 == 0 || step + 1 == args.steps {
            let steps = (step % 100 + 1) as f64;
            println!("step {}: loss {:.4}, paraphrase found {:.1} %", step + 1, sum / steps, 100.0 * found / steps);
            (sum, found) = (0.0, 0.0);
        }
    }
    bert::save(&model.valid(), &config, &tokenizer.to_json()?, &args.out, true)?;
    println!("{} holds config.json, model.safetensors and tokenizer.json", args.out.display());
    Ok(())
}

fn main() -> ExitCode {
    cli::run(pretrain)
}
