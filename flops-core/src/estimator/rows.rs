//! The row contract of a pass: one row per example, or one per query where it is perturbed.

use burn::module::ParamId;
use burn::prelude::*;

use crate::batch::Rows;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::parameters::path;
use crate::probe::{Probe, RowFault, TracedSite};

/// Whether noise on all calls at once may fall on a layer that is called again.
///
/// # Errors
/// [`Error::RepeatedCalls`].
pub(super) fn check_repeats<B: Backend, M: ForwardModel<B>>(model: &M, sites: &[TracedSite]) -> Result<(), Error> {
    let calls = |site: &TracedSite| sites.iter().filter(|other| other.layer == site.layer).count();
    sites.iter().find(|site| calls(site) > 1).map_or(Ok(()), |site| {
        let path = path::<B, M>(model, Some(ParamId::from(site.key.parameter())));
        Err(Error::RepeatedCalls { path, calls: calls(site) })
    })
}

/// Whether the model had an answer to all it was asked.
pub(super) fn check_failure<B: Backend, M: ForwardModel<B>>(model: &M) -> Result<(), Error> {
    model.failure().map_or(Ok(()), |why| Err(Error::Model { why }))
}

/// The losses of a pass of `rows` rows, from its output.
///
/// The rows of the output are checked first: a loss of a wrong output may panic.
///
/// # Errors
/// [`Error::RowCount`].
pub(super) fn losses<B: Backend, M: ForwardModel<B>>(
    model: &M,
    output: M::Output,
    target: M::Target,
    rows: usize,
) -> Result<Tensor<B, 1>, Error> {
    output.check_rows(rows).map_err(|got| Error::RowCount { what: "the output", got, rows })?;
    check_len("the losses", model.losses(output, target), rows)
}

/// One value for each row.
///
/// # Errors
/// [`Error::RowCount`].
pub(super) fn check_len<B: Backend>(
    what: &'static str,
    values: Tensor<B, 1>,
    rows: usize,
) -> Result<Tensor<B, 1>, Error> {
    match values.dims()[0] {
        got if got == rows => Ok(values),
        got => Err(Error::RowCount { what, got, rows }),
    }
}

/// Whether the probe of a pass of `rows` rows saw the contract kept, and no other fault.
///
/// # Errors
/// [`Error::BareParameter`], [`Error::RowAxis`], [`Error::RowCount`], or the other fault.
pub(super) fn check_probe<B: Backend, M: ForwardModel<B>>(
    model: &M,
    probe: &mut Probe<B>,
    rows: usize,
) -> Result<(), Error> {
    let error = match probe.row_fault() {
        None => return probe.take_fault().map_or(Ok(()), Err),
        Some(RowFault::Param { parameter, shape }) => {
            Error::BareParameter { path: path::<B, M>(model, Some(parameter)), shape }
        }
        Some(RowFault::Site { parameter, shape }) => Error::RowAxis {
            what: format!("the output of the layer of {}", path::<B, M>(model, parameter)),
            shape,
            rows,
        },
        Some(RowFault::Joined { method, shape }) => {
            Error::RowAxis { what: format!("an argument of probe.{method}"), shape, rows }
        }
        Some(RowFault::Stage { got }) => Error::RowCount { what: "the output of a stage", got, rows },
    };
    Err(error)
}

/// Whether a pass that follows the clean pass had its sites.
///
/// # Errors
/// [`Error::SitesVary`].
pub(super) fn check_expected<B: Backend, M: ForwardModel<B>>(
    model: &M,
    sites: &[TracedSite],
    probe: &Probe<B>,
) -> Result<(), Error> {
    probe.check_expected().map_err(|(first, got)| {
        // behind the last one there is only that one to name
        let named = sites.get(first).or(sites.last());
        let path = path::<B, M>(model, named.map(|site| ParamId::from(site.key.parameter())));
        Error::SitesVary { path, few: got.min(sites.len()), many: got.max(sites.len()) }
    })
}

/// Whether two passes, each with its number of rows, saw the same sites.
///
/// # Errors
/// [`Error::SitesVary`] or [`Error::RowShape`].
pub(super) fn check_sites<B: Backend, M: ForwardModel<B>>(
    model: &M,
    (a, a_rows): (&[TracedSite], usize),
    (b, b_rows): (&[TracedSite], usize),
) -> Result<(), Error> {
    for i in 0..a.len().max(b.len()) {
        let name = |site: &TracedSite| path::<B, M>(model, Some(ParamId::from(site.key.parameter())));
        let (a, b) = match (a.get(i), b.get(i)) {
            (Some(a), Some(b)) if a.key == b.key => (a, b),
            (Some(site), _) | (_, Some(site)) => {
                let (few, many) = (a.len().min(b.len()), a.len().max(b.len()));
                return Err(Error::SitesVary { path: name(site), few, many });
            }
            (None, None) => return Ok(()),
        };
        if a.coordinates != b.coordinates {
            let (few, many) = if a_rows < b_rows { ((a, a_rows), (b, b_rows)) } else { ((b, b_rows), (a, a_rows)) };
            return Err(Error::RowShape {
                path: name(a),
                few_rows: few.1,
                few: few.0.coordinates,
                many_rows: many.1,
                many: many.0.coordinates,
            });
        }
    }
    Ok(())
}
