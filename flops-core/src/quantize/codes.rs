//! A quantized parameter on the host: integers packed into words, and their scales.

use burn::backend::Flex;
use burn::prelude::*;
use burn::tensor::quantization::{QuantScheme, QuantStore};
use burn::tensor::{Bytes, DType, TensorData};
use rand::RngExt;

use super::scheme::{Grid, Rounding, packed};
use crate::error::Error;
use crate::random::{derive_seed, keyed_rng};

/// Separates the draws of stochastic rounding from other random numbers of the same seed.
const ROUND: u64 = u64::from_le_bytes(*b"rounding");

/// What an update is rounded by.
#[derive(Clone, Copy, Debug)]
pub(super) struct RoundKey {
    pub rounding: Rounding,
    pub seed: u64,
    /// Updates of the model so far.
    pub update: u64,
    /// Number of the parameter in the model.
    pub position: usize,
}

/// Integers and scales of a parameter.
///
/// Words and scales together are Burn's own layout of packed weights.
#[derive(Clone, Debug, PartialEq)]
pub(super) struct Codes {
    scheme: QuantScheme,
    grid: Grid,
    shape: Vec<usize>,
    /// The precision of the floats.
    dtype: DType,
    words: Vec<u32>,
    scales: Vec<f32>,
}

impl Codes {
    /// Quantizes values by Burn's rule: the largest absolute value of a block is its largest integer.
    ///
    /// Burn's host backend does it, so that every backend gets the same integers.
    pub fn quantize(values: &[f32], shape: &[usize], (scheme, dtype): (QuantScheme, DType)) -> Result<Self, Error> {
        let (scheme, grid) = (packed(scheme), Grid::of(&scheme)?);
        let flat = Tensor::<Flex, 1>::from_data(TensorData::new(values.to_vec(), [values.len()]), &Default::default());
        let data = flat.quantize_dynamic(&scheme.with_store(QuantStore::Native)).into_data();
        // a byte for each integer, and then the scales
        let (codes, rest) = data.as_bytes().split_at(values.len());
        let scales = values.len().div_ceil(grid.values_of_a_scale(values.len()));
        let of_scales = &rest[rest.len() - 4 * scales..];
        let codes: Vec<i8> = codes.iter().map(|&byte| byte as i8).collect();
        Ok(Self {
            scheme,
            grid,
            shape: shape.to_vec(),
            dtype,
            words: pack(&codes, grid.bits),
            scales: floats(of_scales),
        })
    }

    /// The parameter of a record.
    ///
    /// # Errors
    /// What is wrong with it.
    pub fn from_data(data: &TensorData, dtype: DType) -> Result<Self, String> {
        let DType::QFloat(scheme) = data.dtype else { return Err(format!("its type is {:?}", data.dtype)) };
        let grid = Grid::of(&scheme).map_err(|error| error.to_string())?;
        let (shape, bytes) = (data.shape.to_vec(), data.as_bytes());
        let len: usize = shape.iter().product();
        let (words, scales) = (len.div_ceil(32 / grid.bits), len.div_ceil(grid.values_of_a_scale(len)));
        if bytes.len() != 4 * (words + scales) || scheme != packed(scheme) {
            return Err(format!("it has {} bytes where {} are expected", bytes.len(), 4 * (words + scales)));
        }
        let (of_words, of_scales) = bytes.split_at(4 * words);
        let words = of_words.chunks_exact(4).map(|w| u32::from_le_bytes([w[0], w[1], w[2], w[3]])).collect();
        Ok(Self { scheme, grid, shape, dtype, words, scales: floats(of_scales) })
    }

    /// The parameter for a record, or for a tensor of Burn.
    pub fn to_data(&self) -> TensorData {
        let all: Vec<u32> = self.words.iter().copied().chain(self.scales.iter().map(|s| s.to_bits())).collect();
        TensorData::from_bytes(Bytes::from_elems(all), self.shape.clone(), DType::QFloat(self.scheme))
    }

    pub fn shape(&self) -> &[usize] {
        &self.shape
    }

    pub fn dtype(&self) -> DType {
        self.dtype
    }

    pub fn scheme(&self) -> QuantScheme {
        self.scheme
    }

    /// Number of values.
    pub fn len(&self) -> usize {
        self.shape.iter().product()
    }

    /// Whether all integers of a block are 0: values so small that they have no scale.
    pub fn has_zero_block(&self) -> bool {
        let codes = self.codes();
        codes.chunks(self.grid.values_of_a_scale(codes.len())).any(|block| block.iter().all(|&code| code == 0))
    }

    /// Number of scales.
    pub fn num_scales(&self) -> usize {
        self.scales.len()
    }

    /// Whether the last axis fills whole words.
    ///
    /// Burn takes the rest of a word that 8-bit integers leave open for values.
    pub fn fills_words(&self) -> bool {
        self.shape.last().is_some_and(|side| side.is_multiple_of(32 / self.grid.bits))
    }

    /// Bytes of words and scales.
    pub fn bytes(&self) -> usize {
        4 * (self.words.len() + self.scales.len())
    }

    /// The integers.
    pub fn codes(&self) -> Vec<i8> {
        let (bits, shift, mask) = (self.grid.bits, 8 - self.grid.bits, (1u32 << self.grid.bits) - 1);
        let of_word =
            |&word: &u32| (0..32 / bits).map(move |i| (((word >> (i * bits) & mask) as u8) << shift) as i8 >> shift);
        self.words.iter().flat_map(of_word).take(self.len()).collect()
    }

    /// The values: each integer times its scale.
    pub fn values(&self) -> Vec<f32> {
        let block = self.grid.values_of_a_scale(self.len());
        let mut values: Vec<f32> = self.codes().into_iter().map(f32::from).collect();
        for (block, scale) in values.chunks_mut(block).zip(&self.scales) {
            block.iter_mut().for_each(|value| *value *= scale);
        }
        values
    }

    /// Multiplies the scales.
    pub fn scale_by(&mut self, factors: &[f32]) {
        self.scales.iter_mut().zip(factors).for_each(|(scale, factor)| *scale *= factor);
    }

    /// The values as a tensor of floats.
    pub fn float<B: Backend, const D: usize>(&self, device: &B::Device) -> Tensor<B, D> {
        Tensor::from_data(TensorData::new(self.values(), self.shape.clone()), (device, self.dtype))
    }

    /// The integers as a quantized tensor of Burn; not on a backend of autodiff, which has none.
    pub fn quantized<B: Backend, const D: usize>(&self, device: &B::Device) -> Tensor<B, D> {
        Tensor::from_data(self.to_data(), device)
    }

    /// A number that differs where the weights do.
    pub fn checksum(&self) -> u64 {
        let words = self.words.iter().chain(&[0]).map(|&w| u64::from(w));
        words.chain(self.scales.iter().map(|s| u64::from(s.to_bits()))).fold(0, |hash, word| derive_seed(&[hash, word]))
    }

    /// Brings new values to the grid. Where none differs from the [present](Self::values) ones,
    /// nothing changes.
    ///
    /// Values outside the grid go to its end. A value that is not finite makes the scale NaN, so that
    /// the loss shows it. `residual` has what error feedback keeps.
    pub fn round(&mut self, values: &[f32], residual: &mut Option<Vec<f32>>, key: RoundKey) {
        let present = self.values();
        if present.iter().zip(values).all(|(old, new)| old.to_bits() == new.to_bits()) {
            return;
        }
        let mut rng = keyed_rng([derive_seed(&[key.seed, ROUND]), key.update, key.position as u64, 0]);
        let mut kept = match key.rounding {
            Rounding::ErrorFeedback => Some(residual.take().unwrap_or_else(|| vec![0.0; values.len()])),
            Rounding::Nearest | Rounding::Stochastic => None,
        };
        let (mut codes, block) = (self.codes(), self.grid.values_of_a_scale(values.len()));
        let (low, high) = self.grid.range;
        for (index, &value) in values.iter().enumerate() {
            let scale = self.scales[index / block];
            if !value.is_finite() {
                self.scales[index / block] = f32::NAN;
                continue;
            }
            let on_grid = |x: f32| (x / scale).clamp(low, high);
            match (key.rounding, &mut kept) {
                (Rounding::Stochastic, _) => {
                    let draw = rng.random::<f32>();
                    if value.to_bits() != present[index].to_bits() {
                        let x = on_grid(value);
                        codes[index] = (x.floor() + f32::from(u8::from(draw < x - x.floor()))) as i8;
                    }
                }
                (_, Some(kept)) => {
                    let wanted = value + kept[index];
                    codes[index] = on_grid(wanted).round() as i8;
                    // what lies outside the grid is given up
                    let off = wanted - scale * f32::from(codes[index]);
                    kept[index] = off.clamp(-0.5 * scale, 0.5 * scale);
                }
                (_, None) => codes[index] = on_grid(value).round() as i8,
            }
        }
        self.words = pack(&codes, self.grid.bits);
        *residual = kept;
    }
}

/// Packs integers into words, the first into the lowest bits.
fn pack(codes: &[i8], bits: usize) -> Vec<u32> {
    let mask = (1u32 << bits) - 1;
    let word =
        |codes: &[i8]| codes.iter().enumerate().fold(0, |word, (i, &code)| word | (code as u32 & mask) << (i * bits));
    codes.chunks(32 / bits).map(word).collect()
}

fn floats(bytes: &[u8]) -> Vec<f32> {
    bytes.chunks_exact(4).map(|b| f32::from_le_bytes([b[0], b[1], b[2], b[3]])).collect()
}
