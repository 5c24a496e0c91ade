//! Stages of a model, their outputs in a clean pass, and passes that begin behind some of them.

use std::any::Any;

use burn::tensor::backend::DeviceId;

use crate::batch::Rows;

/// A state between two stages, of any type.
pub(crate) trait State: Send {
    fn rows_box(&self, index: &[usize]) -> Box<dyn State>;
    fn cat_box(&self, parts: Vec<Box<dyn State>>) -> Box<dyn State>;
    fn into_any(self: Box<Self>) -> Box<dyn Any>;
    fn clone_box(&self) -> Box<dyn State>;
    fn shape_of_row(&self) -> Vec<usize>;
    fn on_device(self: Box<Self>, device: DeviceId) -> Box<dyn State>;
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
    fn shape_of_row(&self) -> Vec<usize> {
        self.row_shape()
    }
    fn on_device(self: Box<Self>, device: DeviceId) -> Box<dyn State> {
        Box::new((*self).to_device_of(device))
    }
}

pub(super) fn unbox<T: Rows>(state: Box<dyn State>) -> Box<T> {
    state.into_any().downcast::<T>().expect("the stages of a model follow one another in the same order in every pass")
}

/// A stage that a pass does not run again.
pub(super) struct Skipped {
    /// One row of its output, which keeps the types right.
    pub row: Box<dyn State>,
    /// Sites up to its end.
    pub sites: usize,
    /// Dropouts up to its end that dropped anything.
    pub dropouts: u64,
}

impl Clone for Skipped {
    fn clone(&self) -> Self {
        Self { row: self.row.clone_box(), ..*self }
    }
}

/// Where a pass begins: behind some of the stages, with the output of the last of them.
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

    /// Whether the pass begins with the input.
    #[cfg(test)]
    pub fn is_empty(&self) -> bool {
        self.state.is_none()
    }

    /// The same prefix on another device.
    pub fn on_device(self, device: DeviceId) -> Self {
        let skipped = self.skipped.into_iter().map(|s| Skipped { row: s.row.on_device(device), ..s }).collect();
        Self { skipped, state: self.state.map(|state| state.on_device(device)) }
    }

    /// The prefix of some of its rows.
    pub fn rows(&self, index: &[usize]) -> Self {
        Self { skipped: self.skipped.clone(), state: self.state.as_ref().map(|s| s.rows_box(index)) }
    }
}

/// The rows of all states; `None` where one is missing, or where their rows differ in size.
pub(super) fn cat_states(states: Vec<Option<Box<dyn State>>>) -> Option<Box<dyn State>> {
    let states: Vec<_> = states.into_iter().collect::<Option<_>>()?;
    let first = states.first()?.clone_box();
    let shape = first.shape_of_row();
    states.iter().all(|state| state.shape_of_row() == shape).then(|| first.cat_box(states))
}

/// The stages of a clean pass, with their outputs where a later pass may begin behind them.
#[derive(Default)]
pub(crate) struct Stages {
    stages: Vec<(Skipped, Option<Box<dyn State>>)>,
    /// Multiply-adds of a row up to the end of each stage; 0 for stages that were not run.
    work: Vec<f64>,
    /// Multiply-adds of a row in the whole pass.
    pub(super) total: f64,
    /// Values of a row in the widest output of a layer of each stage; 0 for stages that were not
    /// run.
    widths: Vec<usize>,
    /// The same behind the last stage.
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

    /// A stage with what came up to its end: sites, and dropouts that dropped anything.
    pub fn push<T: Rows>(&mut self, output: &T, (sites, dropouts): (usize, u64), width: usize) {
        // a frozen stage gives way to the next; the last one before any dropout is kept for later
        // steps
        if sites == 0
            && let Some((last, state)) = self.stages.last_mut()
            && (last.dropouts > 0 || dropouts == 0)
        {
            *state = None;
        }
        let skipped = Skipped { row: Box::new(output.rows(&[0])), sites, dropouts };
        self.stages.push((skipped, Some(Box::new(output.clone()))));
        self.work.push(self.total);
        self.widths.push(width);
    }

    /// The same stages on another device.
    pub fn on_device(mut self, device: DeviceId) -> Self {
        let moved = |(skipped, state): (Skipped, Option<Box<dyn State>>)| {
            let skipped = Skipped { row: skipped.row.on_device(device), ..skipped };
            (skipped, state.map(|state| state.on_device(device)))
        };
        self.stages = self.stages.into_iter().map(moved).collect();
        self
    }

    /// The same stages with the first row of their outputs alone.
    pub fn of_one_row(&self) -> Self {
        let one = |(skipped, state): &(Skipped, Option<Box<dyn State>>)| {
            (skipped.clone(), state.as_ref().map(|state| state.rows_box(&[0])))
        };
        let (work, widths) = (self.work.clone(), self.widths.clone());
        Self { stages: self.stages.iter().map(one).collect(), work, total: self.total, widths, tail: self.tail }
    }

    /// Values of a row in the widest output of a layer, for a pass behind the first `stages`
    /// stages.
    ///
    /// It is 0 where no width is known.
    pub fn width(&self, stages: usize) -> usize {
        self.widths[stages..].iter().copied().fold(self.tail, usize::max)
    }

    /// The cost of a query on `site`, counted from 0, as a part of a whole pass.
    ///
    /// The query begins behind the stages before the site. The cost is 1 where no work is known.
    pub fn cost(&self, site: usize) -> f64 {
        let behind = |stages: usize| self.total - stages.checked_sub(1).map_or(0.0, |last| self.work[last]);
        let whole = behind(self.before(0));
        if whole > 0.0 { (behind(self.before(site)) / whole).max(1e-3) } else { 1.0 }
    }

    /// How many stages a pass may skip if it perturbs only sites from `site` on, counted from 0.
    pub fn before(&self, site: usize) -> usize {
        self.stages.iter().rposition(|(stage, state)| stage.sites <= site && state.is_some()).map_or(0, |i| i + 1)
    }

    /// The prefix of a pass behind the first `stages` stages, a number from
    /// [`before`](Self::before).
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

    /// The prefix in front of the first trained stage: it runs once per example, never per query.
    pub fn frozen(&self) -> Prefix {
        self.prefix(self.before(0))
    }

    /// The part of [`frozen`](Self::frozen) that is the same in every step: nothing in it is
    /// dropped out.
    pub fn lasting(&self) -> Prefix {
        let lasts = |(stage, state): &(Skipped, Option<_>)| stage.sites == 0 && stage.dropouts == 0 && state.is_some();
        self.prefix(self.stages.iter().rposition(lasts).map_or(0, |i| i + 1))
    }

    /// The stages of several passes of a batch as one.
    ///
    /// `whole` is the prefix of the batch, where all passes began with their rows of it. Row j of
    /// the batch is row `places[j]` of the passes, one after the other. A pass may only begin
    /// behind a stage whose outputs are alike in all passes; the others keep no output.
    ///
    /// # Panics
    /// If `parts` is empty.
    pub fn cat(mut parts: Vec<Self>, whole: Option<Prefix>, places: &[usize]) -> Self {
        if parts.len() == 1 {
            return parts.remove(0);
        }
        // the state that the passes began with is whole already
        let (given, mut whole) = whole.map_or((0, None), |prefix| (prefix.skipped.len(), prefix.state));
        let count = parts.iter().map(|part| part.stages.len()).min().unwrap_or(0);
        let mut stages = Vec::with_capacity(count);
        for i in 0..count {
            let skipped = parts[0].stages[i].0.clone();
            let alike = parts.iter().all(|part| part.stages[i].0.sites == skipped.sites);
            let states = parts.iter_mut().map(|part| part.stages[i].1.take()).collect();
            let state = match whole.take_if(|_| i + 1 == given) {
                Some(state) => Some(state),
                None if alike => cat_states(states).map(|state| state.rows_box(places)),
                None => None,
            };
            stages.push((skipped, state));
        }
        let first = &parts[0];
        let (work, widths) = (first.work[..count].to_vec(), first.widths[..count].to_vec());
        Self { stages, work, total: first.total, widths, tail: first.tail }
    }
}
