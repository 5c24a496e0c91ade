//! Models that break the contract of rows or of sites, and models that do not.

use std::collections::HashSet;
use std::sync::Arc;

use burn::module::{AutodiffModule, Module, Param, ParamId};
use burn::nn::{Embedding, EmbeddingConfig, Linear, LinearConfig};
use burn::prelude::*;

use super::*;
use crate::allocator::{Allocation, QueryBudget};
use crate::batch::Batch;
use crate::estimator::{Estimator, Space};
use crate::losses::cross_entropy;
use crate::noise::Placement;
use crate::parameters::trained_parameters;
use crate::probe::{Gradients, Prefix, Site, SquaredScoreNorm};
use crate::testing::{AB, B, zoo, zoo_batch};

/// What a [`Text`] does wrong, or right.
#[derive(Clone, Copy, Debug, PartialEq)]
enum Way {
    /// A tied output that is a site.
    Tied,
    /// A tied output by a product of the model's own.
    Untied,
    /// A weight penalty in the losses.
    Penalty,
    /// A tied output that is not used.
    Unused,
    /// Tokens in one axis with rows, in front of a layer.
    Flat,
    /// The same behind a row of its own.
    FlatRow,
    /// A bare parameter `[tokens, d]`.
    Bare,
    /// A frozen tensor `[tokens, d]` joined by the probe.
    Joined,
    /// A stage with a row for each token.
    Stage,
    /// An output with a row for each token.
    Output,
    /// One loss for all.
    Loss,
    /// A layer that is called for more than two rows alone.
    Vary,
    /// A layer that gives the gradient of its transposed weight.
    Transposed,
}

const WORDS: usize = 5;
const TOKENS: usize = 3;
const DIM: usize = 4;

/// Word embeddings, positions, a linear layer, and an output over the words.
#[derive(Module, Debug)]
struct Text<B: Backend> {
    table: Embedding<B>,
    positions: Param<Tensor<B, 3>>,
    bare: Param<Tensor<B, 2>>,
    mix: Linear<B>,
    #[module(skip)]
    way: Way,
}

/// A layer whose gradient is transposed.
struct WrongSite<B: Backend> {
    x: Tensor<B, 3>,
    weight: ParamId,
}

impl<B: Backend> Site<B> for WrongSite<B> {
    fn backward(&self, g: Tensor<B, 2>, gradients: &mut Gradients<B>) {
        let [rows, tokens, d] = self.x.dims();
        let words = g.dims()[1] / tokens;
        let g: Tensor<B, 2> = g.reshape([rows * tokens, words]);
        gradients.add(self.weight, self.x.clone().reshape([rows * tokens, d]).transpose().matmul(g));
    }

    fn squared_score_norm(&self) -> SquaredScoreNorm<B> {
        SquaredScoreNorm::of_inputs(self.x.clone(), WORDS as f64)
    }
}

impl<B: Backend> ForwardModel<B> for Text<B> {
    type Input = Tensor<B, 2, Int>;
    type Target = Tensor<B, 1, Int>;
    type Output = Tensor<B, 2>;

    fn forward(&self, ids: Tensor<B, 2, Int>, probe: &mut Probe<B>) -> Tensor<B, 2> {
        let way = self.way;
        let x = probe.stage(ids, |ids, probe| {
            let [rows, tokens] = ids.dims();
            let x = probe.embedding(&self.table, ids);
            if way == Way::Stage { x.reshape([rows * tokens, 1, DIM]) } else { x }
        });
        let mut x = match way {
            Way::Bare => {
                let bare = probe.param(&self.bare);
                match bare.dims()[0] {
                    TOKENS => x + bare.unsqueeze(),
                    _ => x,
                }
            }
            Way::Joined => {
                let x: Tensor<B, 2> = x.mean_dim(1).squeeze_dim(1);
                probe.add(x, self.bare.val()).unsqueeze_dim(1)
            }
            _ => {
                let positions = probe.param(&self.positions);
                if way == Way::Stage { x } else { probe.add(x, positions) }
            }
        };
        let [rows, tokens, _] = x.dims();
        if way != Way::Vary || rows > 2 {
            let flat = match way {
                Way::Flat => [rows * tokens, 1, DIM],
                Way::FlatRow => [1, rows * tokens, DIM],
                _ => [rows, tokens, DIM],
            };
            let h = probe.linear(&self.mix, x.clone().reshape(flat)).tanh();
            let h = h.reshape([rows, tokens, DIM]);
            x = probe.add(x, h);
        }
        let table = self.table.weight.val().transpose();
        match way {
            Way::Untied => x.mean_dim(1).squeeze_dim::<2>(1).matmul(table),
            Way::Transposed => {
                let x: Tensor<B, 3> = x.mean_dim(1);
                let y = x.clone().matmul(table.unsqueeze());
                let y = probe.site(&[self.table.weight.id], y, |_| WrongSite { x, weight: self.table.weight.id });
                y.squeeze_dim(1)
            }
            Way::Output => probe.tied_linear(&self.table.weight, x).reshape([rows * tokens, WORDS]),
            _ => {
                let logits = probe.tied_linear(&self.table.weight, x.mean_dim(1)).squeeze_dim(1);
                if way == Way::Unused { logits.narrow(0, 0, 1).zeros_like().expand([rows, WORDS]) } else { logits }
            }
        }
    }

    fn losses(&self, logits: Tensor<B, 2>, target: Tensor<B, 1, Int>) -> Tensor<B, 1> {
        let losses = cross_entropy(logits, target);
        match self.way {
            Way::Penalty => losses + self.mix.weight.val().powi_scalar(2).sum().mul_scalar(1e-4),
            Way::Loss => losses.mean(),
            _ => losses,
        }
    }
}

fn text(way: Way) -> Text<AB> {
    let device = Default::default();
    let values = |n: usize, salt: f32| (0..n).map(|i| (1.3 * (i * i % 97) as f32 + salt).sin()).collect::<Vec<f32>>();
    let of = |shape: [usize; 2], salt| {
        let data = TensorData::new(values(shape[0] * shape[1], salt), shape);
        Tensor::<AB, 2>::from_data(data, &device)
    };
    let param = |shape, salt| Param::from_tensor(of(shape, salt).require_grad());
    let mut table: Embedding<AB> = EmbeddingConfig::new(WORDS, DIM).init(&device);
    table.weight = param([WORDS, DIM], 0.1);
    let mut mix: Linear<AB> = LinearConfig::new(DIM, DIM).init(&device);
    (mix.weight, mix.bias) = (param([DIM, DIM], 0.2), None);
    // zeros have to move too
    let positions = Param::from_tensor(Tensor::zeros([1, TOKENS, DIM], &device).require_grad());
    let bare = param([TOKENS, DIM], 0.3);
    let bare = if way == Way::Bare { bare } else { bare.no_grad() };
    let positions = if matches!(way, Way::Bare | Way::Joined) { positions.no_grad() } else { positions };
    Text { table, positions, bare, mix, way }
}

fn batch(rows: usize) -> Batch<Tensor<B, 2, Int>, Tensor<B, 1, Int>> {
    let device = Default::default();
    let ids: Vec<i32> = (0..rows * TOKENS).map(|i| (i * 7 % WORDS) as i32).collect();
    let labels: Vec<i32> = (0..rows).map(|i| (i * 3 % WORDS) as i32).collect();
    Batch {
        ids: (0..rows as u64).collect(),
        input: Tensor::from_data(TensorData::new(ids, [rows, TOKENS]), &device),
        target: Tensor::from_data(TensorData::new(labels, [rows]), &device),
    }
}

/// Clean pass, check of the sites, and an estimate of three queries for each example.
fn all(way: Way, space: Space, rows: usize, max_rows: usize) -> Result<(), Error> {
    let with_graph = text(way);
    let (trained, model, batch) = (trained_parameters(&with_graph), with_graph.valid(), batch(rows));
    let estimator = Estimator { max_rows, ..Estimator::new(space) };
    let clean = estimator.clean(&model, &batch, &trained)?;
    clean.check_sites()?;
    clean.estimate(&Allocation::uniform(rows, &QueryBudget::new(3, 1)?), 0)?;
    Ok(())
}

fn spaces() -> [Space; 3] {
    [Space::activation(), Space::activation().with_placement(Placement::Single).unwrap(), Space::low_rank(2)]
}

/// Each way to be wrong is an error that says which parameter and what to do, in both spaces of
/// sites, for every number of rows: also as many as tokens, one, and several passes.
#[test]
fn broken_contracts_are_errors() {
    for (way, parts) in [
        (Way::Untied, &["model.table.weight;", "probe.tied_linear"][..]),
        (Way::Penalty, &["model.mix.weight;", "weight decay"]),
        (Way::Flat, &["model.mix.weight", "[rows, tokens, …]"]),
        (Way::FlatRow, &["model.mix.weight", "[rows, tokens, …]"]),
        (Way::Bare, &["model.bare", "[1, tokens, d]", "[3, 4]"]),
        (Way::Stage, &["output of a stage", "first axis"]),
        (Way::Output, &["the output of the model", "probe.align"]),
        (Way::Transposed, &["model.table.weight", "[4, 5]", "[5, 4]"]),
    ] {
        for space in spaces() {
            for (rows, max_rows) in [(1, 256), (2, 256), (TOKENS, 256), (8, 256), (9, 256), (20, 64)] {
                let error = all(way, space, rows, max_rows).expect_err(&format!("{way:?} in {space}, {rows} rows"));
                let message = error.to_string();
                assert!(parts.iter().all(|part| message.contains(part)), "{way:?} in {space}, {rows} rows: {message}");
            }
        }
    }
}

/// Frozen parameters are not looked at, though they act on the losses.
#[test]
fn trained_parameters_alone_are_named() {
    let mut with_graph = text(Way::Penalty);
    with_graph.table.weight = with_graph.table.weight.no_grad();
    let (trained, model, batch) = (trained_parameters(&with_graph), with_graph.valid(), batch(4));
    let estimator = Estimator::new(Space::activation());
    let told = estimator.clean(&model, &batch, &trained).unwrap().check_sites();
    assert_eq!(told, Err(Error::ActsOutsideSites { paths: "model.mix.weight".into() }));
}

/// One loss for all fits a batch of one; other numbers of rows do not.
#[test]
fn a_wrong_number_of_losses_names_the_row_contract() {
    for space in Space::ALL {
        for rows in [2, 5, 20] {
            let message = all(Way::Loss, space, rows, 64).unwrap_err().to_string();
            assert!(message.contains("one row per example") && message.contains("probe.align"), "{message}");
        }
    }
    for space in spaces() {
        assert!(matches!(all(Way::Loss, space, 1, 64), Err(Error::RowCount { what: "the losses", got: 1, rows: 2 })));
    }
}

/// As many tokens as rows by accident: the check's other number of rows tells.
#[test]
fn accidents_of_equal_counts_are_found() {
    for rows in [TOKENS, 8] {
        let joined = all(Way::Joined, Space::activation(), rows, 256);
        assert!(matches!(joined, Err(Error::RowAxis { what, .. }) if what == "an argument of probe.add"));
    }
    // passes of three rows and of two
    for (rows, most) in [(3, 256), (5, 3)] {
        let vary = all(Way::Vary, Space::activation(), rows, most);
        assert!(matches!(vary, Err(Error::SitesVary { path, .. }) if path == "model.mix.weight"));
    }
    let flat = all(Way::FlatRow, Space::activation(), 1, 256).unwrap_err();
    let (few, many) = (TOKENS * DIM, 2 * TOKENS * DIM);
    assert_eq!(flat, Error::RowShape { path: "model.mix.weight".into(), few_rows: 1, few, many_rows: 2, many });
}

/// Healthy models pass in every space and placement, whatever the rows; a layer whose output is not
/// used is one.
#[test]
fn healthy_models_pass() {
    for space in Space::ALL {
        for placement in Placement::ALL {
            let Ok(space) =
                space.with_placement(placement).or(if placement == Placement::Joint { Ok(space) } else { Err(()) })
            else {
                continue;
            };
            for (rows, max_rows) in [(1, 256), (2, 256), (TOKENS, 256), (8, 256), (20, 64)] {
                for way in [Way::Tied, Way::Unused] {
                    assert_eq!(all(way, space, rows, max_rows), Ok(()), "{way:?} in {space}, {rows} rows");
                }
                let with_graph = zoo(1);
                let (model, batch) = (with_graph.valid(), zoo_batch::<B>(rows, 2));
                let trained = trained_parameters(&with_graph);
                let estimator = Estimator { max_rows, ..Estimator::new(space) };
                let clean = estimator.clean(&model, &batch, &trained).unwrap();
                assert_eq!(clean.check_sites(), Ok(()), "zoo in {space}, {rows} rows");
            }
        }
    }
    for way in [Way::Untied, Way::Penalty, Way::Flat, Way::FlatRow, Way::Bare] {
        assert_eq!(all(way, Space::weights(), 5, 256), Ok(()), "{way:?} is no fault under weight noise");
    }
}

/// The gradient of a table that is embedding and tied output is the sum of both uses: autodiff's.
///
/// The output gradients of the two sites come from autodiff too, as those of zeros added there.
#[test]
fn a_tied_output_adds_to_the_gradient_of_the_embedding() {
    let with_graph = text(Way::Tied);
    let (model, batch) = (with_graph.valid(), batch(4));
    let ids = Tensor::<AB, 2, Int>::from_inner(batch.input.clone());
    let target = Tensor::<AB, 1, Int>::from_inner(batch.target.clone());
    let output = with_graph.forward(ids.clone(), &mut Probe::clean());
    let exact = with_graph.losses(output, target.clone()).mean().backward();
    let exact: Vec<f64> = with_graph.table.weight.grad(&exact).unwrap().into_data().iter::<f64>().collect();

    let zeros = |shape| Tensor::<AB, 3>::zeros(shape, &Default::default()).require_grad();
    let (at_embedding, at_output) = (zeros([4, TOKENS, DIM]), zeros([4, 1, WORDS]));
    let x = with_graph.table.forward(ids) + at_embedding.clone() + with_graph.positions.val();
    let x = x.clone() + with_graph.mix.forward(x).tanh();
    let y = x.mean_dim(1).matmul(with_graph.table.weight.val().transpose().unsqueeze()) + at_output.clone();
    let grads = cross_entropy(y.squeeze_dim(1), target).mean().backward();

    let trained = Arc::new(HashSet::from([with_graph.table.weight.id]));
    let mut probe = Probe::record(trained.clone(), Prefix::empty());
    model.forward(batch.input, &mut probe);
    let (sites, mut gradients) = (probe.recorded(), Gradients::default());
    assert_eq!(sites.len(), 2);
    sites[0].backward(at_embedding.grad(&grads).unwrap().reshape([4, TOKENS * DIM]), &mut gradients);
    sites[1].backward(at_output.grad(&grads).unwrap().reshape([4, WORDS]), &mut gradients);
    assert_eq!(gradients.check(&model), Ok(()));
    let found: Vec<f64> = gradients.get(with_graph.table.weight.id).unwrap().to_data().iter::<f64>().collect();
    let scale = exact.iter().fold(0.0, |m: f64, g| m.max(g.abs()));
    for (found, exact) in found.iter().zip(&exact) {
        assert!((found - exact).abs() < 1e-5 * scale, "{found}, autodiff {exact}");
    }
}

#[test]
fn the_rows_of_the_check_differ_from_those_of_the_clean_pass() {
    for examples in 1..40 {
        for chunk in 1..=examples {
            let rows = rows_to_check(examples, chunk);
            assert!(
                rows.len() >= 2 && rows.len() <= MOST_ROWS && rows.len() != chunk,
                "{examples} in {chunk}: {rows:?}"
            );
            assert!(rows.iter().all(|&row| row < examples));
        }
    }
}

/// NaN equals NaN; a difference in being finite is one.
#[test]
fn losses_differ_beyond_the_tolerance() {
    let (nan, inf) = (f64::NAN, f64::INFINITY);
    assert!(!differ(&[1.0, nan, inf], &[1.0, nan, inf], 0.0));
    assert!(differ(&[1.0], &[1.0 + 1e-12], 0.0) && !differ(&[1.0], &[1.0 + 1e-12], 1e-9));
    assert!(!differ(&[1.0], &[1.5], 0.5), "the tolerance itself is within it");
    for (a, b) in [(nan, 1.0), (1.0, nan), (inf, 1.0), (inf, -inf)] {
        assert!(differ(&[a], &[b], 1e3), "{a} {b}");
    }
}

/// Every entry moves, zeros as well, by about the size of the parameter, and not as a multiple.
#[test]
fn every_parameter_moves() {
    for (value, size) in [(0.0, f64::from(FROM_ZERO)), (2.0, 2.0)] {
        let before = Tensor::<B, 2>::full([30, 20], value, &Default::default());
        let step: Vec<f64> = (moved(before.clone(), 3) - before).into_data().iter::<f64>().collect();
        let rms = (step.iter().map(|s| s * s).sum::<f64>() / 600.0).sqrt();
        assert!((rms / (1.5 * size / 2f64.sqrt()) - 1.0).abs() < 0.05, "{rms}");
        assert!(step.iter().filter(|s| s.abs() < 1e-3 * size).count() < 6 && step[0] != step[1]);
    }
}
