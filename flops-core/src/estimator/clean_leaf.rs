//! The clean pass of a leaf, and how its result travels.

use std::any::Any;
use std::collections::HashSet;
use std::ops::Range;
use std::sync::{Arc, Mutex};

use burn::module::ParamId;
use burn::prelude::*;
use burn::tensor::TensorData;

use super::rounds::Codec;
use crate::batch::Rows;
use crate::probe::{Passes, Stages, TokenMask, TracedSite};
use crate::wire::{Reader, Writer};

/// What the clean pass of a leaf gives. Rows are in the order of the batch.
pub(super) struct CleanLeaf<B: Backend, O> {
    pub losses: Vec<f64>,
    /// `None` for a leaf without examples.
    pub output: Option<O>,
    pub embeddings: Option<Tensor<B, 2>>,
    pub masks: LeafMasks<B>,
    /// Values of a row at each site.
    pub coordinates: Vec<usize>,
    /// Rows of the largest pass.
    pub largest: usize,
    /// What stays where the leaf ran.
    pub here: Option<LeafTrace>,
}

/// What a clean pass leaves for the passes after it.
pub(super) struct LeafTrace {
    pub stages: Stages,
    pub reached: HashSet<ParamId>,
    pub sites: Vec<TracedSite>,
}

impl<B: Backend, O> CleanLeaf<B, O> {
    /// A leaf without examples.
    pub fn empty() -> Self {
        let (losses, coordinates) = Default::default();
        let masks = LeafMasks::Host(vec![]);
        Self { losses, output: None, embeddings: None, masks, coordinates, largest: 0, here: None }
    }
}

/// What a worker remembers of a clean pass: its form, for steps in which no leaf runs here.
///
/// Every pass of a black box costs something. A worker that replays a step asks for nothing.
#[derive(Clone, Default)]
pub(crate) struct CleanMemory(Arc<Mutex<Option<Box<dyn Any + Send>>>>);

/// The form of the clean passes of inputs of one size.
struct Remembered<B: Backend, O> {
    /// Sizes of a row of the input.
    input: Vec<usize>,
    trained: Arc<HashSet<ParamId>>,
    /// One row of a leaf.
    like: CleanLeaf<B, O>,
}

impl std::fmt::Debug for CleanMemory {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("CleanMemory")
    }
}

impl CleanMemory {
    /// Remembers the form of a leaf that ran here.
    pub(super) fn keep<B: Backend, O: Rows>(
        &self,
        (input, trained): (Vec<usize>, &Arc<HashSet<ParamId>>),
        leaf: &CleanLeaf<B, O>,
    ) {
        let mut kept = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let known = kept.as_ref().and_then(|kept| kept.downcast_ref::<Remembered<B, O>>());
        if known.is_none_or(|known| known.input != input || known.trained != *trained) {
            *kept = Some(Box::new(Remembered { input, trained: trained.clone(), like: leaf.of_one_row() }));
        }
    }

    /// The form of such leaves; `None` where none ran here.
    pub(super) fn like<B: Backend, O: Rows>(
        &self,
        (input, trained): (&[usize], &Arc<HashSet<ParamId>>),
    ) -> Option<CleanLeaf<B, O>> {
        let kept = self.0.lock().unwrap_or_else(|e| e.into_inner());
        let known = kept.as_ref()?.downcast_ref::<Remembered<B, O>>()?;
        (known.input == input && known.trained == *trained).then(|| known.like.of_one_row())
    }
}

/// The token mask of each site of a leaf that follows one.
pub(super) enum LeafMasks<B: Backend> {
    /// Of each pass: its rows, and its masks by site.
    Passes(Vec<(usize, Vec<Option<TokenMask<B>>>)>, Passes),
    /// On the host, `[examples, tokens]` by site.
    Host(Vec<Option<Vec<bool>>>),
}

impl<B: Backend> LeafMasks<B> {
    /// The mask of a site, `[examples, tokens]`.
    pub fn of_site(&self, site: usize) -> Option<Vec<bool>> {
        match self {
            Self::Host(masks) => masks.get(site)?.clone(),
            Self::Passes(parts, passes) => {
                let of_pass = |(rows, masks): &(usize, Vec<Option<TokenMask<B>>>)| {
                    masks.get(site)?.as_ref().map(|mask| mask.of_rows(*rows))
                };
                let mask = parts.iter().map(of_pass).collect::<Option<Vec<_>>>()?.concat();
                let places = passes.places();
                let n = places.len().max(1);
                let row = |&place: &usize| &mask[place * mask.len() / n..(place + 1) * mask.len() / n];
                Some(places.iter().map(row).collect::<Vec<_>>().concat())
            }
        }
    }
}

/// The result of a leaf's job: its clean pass, or the bytes of one that ran elsewhere.
///
/// Bytes are read when a leaf has run here, whose output has the form of theirs.
pub(super) enum LeafResult<B: Backend, O> {
    Read(Box<CleanLeaf<B, O>>),
    Bytes(Vec<u8>),
}

/// Sends clean passes of leaves that each have a row of at most `row_bytes`.
pub(super) struct CleanCodec {
    /// Examples of the batch.
    pub examples: usize,
    /// Bytes of a row of output, embeddings and masks, at most.
    pub row_bytes: usize,
}

impl<B: Backend, O: Rows> Codec<LeafResult<B, O>> for CleanCodec {
    fn write(&self, leaf: &LeafResult<B, O>, writer: &mut Writer) {
        match leaf {
            LeafResult::Read(leaf) => writer.bytes(&leaf.to_bytes()),
            LeafResult::Bytes(bytes) => writer.bytes(bytes),
        }
    }

    fn read(&self, _: Range<usize>, reader: &mut Reader<'_>) -> Option<LeafResult<B, O>> {
        reader.bytes().map(|bytes| LeafResult::Bytes(bytes.to_vec()))
    }

    fn max_bytes(&self, _: Range<usize>) -> usize {
        (1 << 20) + self.examples.saturating_mul(self.row_bytes)
    }
}

impl<B: Backend, O: Rows> CleanLeaf<B, O> {
    /// Its form, and its first row.
    fn of_one_row(&self) -> Self {
        let of_trace = |trace: &LeafTrace| LeafTrace {
            stages: trace.stages.of_one_row(),
            reached: trace.reached.clone(),
            sites: trace.sites.clone(),
        };
        Self {
            losses: vec![],
            output: self.output.as_ref().map(|output| output.rows(&[0])),
            embeddings: self.embeddings.as_ref().map(|embeddings| embeddings.rows(&[0])),
            masks: LeafMasks::Host(vec![]),
            coordinates: self.coordinates.clone(),
            largest: self.largest,
            here: self.here.as_ref().map(of_trace),
        }
    }

    /// What other workers need of it.
    fn to_bytes(&self) -> Vec<u8> {
        let (mut writer, mut tensors) = (Writer::default(), vec![]);
        writer.doubles(&self.losses);
        self.output.iter().for_each(|output| output.to_host(&mut tensors));
        tensors.extend(self.embeddings.iter().map(|embeddings| embeddings.to_data()));
        writer.number(tensors.len());
        tensors.iter().for_each(|data| writer.tensor(data));
        writer.number(self.coordinates.len());
        for (site, &coordinates) in self.coordinates.iter().enumerate() {
            writer.number(coordinates);
            let mask = self.masks.of_site(site);
            writer.number(mask.iter().len());
            mask.iter().for_each(|mask| writer.flags(mask));
        }
        writer.number(self.largest);
        writer.into_bytes()
    }

    /// The clean pass of a leaf with this many examples that ran elsewhere, in the form of this one.
    ///
    /// `None` where the bytes are of something else.
    pub fn read_like(&self, examples: usize, bytes: &[u8]) -> Option<Self> {
        let mut reader = Reader::new(bytes);
        let losses = reader.doubles().filter(|losses| losses.len() == examples)?;
        if examples == 0 {
            return Some(Self::empty());
        }
        let mut likes = vec![];
        let output = self.output.as_ref()?;
        output.to_host(&mut likes);
        likes.extend(self.embeddings.iter().map(|embeddings| embeddings.to_data()));
        reader.number().filter(|&n| n == likes.len())?;
        let tensors: Vec<TensorData> = likes.iter().map(|like| reader.tensor(like)).collect::<Option<_>>()?;
        let mut tensors = tensors.into_iter();
        let output = output.with_values(&mut tensors)?;
        output.check_rows(examples).ok()?;
        let embeddings = match &self.embeddings {
            Some(like) => {
                let data = tensors.next().filter(|data| data.shape[0] == examples)?;
                Some(Tensor::from_data(data, (&like.device(), like.dtype())))
            }
            None => None,
        };
        let sites = reader.number().filter(|&sites| sites == self.coordinates.len())?;
        let (mut coordinates, mut masks) = (vec![], vec![]);
        for _ in 0..sites {
            coordinates.push(reader.number()?);
            masks.push(match reader.number()? {
                0 => None,
                1 => Some(reader.flags().filter(|mask| mask.len().is_multiple_of(examples))?),
                _ => return None,
            });
        }
        let (masks, largest) = (LeafMasks::Host(masks), reader.number()?);
        reader.end()?;
        Some(Self { losses, output: Some(output), embeddings, masks, coordinates, largest, here: None })
    }
}
