//! Stages of a model, what they returned in a clean pass, and passes that begin behind some of them.

use std::any::Any;

use crate::batch::Rows;

/// A state between two stages, of whatever type the model has there.
pub(crate) trait State: Send {
    fn rows_box(&self, index: &[usize]) -> Box<dyn State>;
    fn cat_box(&self, parts: Vec<Box<dyn State>>) -> Box<dyn State>;
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
    fn clone_box(&self) -> Box<dyn State>;
}

impl<T: Rows> State for T {
    fn rows_box(&self, index: &[usize]) -> Box<dyn State> {
        Box::new(self.rows(index))
    }
    fn cat_box(&self, parts: Vec<Box<dyn State>>) -> Box<dyn State> {
        Box::new(T::cat(parts.into_iter().map(|p| *unbox::<T>(p)).collect()))
    }
    fn into_any(self: Box<Self>) -> Box<dyn Any> {
        self
    }
    fn clone_box(&self) -> Box<dyn State> {
        Box::new(self.clone())
    }
}

pub(super) fn unbox<T: Rows>(state: Box<dyn State>) -> Box<T> {
    state.into_any().downcast::<T>().expect("the stages of a model follow one another in the same order in every pass")
}

/// A stage that a pass need not run again: one row of what it returned, which is enough for the types to come out right, and the
/// sites up to its end.
pub(super) struct Skipped {
    pub row: Box<dyn State>,
    pub sites: usize,
}

impl Clone for Skipped {
    fn clone(&self) -> Self {
        Self { row: self.row.clone_box(), sites: self.sites }
    }
}

/// Where a pass begins: behind some of the stages, with what the last of them returned.
pub(crate) struct Prefix {
    pub(super) skipped: Vec<Skipped>,
    pub(super) state: Option<Box<dyn State>>,
}

impl Clone for Prefix {
    fn clone(&self) -> Self {
        Self { skipped: self.skipped.clone(), state: self.state.as_ref().map(|s| s.clone_box()) }
    }
}

impl Prefix {
    pub fn empty() -> Self {
        Self { skipped: Vec::new(), state: None }
    }

    /// Whether there is nothing to reuse.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.state.is_none()
    }

    /// The same prefix for some of its data.
    pub fn rows(&self, index: &[usize]) -> Self {
        Self { skipped: self.skipped.clone(), state: self.state.as_ref().map(|s| s.rows_box(index)) }
    }
}

pub(super) fn cat_states(states: Vec<Option<Box<dyn State>>>) -> Option<Box<dyn State>> {
    let states: Vec<_> = states.into_iter().collect::<Option<_>>()?;
    let first = states.first()?.clone_box();
    Some(first.cat_box(states))
}

/// The stages of a clean pass, and what they returned where a later pass may begin behind them.
#[derive(Default)]
pub(crate) struct Stages {
    stages: Vec<(Skipped, Option<Box<dyn State>>)>,
    /// Multiply-adds of a row up to the end of each stage, and of the whole pass; of stages that were not run, none.
    work: Vec<f64>,
    pub(super) total: f64,
    /// Numbers of a row in the widest output of a layer in each stage, and behind the last; of stages that were not run, none.
    widths: Vec<usize>,
    pub(super) tail: usize,
}

impl Stages {
    pub fn behind(prefix: Prefix) -> Self {
        let last = prefix.skipped.len();
        let mut state = prefix.state;
        let stages = prefix.skipped.into_iter().enumerate();
        let stages = stages.map(|(i, s)| (s, if i + 1 == last { state.take() } else { None })).collect();
        Self { stages, work: vec![0.0; last], total: 0.0, widths: vec![0; last], tail: 0 }
    }

    pub fn push<T: Rows>(&mut self, output: &T, sites: usize, width: usize) {
        if sites == 0
            && let Some((_, state)) = self.stages.last_mut()
        {
            *state = None;
        }
        self.stages.push((Skipped { row: Box::new(output.rows(&[0])), sites }, Some(Box::new(output.clone()))));
        self.work.push(self.total);
        self.widths.push(width);
    }

    /// Numbers of a row in the widest output of a layer, of a pass that begins behind the first `stages` stages; 0 where nothing is known.
    pub fn width(&self, stages: usize) -> usize {
        self.widths[stages..].iter().copied().fold(self.tail, usize::max)
    }

    /// The part of a query's pass that one on `site`, counted from 1, takes, which begins behind the stages before it; 1 where nothing is
    /// known of the work.
    pub fn cost(&self, site: usize) -> f64 {
        let behind = |stages: usize| self.total - stages.checked_sub(1).map_or(0.0, |last| self.work[last]);
        let whole = behind(self.before(0));
        if whole > 0.0 { (behind(self.before(site)) / whole).max(1e-3) } else { 1.0 }
    }

    /// The last stage behind which a pass may begin that perturbs no site before `site`, counted from 1; 0 is the input.
    pub fn before(&self, site: usize) -> usize {
        self.stages.iter().rposition(|(stage, state)| stage.sites <= site && state.is_some()).map_or(0, |i| i + 1)
    }

    /// A pass that begins behind the first `stages` stages, a number that [`before`](Self::before) gave.
    pub fn prefix(&self, stages: usize) -> Prefix {
        let state = stages.checked_sub(1).and_then(|last| self.stages[last].1.as_ref());
        match state {
            Some(state) => Prefix {
                skipped: self.stages[..stages].iter().map(|(s, _)| s.clone()).collect(),
                state: Some(state.clone_box()),
            },
            None => Prefix::empty(),
        }
    }

    /// What runs before the first trained stage: once per datum, never per query.
    pub fn frozen(&self) -> Prefix {
        self.prefix(self.before(0))
    }

    /// The stages of several chunks of a batch as one; `prefix` is what the chunks began with, where they began behind the input.
    ///
    /// # Panics
    /// Where `parts` is empty.
    pub fn cat(mut parts: Vec<Self>, prefix: Option<Prefix>) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        // the state that the chunks began with is there in one piece
        let (given, mut whole) = prefix.map_or((0, None), |prefix| (prefix.skipped.len(), prefix.state));
        let mut stages = Vec::with_capacity(parts[0].stages.len());
        for i in 0..parts[0].stages.len() {
            let states = parts.iter_mut().map(|p| p.stages[i].1.take()).collect();
            let state = if i + 1 == given { whole.take() } else { cat_states(states) };
            stages.push((parts[0].stages[i].0.clone(), state));
        }
        let first = &parts[0];
        let (work, total, widths, tail) = (first.work.clone(), first.total, first.widths.clone(), first.tail);
        Self { stages, work, total, widths, tail }
    }
}
