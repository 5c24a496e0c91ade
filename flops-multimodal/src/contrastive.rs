//! The contrastive loss of image-text pairs (CLIP, Radford et al. 2021, arXiv 2103.00020), one
//! query at a time.
//!
//! Let uᵢ be the unit embeddings of the images, vᵢ those of the texts, and s_ik = e^τ uᵢ·v_k their
//! similarities. The loss of a batch of B pairs is
//!
//! L = (1/2B) Σᵢ [lse_k s_ik − s_ii + lse_k s_ki − s_ii],
//!
//! with lse the logarithm of the sum of exponentials. Pair j appears in every term. Its query loss
//! is therefore ℓ_j + B·(L′ − L). Here ℓ_j is pair j's own two terms, and L′ is the loss with only
//! row j and column j replaced.
//!
//! The clean pass stores, for each pair k ≠ j, the lse of its row and of its column without entry
//! j. A query then computes only its own B similarities in each direction.

use std::sync::Arc;

use burn::prelude::*;
use burn::tensor::activation::log_softmax;
use burn::tensor::backend::{AutodiffBackend, DeviceId};
use flops_core::{Lift, Rows};

/// Unit embeddings of pairs, and the scale of their similarities: the output of an
/// [`Alignment`](crate::Alignment).
#[derive(Clone, Debug, Rows)]
pub struct PairEmbeddings<B: Backend> {
    /// Embeddings of the images, of length 1, `[rows, dim]`.
    pub images: Tensor<B, 2>,
    /// Embeddings of the texts, of length 1, `[rows, dim]`.
    pub texts: Tensor<B, 2>,
    /// e^τ, `[1]`.
    #[rows(shared)]
    pub scale: Tensor<B, 1>,
}

/// What the query losses of a batch need from its clean pass.
#[derive(Clone, Debug)]
struct CleanBatch<B: Backend> {
    images: Tensor<B, 2>,
    texts: Tensor<B, 2>,
    /// lse of row i without its entry k, at `[k, i]`.
    row_lse_without: Tensor<B, 2>,
    /// lse of column i without its entry k, at `[k, i]`.
    column_lse_without: Tensor<B, 2>,
    /// lse of each row, `[1, pairs]`.
    row_lse: Tensor<B, 2>,
    /// lse of each column, `[1, pairs]`.
    column_lse: Tensor<B, 2>,
    derivatives: Derivatives<B>,
}

/// It is the same for all rows, and goes where they go.
impl<B: Backend> Rows for CleanBatch<B> {
    fn rows(&self, _: &[usize]) -> Self {
        self.clone()
    }

    fn cat(mut parts: Vec<Self>) -> Self {
        parts.remove(0)
    }

    fn check_rows(&self, _: usize) -> Result<(), usize> {
        Ok(())
    }

    fn to_device_of(self, device: DeviceId) -> Self {
        let Derivatives { images, texts, tau } = self.derivatives;
        Self {
            images: self.images.to_device_of(device),
            texts: self.texts.to_device_of(device),
            row_lse_without: self.row_lse_without.to_device_of(device),
            column_lse_without: self.column_lse_without.to_device_of(device),
            row_lse: self.row_lse.to_device_of(device),
            column_lse: self.column_lse.to_device_of(device),
            derivatives: Derivatives {
                images: images.to_device_of(device),
                texts: texts.to_device_of(device),
                tau: tau.to_device_of(device),
            },
        }
    }
}

/// The derivatives of the batch's loss, in closed form.
///
/// ∂L/∂s = (P + Q − 2I)/2B, with P the softmax of the rows of s and Q the softmax of its columns.
#[derive(Clone, Debug)]
pub(crate) struct Derivatives<B: Backend> {
    /// ∂L/∂u, `[pairs, dim]`.
    pub images: Tensor<B, 2>,
    /// ∂L/∂v, `[pairs, dim]`.
    pub texts: Tensor<B, 2>,
    /// ∂L/∂τ, `[1]`.
    pub tau: Tensor<B, 1>,
}

/// The targets of pairs. They need no labels: the text of an image is the one in the same row.
///
/// After [coupling](flops_core::ForwardModel::couple) they hold the clean outputs of the whole
/// batch.
#[derive(Clone, Debug, Rows)]
pub struct Pairs<B: Backend> {
    /// Position of each row's pair in the batch.
    index: Vec<usize>,
    #[rows(shared)]
    clean: Option<Arc<CleanBatch<B>>>,
}

impl<B: Backend> Pairs<B> {
    /// The targets of a batch of `pairs` pairs.
    #[must_use]
    pub fn new(pairs: usize) -> Self {
        Self { index: (0..pairs).collect(), clean: None }
    }

    /// The derivatives of the whole batch, after coupling.
    pub(crate) fn derivatives(&self) -> Option<&Derivatives<B>> {
        self.clean.as_ref().map(|clean| &clean.derivatives)
    }
}

/// Before coupling: what a clean pass leaves is made anew by one on that backend.
impl<B: AutodiffBackend> Lift<B> for Pairs<B::InnerBackend> {
    type Lifted = Pairs<B>;

    fn lift(self) -> Self::Lifted {
        Pairs { index: self.index, clean: None }
    }
}

/// ℓ_j of each pair: half the sum of its two cross-entropies. Their mean is the batch's loss.
///
/// # Shapes
/// - logits: `[pairs, pairs]`, images by texts
/// - returns: `[pairs]`
fn own_terms<B: Backend>(logits: Tensor<B, 2>) -> Tensor<B, 1> {
    let pairs = logits.dims()[0];
    let index = Tensor::<B, 1, Int>::arange(0..pairs as i64, &logits.device()).reshape([pairs, 1]);
    let by_image = log_softmax(logits.clone(), 1).gather(1, index.clone());
    let by_text = log_softmax(logits.transpose(), 1).gather(1, index);
    (by_image + by_text).mul_scalar(-0.5).reshape([pairs])
}

/// log(eᵃ + eᵇ), without overflow.
fn log_add_exp<B: Backend>(a: Tensor<B, 2>, b: Tensor<B, 2>) -> Tensor<B, 2> {
    let max = a.clone().max_pair(b.clone());
    max + (a - b).abs().neg().exp().log1p()
}

/// Similarities of all images with all texts, `[images, texts]`, in f32.
pub(crate) fn similarities<B: Backend>(output: &PairEmbeddings<B>) -> Tensor<B, 2> {
    let full = |x: &Tensor<B, 2>| x.clone().cast(burn::tensor::DType::F32);
    let scale = output.scale.clone().cast(burn::tensor::DType::F32).reshape([1, 1]);
    full(&output.images).matmul(full(&output.texts).transpose()) * scale
}

/// The query loss of each row, see the [module](self); before coupling, its own terms ℓ_j.
///
/// # Shapes
/// - returns: `[rows]`
pub(crate) fn losses<B: Backend>(output: PairEmbeddings<B>, target: Pairs<B>) -> Tensor<B, 1> {
    let Some(clean) = target.clean else { return own_terms(similarities(&output)) };
    let (rows, device) = (target.index.len(), output.images.device());
    let pairs = clean.images.dims()[0];
    let index: Vec<i32> = target.index.iter().map(|&i| i as i32).collect();
    let index = Tensor::<B, 1, Int>::from_data(TensorData::new(index, [rows]), &device);
    let all = Tensor::<B, 1, Int>::arange(0..pairs as i64, &device).reshape([1, pairs]).expand([rows, pairs]);
    let own = index.clone().reshape([rows, 1]).expand([rows, pairs]).equal(all);
    let own = own.float().cast(burn::tensor::DType::F32);
    let full = |x: Tensor<B, 2>| x.cast(burn::tensor::DType::F32);
    let (images, texts) = (full(output.images), full(output.texts));
    let scale = output.scale.cast(burn::tensor::DType::F32).reshape([1, 1]);
    // s_jj depends on both replaced embeddings
    let itself = (images.clone() * texts.clone()).sum_dim(1) * scale.clone();
    let others = own.clone().neg().add_scalar(1.0);
    let against = |x: Tensor<B, 2>, all: &Tensor<B, 2>| {
        x.matmul(all.clone().transpose()) * scale.clone() * others.clone() + own.clone() * itself.clone()
    };
    let (row, column) = (against(images, &clean.texts), against(texts, &clean.images));
    let lse = |x: Tensor<B, 2>| {
        let max = x.clone().max_dim(1);
        (x - max.clone()).exp().sum_dim(1).log() + max
    };
    // the terms of the other pairs: entry j of row i is entry i of this query's column j
    let lse_change = |entries: Tensor<B, 2>, without: &Tensor<B, 2>, full: &Tensor<B, 2>| {
        let changed = log_add_exp(without.clone().select(0, index.clone()), entries) - full.clone();
        (changed * others.clone()).sum_dim(1)
    };
    let change = lse_change(column.clone(), &clean.row_lse_without, &clean.row_lse)
        + lse_change(row.clone(), &clean.column_lse_without, &clean.column_lse);
    ((lse(row) + lse(column) - itself.mul_scalar(2.0) + change).mul_scalar(0.5)).reshape([rows])
}

/// The coupled targets of a batch, from its clean output.
pub(crate) fn couple<B: Backend>(output: &PairEmbeddings<B>) -> Pairs<B> {
    let logits = similarities(output);
    let derivatives = derivatives(output, &logits);
    let ([pairs, _], device) = (logits.dims(), logits.device());
    let values: Vec<f64> = logits.into_data().iter::<f64>().collect();
    // lse of each row of `entry`, and without each of its entries
    let row_lses = |entry: &dyn Fn(usize, usize) -> f64| {
        let (mut full, mut without) = (Vec::with_capacity(pairs), vec![0f32; pairs * pairs]);
        for i in 0..pairs {
            let terms: Vec<f64> = (0..pairs).map(|k| entry(i, k)).collect();
            let (top, largest) = terms
                .iter()
                .copied()
                .enumerate()
                .fold((0, f64::NEG_INFINITY), |a, (k, v)| if v > a.1 { (k, v) } else { a });
            let sum: f64 = terms.iter().map(|v| (v - largest).exp()).sum();
            full.push((sum.ln() + largest) as f32);
            for (k, v) in terms.iter().enumerate() {
                // without the largest term, subtraction would cancel
                let rest = if k == top { lse_without(&terms, top) } else { (sum - (v - largest).exp()).ln() + largest };
                without[k * pairs + i] = rest as f32;
            }
        }
        let tensor =
            |values: Vec<f32>, shape: [usize; 2]| Tensor::<B, 2>::from_data(TensorData::new(values, shape), &device);
        (tensor(full, [1, pairs]), tensor(without, [pairs, pairs]))
    };
    let (row_lse, row_lse_without) = row_lses(&|i, k| values[i * pairs + k]);
    let (column_lse, column_lse_without) = row_lses(&|i, k| values[k * pairs + i]);
    let full = |x: &Tensor<B, 2>| x.clone().cast(burn::tensor::DType::F32);
    let (images, texts) = (full(&output.images), full(&output.texts));
    let clean = CleanBatch { images, texts, row_lse_without, column_lse_without, row_lse, column_lse, derivatives };
    Pairs { index: (0..pairs).collect(), clean: Some(Arc::new(clean)) }
}

/// lse of all terms but one. A batch of one pair leaves no term, and −10³⁰ stands for log 0.
fn lse_without(terms: &[f64], left_out: usize) -> f64 {
    let rest = || terms.iter().enumerate().filter(|(k, _)| *k != left_out).map(|(_, v)| *v);
    let largest = rest().fold(f64::NEG_INFINITY, f64::max);
    if largest == f64::NEG_INFINITY { -1e30 } else { rest().map(|v| (v - largest).exp()).sum::<f64>().ln() + largest }
}

/// The derivatives of the loss of a batch with these similarities.
fn derivatives<B: Backend>(output: &PairEmbeddings<B>, logits: &Tensor<B, 2>) -> Derivatives<B> {
    let pairs = logits.dims()[0];
    let softmax = |x: Tensor<B, 2>| burn::tensor::activation::softmax(x, 1);
    let eye = Tensor::<B, 2>::eye(pairs, &logits.device());
    let by_text = softmax(logits.clone().transpose()).transpose();
    let g = (softmax(logits.clone()) + by_text - eye.mul_scalar(2.0)).div_scalar(2.0 * pairs as f64);
    let scale = output.scale.clone().cast(burn::tensor::DType::F32).reshape([1, 1]);
    let full = |x: &Tensor<B, 2>| x.clone().cast(burn::tensor::DType::F32);
    let images = g.clone().matmul(full(&output.texts)) * scale.clone();
    let texts = g.clone().transpose().matmul(full(&output.images)) * scale;
    // s is proportional to e^τ
    Derivatives { images, texts, tau: (g * logits.clone()).sum().reshape([1]) }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};
    use rand::rngs::StdRng;
    use rand::{RngExt, SeedableRng};

    type B = Flex;

    fn unit(rows: usize, dim: usize, rng: &mut StdRng) -> Vec<f32> {
        let raw: Vec<f32> = (0..rows * dim).map(|_| rng.random::<f32>() - 0.5).collect();
        let rows = raw.chunks(dim);
        rows.flat_map(|r| {
            let norm = r.iter().map(|x| x * x).sum::<f32>().sqrt();
            r.iter().map(move |x| x / norm).collect::<Vec<_>>()
        })
        .collect()
    }

    fn embeddings<B: Backend>(images: &[f32], texts: &[f32], dim: usize, scale: f32) -> PairEmbeddings<B> {
        let device = Default::default();
        let of = |v: &[f32]| Tensor::from_data(TensorData::new(v.to_vec(), [v.len() / dim, dim]), &device);
        PairEmbeddings { images: of(images), texts: of(texts), scale: Tensor::from_data([scale], &device) }
    }

    fn values<const D: usize>(x: Tensor<B, D>) -> Vec<f32> {
        x.into_data().iter::<f32>().collect()
    }

    /// L of the batch by its definition, in f64.
    fn batch_loss(images: &[f32], texts: &[f32], dim: usize, scale: f32) -> f64 {
        let pairs = images.len() / dim;
        let s = |i: usize, k: usize| {
            let dot: f64 = (0..dim).map(|d| images[i * dim + d] as f64 * texts[k * dim + d] as f64).sum();
            scale as f64 * dot
        };
        let lse = |terms: Vec<f64>| {
            let top = terms.iter().copied().fold(f64::NEG_INFINITY, f64::max);
            terms.iter().map(|t| (t - top).exp()).sum::<f64>().ln() + top
        };
        let term = |i: usize| {
            lse((0..pairs).map(|k| s(i, k)).collect()) + lse((0..pairs).map(|k| s(k, i)).collect()) - 2.0 * s(i, i)
        };
        (0..pairs).map(term).sum::<f64>() / (2 * pairs) as f64
    }

    #[test]
    fn query_losses_match_the_definition() {
        let dim = 6;
        // from a flat softmax to one that a single pair dominates
        for (seed, (pairs, scale)) in [(5, 1.0), (12, 14.0), (3, 100.0), (2, 10.0), (1, 10.0)].into_iter().enumerate() {
            let mut rng = StdRng::seed_from_u64(seed as u64);
            let (images, texts) = (unit(pairs, dim, &mut rng), unit(pairs, dim, &mut rng));
            let clean = embeddings::<B>(&images, &texts, dim, scale);
            let own = values(losses(clean.clone(), Pairs::new(pairs)));
            let loss = batch_loss(&images, &texts, dim, scale);
            let mean = own.iter().sum::<f32>() as f64 / pairs as f64;
            assert!((mean - loss).abs() < 1e-5 * (1.0 + loss), "mean {mean}, loss {loss}");
            let target = couple(&clean);
            let again = values(losses(clean, target.clone()));
            for (a, b) in own.iter().zip(&again) {
                assert!((a - b).abs() < 2e-5 * (1.0 + a.abs()), "unperturbed: {a} and {b}");
            }
            // three queries of each pair, in another order
            let index: Vec<usize> = (0..3 * pairs).map(|i| (i * 7) % pairs).collect();
            let (u, v) = (unit(index.len(), dim, &mut rng), unit(index.len(), dim, &mut rng));
            let got = values(losses(embeddings::<B>(&u, &v, dim, scale), target.rows(&index)));
            for (row, &j) in index.iter().enumerate() {
                let (mut images, mut texts) = (images.clone(), texts.clone());
                images[j * dim..(j + 1) * dim].copy_from_slice(&u[row * dim..(row + 1) * dim]);
                texts[j * dim..(j + 1) * dim].copy_from_slice(&v[row * dim..(row + 1) * dim]);
                let change = pairs as f64 * (batch_loss(&images, &texts, dim, scale) - loss);
                let expected = own[j] as f64 + change;
                let error = (got[row] as f64 - expected).abs();
                assert!(error < 1e-4 * (1.0 + expected.abs()), "{pairs} pairs, row {row}: {} for {expected}", got[row]);
            }
        }
    }

    #[test]
    fn derivatives_match_autodiff() {
        let (pairs, dim, tau) = (7, 5, 1.7f32);
        let mut rng = StdRng::seed_from_u64(1);
        let (images, texts) = (unit(pairs, dim, &mut rng), unit(pairs, dim, &mut rng));
        type A = Autodiff<Flex>;
        let mut with_graph = embeddings::<A>(&images, &texts, dim, 1.0);
        with_graph.images = with_graph.images.require_grad();
        with_graph.texts = with_graph.texts.require_grad();
        let parameter = Tensor::<A, 1>::from_data([tau], &Default::default()).require_grad();
        with_graph.scale = parameter.clone().exp();
        let gradients = losses(with_graph.clone(), Pairs::new(pairs)).mean().backward();
        let target = couple(&embeddings::<B>(&images, &texts, dim, tau.exp()));
        let Derivatives { images: u, texts: v, tau: t } = target.derivatives().unwrap().clone();
        let close = |got: Vec<f32>, expected: Vec<f32>| {
            for (a, b) in got.iter().zip(&expected) {
                assert!((a - b).abs() < 1e-5, "{a} for {b}");
            }
        };
        close(values(u), values(with_graph.images.grad(&gradients).unwrap()));
        close(values(v), values(with_graph.texts.grad(&gradients).unwrap()));
        close(values(t), values(parameter.grad(&gradients).unwrap()));
    }

    /// The gradient of a query loss at the clean output is B times the batch's. Without the other
    /// pairs' terms, where pair j is a negative, it is not.
    #[test]
    fn query_loss_gradients_match_the_batch() {
        let (pairs, dim, scale) = (9, 4, 5.0);
        let mut rng = StdRng::seed_from_u64(4);
        let (images, texts) = (unit(pairs, dim, &mut rng), unit(pairs, dim, &mut rng));
        type A = Autodiff<Flex>;
        let clean = embeddings::<A>(&images, &texts, dim, scale);
        let target = couple(&clean);
        let plain = couple(&embeddings::<B>(&images, &texts, dim, scale));
        let Derivatives { images: u, texts: v, .. } = plain.derivatives().unwrap().clone();
        let expected = [values(u), values(v)].map(|g| g.iter().map(|x| x * pairs as f32).collect::<Vec<_>>());
        let all: Vec<usize> = (0..pairs).collect();
        let gradients = |target: Option<Pairs<A>>| {
            let mut query = clean.clone();
            query.images = query.images.detach().require_grad();
            query.texts = query.texts.detach().require_grad();
            // each row is a query; the other pairs stay at their clean values
            let loss = match target {
                Some(target) => losses(query.clone(), target.rows(&all)),
                // ℓ_j alone: row and column j replaced, without the terms of the other pairs
                None => {
                    let eye = Tensor::<A, 2>::eye(pairs, &query.images.device());
                    let others = eye.clone().neg().add_scalar(1.0);
                    let itself = (query.images.clone() * query.texts.clone()).sum_dim(1).mul_scalar(scale);
                    let lse = |x: &Tensor<A, 2>, all: &Tensor<A, 2>| {
                        let s = x.clone().matmul(all.clone().transpose()).mul_scalar(scale);
                        (s * others.clone() + eye.clone() * itself.clone()).exp().sum_dim(1).log()
                    };
                    let sum = lse(&query.images, &clean.texts) + lse(&query.texts, &clean.images);
                    (sum - itself.clone().mul_scalar(2.0)).mul_scalar(0.5).reshape([pairs])
                }
            };
            let gradients = loss.sum().backward();
            [values(query.images.grad(&gradients).unwrap()), values(query.texts.grad(&gradients).unwrap())]
        };
        let distance = |got: [Vec<f32>; 2]| {
            let all = got.iter().flatten().zip(expected.iter().flatten());
            all.map(|(a, b)| (a - b).abs()).fold(0.0, f32::max)
        };
        let (exact, own) = (distance(gradients(Some(target))), distance(gradients(None)));
        assert!(exact < 1e-4, "off by {exact}");
        assert!(own > 0.1, "own terms alone are off by only {own}");
    }
}
