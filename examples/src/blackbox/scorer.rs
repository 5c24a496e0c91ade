//! Scores of queries, without encoding the same image twice.

use std::collections::HashMap;
use std::sync::{Mutex, MutexGuard};

use burn::prelude::*;
use flops_multimodal::Classifier;
use flops_multimodal::blackbox::{BlackBox, BlackBoxError, Info, Query};

use crate::backend::{B, Device};

/// The most embeddings that are kept.
const MAX_KEPT: usize = 4096;

/// The bits of an image, as the key of its embedding.
type ImageBits = Vec<u32>;

/// A classifier that keeps the embeddings of images that came with a context.
///
/// Tuning a context asks about the same images again and again: only the first query pays for the
/// image encoder.
pub(super) struct Scorer {
    classifier: Classifier<B>,
    device: Device,
    kept: Mutex<HashMap<ImageBits, Vec<f32>>>,
}

impl Scorer {
    pub(super) fn new(classifier: Classifier<B>, device: Device) -> Self {
        Self { classifier, device, kept: Mutex::default() }
    }

    /// Returns the embedding of each query's image. New images are encoded in one batch.
    fn embeddings(&self, queries: &[Query]) -> Vec<Vec<f32>> {
        let bits = |query: &Query| query.image.iter().map(|x| x.to_bits()).collect::<ImageBits>();
        let keys: Vec<ImageBits> = queries.iter().map(bits).collect();
        let mut known: HashMap<&ImageBits, Vec<f32>> = {
            let kept = self.kept();
            keys.iter().filter_map(|key| Some((key, kept.get(key)?.clone()))).collect()
        };
        let mut new: Vec<usize> = vec![];
        for (row, key) in keys.iter().enumerate() {
            if !known.contains_key(key) {
                known.insert(key, vec![]);
                new.push(row);
            }
        }
        if !new.is_empty() {
            let encoded = self.encode(queries, &new);
            let mut kept = self.kept();
            if kept.len() + new.len() > MAX_KEPT {
                kept.clear();
            }
            for (&row, embedding) in new.iter().zip(encoded) {
                // without a context, the same image seldom comes again
                if queries[row].context.is_some() {
                    kept.insert(keys[row].clone(), embedding.clone());
                }
                known.insert(&keys[row], embedding);
            }
        }
        keys.iter().map(|key| known[key].clone()).collect()
    }

    /// Encodes the images of those queries.
    fn encode(&self, queries: &[Query], rows: &[usize]) -> Vec<Vec<f32>> {
        let [c, h, w] = self.info().image;
        let pixels: Vec<f32> = rows.iter().flat_map(|&row| queries[row].image.iter().copied()).collect();
        let images = Tensor::<B, 4>::from_data(TensorData::new(pixels, [rows.len(), c, h, w]), &self.device);
        let embeddings = self.classifier.embed_images(images);
        let dim = embeddings.dims()[1];
        let values: Vec<f32> = embeddings.into_data().iter::<f32>().collect();
        values.chunks_exact(dim).map(<[f32]>::to_vec).collect()
    }

    /// Returns the scores of queries whose contexts have one length, `[rows, classes]` flattened.
    fn group_scores(
        &self,
        queries: &[Query],
        embeddings: &[Vec<f32>],
        rows: &[usize],
    ) -> Result<Vec<f32>, BlackBoxError> {
        let images: Vec<f32> = rows.iter().flat_map(|&row| embeddings[row].iter().copied()).collect();
        let dim = images.len() / rows.len();
        let images = Tensor::<B, 2>::from_data(TensorData::new(images, [rows.len(), dim]), &self.device);
        let length = context_length(&queries[rows[0]]);
        let contexts = self.info().context.zip(length).map(|([_, dim], length)| {
            let values: Vec<f32> =
                rows.iter().filter_map(|&row| queries[row].context.clone()).flat_map(|c| c.to_vec()).collect();
            Tensor::<B, 3>::from_data(TensorData::new(values, [rows.len(), length / dim, dim]), &self.device)
        });
        Ok(self.classifier.scores(images, contexts)?.into_data().iter::<f32>().collect())
    }

    fn kept(&self) -> MutexGuard<'_, HashMap<ImageBits, Vec<f32>>> {
        self.kept.lock().unwrap_or_else(|e| e.into_inner())
    }
}

impl BlackBox for Scorer {
    fn info(&self) -> &Info {
        self.classifier.info()
    }

    /// Returns one row of scores for each query. They may not be finite, if the weights are not.
    ///
    /// # Errors
    /// Where the classifier does not accept a context.
    fn scores(&self, queries: &[Query]) -> Result<Vec<Vec<f32>>, BlackBoxError> {
        let embeddings = self.embeddings(queries);
        let mut scores = vec![vec![]; queries.len()];
        for rows in groups(queries) {
            let values = self.group_scores(queries, &embeddings, &rows)?;
            for (&row, values) in rows.iter().zip(values.chunks_exact(self.info().classes.len())) {
                scores[row] = values.to_vec();
            }
        }
        Ok(scores)
    }
}

/// Returns the number of values in a query's context, if it has one.
fn context_length(query: &Query) -> Option<usize> {
    query.context.as_ref().map(|context| context.len())
}

/// Groups the queries by the length of their contexts: with a context first, by length, then
/// without.
fn groups(queries: &[Query]) -> Vec<Vec<usize>> {
    let mut lengths: Vec<Option<usize>> = queries.iter().map(context_length).collect();
    lengths.sort_unstable_by_key(|length| (length.is_none(), *length));
    lengths.dedup();
    let rows = |length| (0..queries.len()).filter(|&row| context_length(&queries[row]) == length).collect();
    lengths.into_iter().map(rows).collect()
}
