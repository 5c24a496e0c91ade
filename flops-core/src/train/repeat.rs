//! Whether the loss itself is noisy: the same rows with the same parameters, evaluated again.

use burn::prelude::*;

use crate::batch::Rows;
use crate::error::Error;
use crate::model::ForwardModel;
use crate::probe::Probe;

/// Examples that are evaluated again. They are few, because a black box charges for each.
const EXAMPLES: usize = 8;

/// The standard deviation of the loss of an example from pass to pass, and the rows that it took to find
/// out.
///
/// Up to 8 examples are evaluated again. Where a loss differs from the one in `losses`, they are
/// evaluated once more, and these two passes are compared. They have the same rows in the same
/// shape, so a deterministic model gives the same bits. The size of a pass alone may change the
/// rounding of a loss, which is no noise.
///
/// # Errors
/// [`Error::Length`] or [`Error::Model`] where the model does not answer as it should.
pub(super) fn loss_noise<B: Backend, M: ForwardModel<B>>(
    model: &M,
    input: &M::Input,
    target: &M::Target,
    losses: &[f64],
) -> Result<(f64, usize), Error> {
    let rows: Vec<usize> = (0..losses.len().min(EXAMPLES)).collect();
    let evaluate = || {
        let output = model.forward(input.rows(&rows), &mut Probe::clean());
        let losses: Vec<f64> = model.losses(output, target.rows(&rows)).into_data().iter::<f64>().collect();
        if let Some(why) = model.failure() {
            return Err(Error::Model { why });
        }
        if losses.len() != rows.len() {
            let name = "losses returned by the model";
            return Err(Error::Length { name, got: losses.len(), expected: rows.len() });
        }
        Ok(losses)
    };
    let again = evaluate()?;
    let (mut taken, mut noise) = (rows.len(), 0.0);
    if again != losses[..rows.len()] {
        taken *= 2;
        let squares = evaluate()?.iter().zip(&again).map(|(a, b)| (a - b).powi(2)).sum::<f64>();
        // the difference of two passes has twice the variance of one
        noise = (squares / (2 * rows.len()) as f64).sqrt();
    }
    Ok((noise, taken))
}
