//! A data loader whose epoch e is a function of (seed, e) alone.
//!
//! A resumed run therefore sees what the uninterrupted one saw. Burn's shuffling loader advances
//! one generator from epoch to epoch and starts it afresh on resume. Here every
//! [`iter`](DataLoader::iter) is one epoch, and its order and augmentation come from a generator
//! keyed by seed and epoch. Batches are made on the caller's thread: their cost is small beside a
//! training step.

use burn::data::dataloader::batcher::Batcher;
use burn::data::dataloader::{DataLoader, DataLoaderIterator, Dataset, Progress};
use burn::prelude::*;
use burn::tensor::backend::AutodiffBackend;
use rand::seq::SliceRandom;
use std::ops::Range;
use std::sync::Arc;
use std::sync::atomic::{AtomicU64, Ordering};

use crate::random::keyed_rng;

/// Separates the random numbers of the shuffle from other uses of the same seed.
const SHUFFLE: u64 = u64::from_le_bytes(*b"shuffle\0");

/// Error of a loader that cannot be built.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum LoaderError {
    /// Batches without examples.
    #[error("the batch size is 0: it must be at least 1")]
    ZeroBatchSize,
    /// A data set without examples.
    #[error("the data set is empty: an epoch over it would have no step")]
    EmptyDataset,
}

/// A change of each item before it is batched, different in every epoch.
///
/// Draw from a generator keyed by (a seed, `epoch`, the item's id), never from a running one. The
/// change then depends neither on the order of the items nor on where a run was resumed.
pub trait Augmentation<I>: Send + Sync {
    /// Returns the item as it is in `epoch`, counted from 0.
    fn augment(&self, item: I, epoch: u64) -> I;
}

/// Loads a data set in batches; epoch e is a function of (seed, e) alone.
///
/// Every [`iter`](DataLoader::iter) is the next epoch, so a resumed run sees the batches of an
/// uninterrupted one. The last batch is smaller if the batch size does not divide the number of
/// items.
pub struct EpochLoader<B: Backend, I, O> {
    dataset: Arc<dyn Dataset<I>>,
    range: Range<usize>,
    batcher: Arc<dyn Batcher<B, I, O>>,
    augmentation: Option<Arc<dyn Augmentation<I>>>,
    batch_size: usize,
    device: B::Device,
    seed: Option<u64>,
    next_epoch: AtomicU64,
}

impl<B: Backend, I, O> EpochLoader<B, I, O> {
    /// Creates a loader in the order of the data set, without augmentation.
    ///
    /// # Errors
    /// If `batch_size` is 0 or the data set is empty.
    pub fn new(
        dataset: Arc<dyn Dataset<I>>,
        batcher: impl Batcher<B, I, O> + 'static,
        batch_size: usize,
        device: B::Device,
    ) -> Result<Self, LoaderError> {
        if batch_size == 0 {
            return Err(LoaderError::ZeroBatchSize);
        }
        if dataset.is_empty() {
            return Err(LoaderError::EmptyDataset);
        }
        let range = 0..dataset.len();
        Ok(Self {
            dataset,
            range,
            batcher: Arc::new(batcher),
            augmentation: None,
            batch_size,
            device,
            seed: None,
            next_epoch: AtomicU64::new(0),
        })
    }

    /// Draws a new order in each epoch, from `seed` and the number of the epoch.
    #[must_use]
    pub fn shuffled(mut self, seed: u64) -> Self {
        self.seed = Some(seed);
        self
    }

    /// Changes every item before it is batched.
    #[must_use]
    pub fn with_augmentation(mut self, augmentation: impl Augmentation<I> + 'static) -> Self {
        self.augmentation = Some(Arc::new(augmentation));
        self
    }

    /// Makes the next iteration epoch `epoch`, counted from 0.
    ///
    /// Burn counts from 1: to resume from its checkpoint of epoch k, call `starting_at_epoch(k)`.
    #[must_use]
    pub fn starting_at_epoch(mut self, epoch: u64) -> Self {
        *self.next_epoch.get_mut() = epoch;
        self
    }

    /// Indices into the data set, in the order of `epoch`.
    fn order(&self, epoch: u64) -> Vec<usize> {
        let mut order: Vec<usize> = self.range.clone().collect();
        if let Some(seed) = self.seed {
            order.shuffle(&mut keyed_rng([seed, epoch, 0, SHUFFLE]));
        }
        order
    }

    /// The same loader on another range or device; it counts its own epochs from here on.
    fn fork(&self, range: Range<usize>, device: B::Device) -> Self {
        Self {
            dataset: self.dataset.clone(),
            range,
            batcher: self.batcher.clone(),
            augmentation: self.augmentation.clone(),
            batch_size: self.batch_size,
            device,
            seed: self.seed,
            next_epoch: AtomicU64::new(self.next_epoch.load(Ordering::Relaxed)),
        }
    }
}

impl<B: Backend, I: 'static, O: 'static> DataLoader<B, O> for EpochLoader<B, I, O> {
    fn iter<'a>(&'a self) -> Box<dyn DataLoaderIterator<O> + 'a> {
        let epoch = self.next_epoch.fetch_add(1, Ordering::Relaxed);
        Box::new(EpochIterator { loader: self, epoch, order: self.order(epoch), position: 0 })
    }

    fn num_items(&self) -> usize {
        self.range.len()
    }

    fn to_device(&self, device: &B::Device) -> Arc<dyn DataLoader<B, O>> {
        Arc::new(self.fork(self.range.clone(), device.clone()))
    }

    fn slice(&self, start: usize, end: usize) -> Arc<dyn DataLoader<B, O>> {
        let end = self.range.end.min(self.range.start.saturating_add(end));
        let start = end.min(self.range.start.saturating_add(start));
        Arc::new(self.fork(start..end, self.device.clone()))
    }
}

struct EpochIterator<'a, B: Backend, I, O> {
    loader: &'a EpochLoader<B, I, O>,
    epoch: u64,
    order: Vec<usize>,
    position: usize,
}

impl<B: Backend, I, O> Iterator for EpochIterator<'_, B, I, O> {
    type Item = O;

    fn next(&mut self) -> Option<O> {
        let end = self.order.len().min(self.position + self.loader.batch_size);
        let indices = &self.order[self.position..end];
        self.position = end;
        let items: Vec<I> = indices
            .iter()
            .filter_map(|&index| self.loader.dataset.get(index))
            .map(|item| match &self.loader.augmentation {
                Some(augmentation) => augmentation.augment(item, self.epoch),
                None => item,
            })
            .collect();
        (!items.is_empty()).then(|| self.loader.batcher.batch(items, &self.loader.device))
    }
}

impl<B: Backend, I, O> DataLoaderIterator<O> for EpochIterator<'_, B, I, O> {
    fn progress(&self) -> Progress {
        Progress::new(self.position, self.order.len())
    }
}

/// Makes a batcher of the inner backend usable where burn-train asks for one of the autodiff
/// backend.
///
/// Forward-only training needs no graph: its batches stay on the inner backend.
#[derive(Clone, Debug)]
pub struct InnerBatcher<T>(pub T);

impl<AB: AutodiffBackend, I, O, T: Batcher<AB::InnerBackend, I, O>> Batcher<AB, I, O> for InnerBatcher<T> {
    fn batch(&self, items: Vec<I>, device: &AB::Device) -> O {
        self.0.batch(items, device)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use burn::backend::{Autodiff, Flex};
    use burn::data::dataset::InMemDataset;

    struct Collect;
    impl<B: Backend> Batcher<B, u32, Vec<u32>> for Collect {
        fn batch(&self, items: Vec<u32>, _: &B::Device) -> Vec<u32> {
            items
        }
    }

    struct AddEpoch;
    impl Augmentation<u32> for AddEpoch {
        fn augment(&self, item: u32, epoch: u64) -> u32 {
            item + 100 * epoch as u32
        }
    }

    fn loader(n: u32, batch_size: usize) -> EpochLoader<Flex, u32, Vec<u32>> {
        EpochLoader::new(Arc::new(InMemDataset::new((0..n).collect())), Collect, batch_size, Default::default())
            .unwrap()
    }

    fn epoch(loader: &dyn DataLoader<Flex, Vec<u32>>) -> Vec<u32> {
        loader.iter().flatten().collect()
    }

    #[test]
    fn each_epoch_is_another_permutation_of_all_items() {
        let loader = loader(23, 5).shuffled(7);
        let (first, second) = (epoch(&loader), epoch(&loader));
        assert_ne!(first, second);
        for mut items in [first, second] {
            items.sort_unstable();
            assert_eq!(items, (0..23).collect::<Vec<_>>());
        }
    }

    #[test]
    fn order_follows_seed_and_epoch_alone() {
        let uninterrupted = loader(23, 5).shuffled(7);
        let epochs: Vec<_> = (0..4).map(|_| epoch(&uninterrupted)).collect();
        let resumed = loader(23, 5).shuffled(7).starting_at_epoch(2);
        assert_eq!(epoch(&resumed), epochs[2]);
        // burn-train moves the loader to its device before the first epoch
        assert_eq!(epoch(resumed.to_device(&Default::default()).as_ref()), epochs[3]);
        assert_ne!(epoch(&loader(23, 5).shuffled(8)), epochs[0]);
    }

    #[test]
    fn unshuffled_keeps_the_order_of_the_data_set() {
        let batches: Vec<_> = loader(5, 2).iter().collect();
        assert_eq!(batches, [vec![0, 1], vec![2, 3], vec![4]]);
    }

    #[test]
    fn progress_counts_items() {
        let loader = loader(5, 2);
        assert_eq!(loader.num_items(), 5);
        let mut iter = loader.iter();
        let mut seen = vec![];
        while iter.next().is_some() {
            seen.push((iter.progress().items_processed, iter.progress().items_total));
        }
        assert_eq!(seen, [(2, 5), (4, 5), (5, 5)]);
    }

    #[test]
    fn slices_partition_the_items() {
        let loader = loader(10, 4).shuffled(1);
        let (left, right) = (loader.slice(0, 6), loader.slice(6, 99));
        assert_eq!((left.num_items(), right.num_items()), (6, 4));
        let mut items = [epoch(left.as_ref()), epoch(right.as_ref())].concat();
        items.sort_unstable();
        assert_eq!(items, (0..10).collect::<Vec<_>>());
        let mut inner = epoch(right.slice(1, 3).as_ref());
        inner.sort_unstable();
        assert_eq!(inner, [7, 8]);
    }

    #[test]
    fn augmentation_knows_its_epoch() {
        let loader = loader(3, 2).with_augmentation(AddEpoch).starting_at_epoch(4);
        assert_eq!(epoch(&loader), [400, 401, 402]);
        assert_eq!(epoch(&loader), [500, 501, 502]);
    }

    #[test]
    fn an_epoch_without_steps_is_refused() {
        let new = |n: u32, batch_size| {
            let dataset = Arc::new(InMemDataset::new((0..n).collect()));
            EpochLoader::<Flex, _, _>::new(dataset, Collect, batch_size, Default::default()).err()
        };
        assert_eq!(new(3, 0), Some(LoaderError::ZeroBatchSize));
        assert_eq!(new(0, 3), Some(LoaderError::EmptyDataset));
    }

    #[test]
    fn inner_batcher_stays_on_the_inner_backend() {
        struct ToTensor;
        impl<B: Backend> Batcher<B, u32, Tensor<B, 1, Int>> for ToTensor {
            fn batch(&self, items: Vec<u32>, device: &B::Device) -> Tensor<B, 1, Int> {
                Tensor::from_ints(items.as_slice(), device)
            }
        }
        let dataset = Arc::new(InMemDataset::new(vec![1, 2]));
        let loader: EpochLoader<Autodiff<Flex>, u32, Tensor<Flex, 1, Int>> =
            EpochLoader::new(dataset, InnerBatcher(ToTensor), 2, Default::default()).unwrap();
        assert_eq!(loader.iter().next().unwrap().dims(), [2]);
    }
}
