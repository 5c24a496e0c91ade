//! The contract of a layer, for the tests of whoever writes one.

use std::collections::HashSet;
use std::ops::Range;
use std::sync::Arc;

use burn::module::{AutodiffModule, ModuleMapper, ModuleVisitor, Param, ParamId};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;

use super::Probe;
use super::gradients::Gradients;
use super::layer::WeightNoise;
use super::low_rank::Layout;
use super::query::Query;
use super::recorded::Recorded;
use super::rows::QueryRows;
use super::stages::Prefix;
use crate::batch::Rows;
use crate::lift::Lift;
use crate::model::ForwardModel;
use crate::noise::{NoiseLaw, NoiseSource, Sampling};
use crate::parameters::trained_parameters;

/// Tests that a layer is a correct [`Site`](super::Site), up to rounding.
///
/// The model calls one site and returns its output as `[rows, coordinates]`. With each parameter frozen
/// in turn, and with none:
///
/// - `backward` forms the gradients that autodiff does, in the shapes of their parameters;
/// - `squared_score_norm` is what `backward` gives coordinate by coordinate, or along
///   [`norm_direction`](super::Site::norm_direction) within 2 %;
/// - `mismatch` finds none;
/// - a row under noise of low rank is what the layer with the perturbed parameters gives.
///
/// And in a query every row has noise of its own. Where the output is `[rows, tokens, …]`, all this
/// also holds under a [token mask](Probe::masked): without the coordinates of masked tokens.
///
/// # Shapes
/// - input: at least two rows; few coordinates, since each is looked at in turn. It is [lifted](crate::Lift) for
///   autodiff.
///
/// # Panics
/// Where one of these does not hold, as an assertion does: call it in a test.
///
/// # Example
/// ```
/// use burn::backend::{Autodiff, Flex};
/// use burn::nn::{Linear, LinearConfig};
/// use burn::prelude::*;
/// use flops_core::probe::check_site;
/// use flops_core::prelude::*;
///
/// #[derive(Module, Debug)]
/// struct OneLayer<B: Backend> {
///     layer: Linear<B>,
/// }
///
/// impl<B: Backend> ForwardModel<B> for OneLayer<B> {
///     type Input = Tensor<B, 2>;
///     type Target = ();
///     type Output = Tensor<B, 2>;
///
///     fn forward(&self, x: Tensor<B, 2>, probe: &mut Probe<B>) -> Tensor<B, 2> {
///         probe.linear(&self.layer, x)
///     }
///
///     fn losses(&self, y: Tensor<B, 2>, (): ()) -> Tensor<B, 1> {
///         y.sum_dim(1).squeeze_dim(1)
///     }
/// }
///
/// type AB = Autodiff<Flex>;
/// let device = Default::default();
/// let model = OneLayer::<AB> { layer: LinearConfig::new(4, 3).init(&device) };
/// let x = [[0.1, -0.5, 0.9, 0.3], [0.7, 0.2, -0.4, 0.8]];
/// check_site::<AB, _>(&model, Tensor::from_floats(x, &device));
/// ```
pub fn check_site<AB, M>(model: &M, input: <M::InnerModule as ForwardModel<AB::InnerBackend>>::Input)
where
    AB: AutodiffBackend,
    M: AutodiffModule<AB> + ForwardModel<AB, Output = Tensor<AB, 2>>,
    M::InnerModule: ForwardModel<AB::InnerBackend, Output = Tensor<AB::InnerBackend, 2>>,
    <M::InnerModule as ForwardModel<AB::InnerBackend>>::Input: Lift<AB, Lifted = M::Input>,
{
    let (plain, all) = (model.valid(), trained_parameters(model));
    let clean = plain.forward(input.clone(), &mut Probe::clean());
    let [rows, coordinates] = clean.dims();
    assert!(rows > 1, "give an input of at least two rows");
    let values = (0..rows * coordinates).map(|i| (1.3 * (i * i % 97) as f32).sin()).collect();
    let g = Tensor::from_data(TensorData::new(values, [rows, coordinates]), &clean.device());
    let mut keep = Probe::keep(all.clone()).with_row_check(rows, true);
    plain.forward(input.clone(), &mut keep);
    assert_eq!(keep.row_fault(), None, "rows of the output");
    assert_eq!(keep.kept().mismatch, None, "the output that backward differentiates is another");
    let all_rows: Vec<usize> = (0..rows).collect();
    let unmasked = Check { model: &plain, input: &input, clean: &clean, mask: None };
    let tokens = unmasked.record(&all_rows, &all).tokens;
    let masked =
        tokens.map(|tokens| Check { mask: Some(some_masked(rows, tokens, &clean.device())), ..unmasked.clone() });
    for check in [Some(unmasked), masked].into_iter().flatten() {
        let real = check.record(&all_rows, &all).mask.map_or(g.clone(), |mask| mask.apply(g.clone()));
        let exact = autodiff(model, input.clone().lift(), &real);
        let frozen = all.iter().copied().map(Some).filter(|_| all.len() > 1).chain([None]);
        for frozen in frozen {
            let trained: Arc<HashSet<ParamId>> =
                Arc::new(all.iter().filter(|id| Some(**id) != frozen).copied().collect());
            let mut gradients = Gradients::default();
            let recorded = check.record(&all_rows, &trained);
            assert_eq!(recorded.coordinates, coordinates, "the model gives the output of its site");
            recorded.backward(g.clone(), &mut gradients);
            assert_eq!(gradients.check(&plain), Ok(()));
            for (id, exact) in exact.iter().filter(|(id, _)| trained.contains(id)) {
                let found = gradients.get(*id).unwrap_or_else(|| panic!("no gradient of parameter {id}"));
                close(&to_vec(found.clone()), exact, &format!("gradient of parameter {id}"));
            }
            check.norms(&recorded, &trained);
            check.low_rank(&recorded, &trained);
        }
        check.output_noise(&all);
    }
}

/// A mask that hides every other token, others in the next row.
fn some_masked<B: Backend>(rows: usize, tokens: usize, device: &B::Device) -> Tensor<B, 2, Int> {
    let mask = (0..rows * tokens).map(|i| i32::from((i / tokens + i % tokens).is_multiple_of(2))).collect();
    Tensor::from_data(TensorData::new(mask, [rows, tokens]), device)
}

/// The gradients of Σ ⟨g, y⟩ by autodiff.
fn autodiff<AB: AutodiffBackend, M: ForwardModel<AB, Output = Tensor<AB, 2>>>(
    model: &M,
    x: M::Input,
    g: &Tensor<AB::InnerBackend, 2>,
) -> Vec<(ParamId, Vec<f64>)> {
    struct Visit<'a, AB: AutodiffBackend>(&'a AB::Gradients, Vec<(ParamId, Vec<f64>)>);
    impl<AB: AutodiffBackend> ModuleVisitor<AB> for Visit<'_, AB> {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<AB, D>>) {
            if let Some(g) = param.val().grad(self.0) {
                self.1.push((param.id, to_vec(g)));
            }
        }
    }
    let y = model.forward(x, &mut Probe::clean());
    let grads = (y * Tensor::from_inner(g.clone())).sum().backward();
    let mut visit = Visit::<AB>(&grads, vec![]);
    model.visit(&mut visit);
    visit.1
}

/// The parameters, with these steps added.
struct Step<'a, B: Backend>(&'a Gradients<B>);

impl<B: Backend> ModuleMapper<B> for Step<'_, B> {
    fn map_float<const D: usize>(&mut self, param: Param<Tensor<B, D>>) -> Param<Tensor<B, D>> {
        match self.0.get(param.id).cloned() {
            Some(step) => param.map(|p| p.clone() + step.reshape(p.dims()).cast(p.dtype())),
            None => param,
        }
    }
}

fn close(found: &[f64], expected: &[f64], what: &str) {
    close_within(2e-5, found, expected, what);
}

fn close_within(tolerance: f64, found: &[f64], expected: &[f64], what: &str) {
    assert_eq!(found.len(), expected.len(), "{what}: number of values");
    let scale = 1.0 + expected.iter().fold(0.0, |m: f64, b| m.max(b.abs()));
    for (a, b) in found.iter().zip(expected) {
        assert!((a - b).abs() < tolerance * scale, "{what}: {a}, expected {b}");
    }
}

/// Relative error that a derivative by differences may have.
const OF_DIFFERENCES: f64 = 0.02;

fn to_vec<B: Backend, const D: usize>(x: Tensor<B, D>) -> Vec<f64> {
    x.into_data().iter::<f64>().collect()
}

/// Gaussian noise in antithetic pairs, on the only site.
fn source() -> NoiseSource {
    NoiseSource {
        law: NoiseLaw::Gaussian,
        sampling: Sampling::Antithetic,
        sigma: 0.1,
        seed: 3,
        step: 0,
        sites: None,
        spans: Default::default(),
        spread: false,
        shared: false,
        on_device: false,
    }
}

/// A model of one site, what it gives, and the mask that it is called under.
struct Check<'a, B: Backend, M: ForwardModel<B>> {
    model: &'a M,
    input: &'a M::Input,
    clean: &'a Tensor<B, 2>,
    mask: Option<Tensor<B, 2, Int>>,
}

impl<B: Backend, M: ForwardModel<B>> Clone for Check<'_, B, M> {
    fn clone(&self) -> Self {
        Self { mask: self.mask.clone(), ..*self }
    }
}

impl<B: Backend, M: ForwardModel<B, Output = Tensor<B, 2>>> Check<'_, B, M> {
    fn forward(&self, rows: &[usize], probe: &mut Probe<B>) -> Tensor<B, 2> {
        let input = self.input.rows(rows);
        match &self.mask {
            Some(mask) => probe.masked(mask.rows(rows), |probe| self.model.forward(input, probe)),
            None => self.model.forward(input, probe),
        }
    }

    fn record(&self, rows: &[usize], trained: &Arc<HashSet<ParamId>>) -> Recorded<B> {
        let mut probe = Probe::record(trained.clone(), Prefix::empty());
        self.forward(rows, &mut probe);
        let mut sites = probe.recorded();
        assert_eq!(sites.len(), 1, "the model has one site");
        sites.remove(0)
    }

    /// 1 at each coordinate of a real token of every row, else 0.
    fn real(&self, recorded: &Recorded<B>) -> Vec<f64> {
        let ones = self.clean.ones_like();
        to_vec(recorded.mask.as_ref().map_or(ones.clone(), |mask| mask.apply(ones)))
    }

    /// Some queries for each row of the input.
    fn query_rows(&self) -> Arc<QueryRows> {
        let positions: Vec<usize> = (0..self.clean.dims()[0]).collect();
        Arc::new(QueryRows::new(&positions, positions.iter().map(|i| 0..1 + (i + 1) % 3)))
    }

    fn query(&self, trained: &Arc<HashSet<ParamId>>, rank: Option<usize>, rows: &Arc<QueryRows>) -> Tensor<B, 2> {
        let query = Query::new(rows.clone(), source(), None, rank);
        let all: Vec<usize> = (0..self.clean.dims()[0]).collect();
        self.forward(&all, &mut Probe::query(trained.clone(), Prefix::empty(), query))
    }

    /// E‖Σ_k ε_k ∂_k‖² = Σ_k ‖∂_k‖² of each row, by each coordinate in turn; Σ_k ⟨∂_k, u⟩² where the
    /// norm is an estimate along u.
    fn norms(&self, recorded: &Recorded<B>, trained: &Arc<HashSet<ParamId>>) {
        let [rows, coordinates] = self.clean.dims();
        let direction = recorded.site.norm_direction();
        let signs = |id: ParamId| direction.as_ref().map(|u| u.get(id).map(|u| to_vec(u.clone())).unwrap_or_default());
        for id in trained.iter() {
            let are_signs = signs(*id).is_none_or(|u| !u.is_empty() && u.iter().all(|u| u.abs() == 1.0));
            assert!(are_signs, "the norm direction has no signs for parameter {id}");
        }
        let norm = recorded.squared_score_norm(rows).expect("one squared score norm for each row");
        let squares = norm.squares.map_or(vec![0.0; rows], to_vec);
        for (row, square) in squares.into_iter().enumerate() {
            let site = self.record(&[row], trained);
            let mut sum = 0.0;
            for k in 0..coordinates {
                let mut unit = vec![0f32; coordinates];
                unit[k] = 1.0;
                let unit = Tensor::from_data(TensorData::new(unit, [1, coordinates]), &self.clean.device());
                let mut gradients = Gradients::default();
                site.backward(unit, &mut gradients);
                gradients.retain(trained);
                let of = |id: &ParamId| gradients.get(*id).map(|g| to_vec(g.clone())).unwrap_or_default();
                sum += match &direction {
                    None => trained.iter().flat_map(of).map(|g| g * g).sum::<f64>(),
                    Some(_) => {
                        let along = |id: &ParamId| -> f64 {
                            of(id).iter().zip(signs(*id).unwrap_or_default()).map(|(g, u)| g * u).sum()
                        };
                        trained.iter().map(along).sum::<f64>().powi(2)
                    }
                };
            }
            let tolerance = if direction.is_some() { OF_DIFFERENCES } else { 2e-5 };
            let what = format!("squared score norm of row {row}");
            close_within(tolerance, &[norm.constant + norm.factor * square], &[sum], &what);
        }
    }

    /// A row under noise of low rank is what the layer with the perturbed parameters gives.
    fn low_rank(&self, recorded: &Recorded<B>, trained: &Arc<HashSet<ParamId>>) {
        let (noise, rank, rows) = (source(), 2, self.query_rows());
        let perturbed = self.query(trained, Some(rank), &rows);
        let layout = Layout::new(&*recorded.site, recorded.coordinates, rank);
        let (mut draw, real) = (vec![0f32; layout.len()], self.real(recorded));
        for (r, key) in rows.keys.iter().enumerate() {
            let (direction, sign) = noise.signed(0, key).expect("noise falls on the only site");
            noise.draw(0, key.position, direction, None, &mut draw);
            let scale = f64::from(sign) * noise.sigma;
            let example = [rows.datum[r]];
            let expected = match recorded.site.weight_noise() {
                Some(weight_noise) => {
                    let steps = self.steps(weight_noise, &layout, &draw, scale);
                    let missing = trained.iter().find(|id| steps.get(**id).is_none());
                    assert!(missing.is_none(), "weight noise leaves out parameter {missing:?}");
                    let moved = self.model.clone().map(&mut Step(&steps));
                    to_vec(moved.forward(self.input.rows(&example), &mut Probe::clean()))
                }
                None => {
                    let (y, real) = (to_vec(self.clean.clone().rows(&example)), &real[rows.datum[r] * layout.output..]);
                    y.iter().zip(&draw).zip(real).map(|((y, &e), real)| y + real * scale * f64::from(e)).collect()
                }
            };
            close(&to_vec(perturbed.clone().rows(&[r])), &expected, "output under noise of low rank");
        }
    }

    /// What a draw adds to the parameters.
    fn steps(&self, noise: &dyn WeightNoise<B>, layout: &Layout, draw: &[f32], scale: f64) -> Gradients<B> {
        let (rank, device) = (layout.rank, self.clean.device());
        let (factors, rest) = draw.split_at(layout.left() + layout.right());
        let part = |range: Range<usize>, shape: [usize; 2]| {
            Tensor::<B, 2>::from_data(TensorData::new(factors[range].to_vec(), shape), &device)
        };
        let matrix = layout.matrix().map(|[left, right]| {
            let a = part(0..layout.left(), [left, rank]);
            a.matmul(part(layout.left()..factors.len(), [rank, right])) * (scale / (rank as f64).sqrt())
        });
        let vectors = (layout.vectors > 0)
            .then(|| Tensor::<B, 1>::from_data(TensorData::new(rest.to_vec(), [rest.len()]), &device) * scale);
        let mut steps = Gradients::default();
        noise.add_gradients(matrix, vectors, &mut steps);
        assert_eq!(steps.check(self.model), Ok(()));
        steps
    }

    /// Noise falls on the output at real tokens, and each row has its own.
    fn output_noise(&self, trained: &Arc<HashSet<ParamId>>) {
        let rows = self.query_rows();
        let all: Vec<usize> = (0..self.clean.dims()[0]).collect();
        let real = self.real(&self.record(&all, trained));
        let coordinates = self.clean.dims()[1];
        let mut expected = to_vec(self.clean.clone().rows(&rows.datum));
        source().perturb(0, &rows.keys, coordinates, |r, start, noise| {
            let here = &mut expected[r * coordinates + start..];
            let real = &real[rows.datum[r] * coordinates + start..];
            here.iter_mut().zip(noise).zip(real).for_each(|((y, &e), real)| *y += real * f64::from(e));
        });
        close(&to_vec(self.query(trained, None, &rows)), &expected, "perturbed output");
    }
}
