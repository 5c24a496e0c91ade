//! Who runs the jobs of a learner's steps, and whether other workers are alike.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, Ordering};

use burn::module::{Module, ModuleVisitor, Param};
use burn::prelude::*;
use sha2::{Digest, Sha256};

use super::config::ForwardConfig;
use crate::error::Error;
use crate::estimator::CleanMemory;
use crate::executor::{Executor, RunIdentity, Threads};

/// Steps from one comparison of the weights to the next.
const VERIFY_EVERY: u64 = 100;

/// The executor of a learner and its clones.
#[derive(Clone, Debug)]
pub(super) struct Workers {
    executor: Arc<dyn Executor>,
    /// Whether this worker has been compared with the others.
    has_begun: Arc<AtomicBool>,
    /// The form of clean passes that ran here.
    pub memory: CleanMemory,
}

impl Default for Workers {
    fn default() -> Self {
        Self::new(Arc::new(Threads))
    }
}

impl Workers {
    pub fn new(executor: Arc<dyn Executor>) -> Self {
        Self { executor, has_begun: Arc::default(), memory: CleanMemory::default() }
    }

    pub fn executor(&self) -> &dyn Executor {
        &*self.executor
    }

    /// Compares this worker with the others before its first step, and the weights at every 100th.
    ///
    /// # Errors
    /// Where they differ.
    pub fn meet<B: Backend>(
        &self,
        step: u64,
        config: &ForwardConfig,
        allocator: &str,
        module: &impl Module<B>,
    ) -> Result<(), Error> {
        if self.executor.is_local() {
            return Ok(());
        }
        let is_first = !self.has_begun.load(Ordering::Relaxed);
        if !is_first && !step.is_multiple_of(VERIFY_EVERY) {
            return Ok(());
        }
        let weights = weights_hash(module);
        if is_first {
            self.executor.begin(&RunIdentity::new(settings(config, allocator), (step, weights)))?;
            self.has_begun.store(true, Ordering::Relaxed);
        }
        Ok(self.executor.verify(step, weights)?)
    }
}

/// The settings that all workers must share: what the result of a step depends on.
fn settings(config: &ForwardConfig, allocator: &str) -> Vec<(String, String)> {
    let estimator = &config.estimator;
    let all = [
        ("space", format!("{:?}", estimator.space)),
        ("noise", format!("{:?}", estimator.noise)),
        ("sampling", format!("{:?}", estimator.sampling)),
        ("sigma", estimator.sigma.to_string()),
        ("seed", estimator.seed.to_string()),
        ("max_rows", estimator.max_rows.to_string()),
        ("leaves", estimator.leaves.to_string()),
        ("budget", format!("{:?}", config.budget)),
        ("variance", format!("{:?}", config.variance)),
        ("allocator", allocator.to_string()),
    ];
    all.map(|(name, value)| (name.to_string(), value)).to_vec()
}

/// A hash of all float parameters, in the order in which the module is visited.
fn weights_hash<B: Backend>(module: &impl Module<B>) -> u64 {
    struct Hash(Sha256);
    impl<B: Backend> ModuleVisitor<B> for Hash {
        fn visit_float<const D: usize>(&mut self, param: &Param<Tensor<B, D>>) {
            self.0.update(param.val().into_data().as_bytes());
        }
    }
    let mut hash = Hash(Sha256::new());
    module.visit(&mut hash);
    let digest = hash.0.finalize();
    digest.iter().take(8).fold(0, |hash, &byte| hash << 8 | u64::from(byte))
}
