//! How a learner is printed: the model, and how it is trained.

use burn::module::{Content, Module, ModuleDisplay};
use burn::prelude::*;

use crate::train::learner::ForwardLearner;

impl<B, M, A> ModuleDisplay for ForwardLearner<B, M, A>
where
    B: Backend,
    M: Module<B> + ModuleDisplay,
    A: Module<B> + ModuleDisplay,
{
    fn custom_content(&self, content: Content) -> Option<Content> {
        let (estimator, budget) = (&self.config().estimator, &self.config().budget);
        let content = content.add("model", &self.model).add("allocator", &self.allocator);
        let content = content.add("queries_per_datum", &budget.queries_per_datum()).add("sigma", &estimator.sigma);
        content.add_debug_attribute("space", &format_args!("{}", estimator.space)).optional()
    }
}

#[cfg(test)]
mod tests {
    use crate::allocator::{Neyman, QueryBudget};
    use crate::testing::pair::pair;
    use crate::train::{ForwardConfig, ForwardLearner};

    #[test]
    fn a_learner_prints_its_model_and_its_settings_alone() {
        let config = ForwardConfig::new(QueryBudget::new(20, 1).unwrap()).with_sigma(0.02);
        let learner = ForwardLearner::new(pair(3, true), Neyman, config).unwrap();
        let text = learner.to_string();
        for part in
            ["first: Linear {", "allocator: Neyman", "queries_per_datum: 20", "sigma: 0.02", "space: activation"]
        {
            assert!(text.contains(part), "{part}: {text}");
        }
        assert!(!text.contains("prefixes") && text.lines().count() < 25, "{text}");
    }
}
