//! Noise laws, their scores, and the keyed streams they are drawn from.
//!
//! | file | purpose |
//! |---|---|
//! | `law` | laws and their scores, drawn on the host |
//! | `sampling`, `placement` | one-sided or antithetic queries; the layers that noise falls on |
//! | `source`, `stream`, `generator` | the keyed stream of every row, and what it draws from |
//! | `basis` | bases of the subspaces that weight noise lies in |
//! | `span` | noise that is confined to a few directions of a site |
//! | `gaussian`, `hash` | Gaussian values on the host, from hashes of a counter |
//! | `device` | noise generated on a GPU, by one of the two below |
//! | `counter` | hashes in Burn's operations, for any backend |
//! | `cubecl` | the same values in one kernel (features `cuda`, `wgpu`) |
//! | `parts` | parts of packed values, as views of them where the backend has views |

mod basis;
mod counter;
#[cfg(any(feature = "cuda", feature = "wgpu"))]
mod cubecl;
mod device;
mod gaussian;
mod generator;
#[cfg(test)]
mod golden;
mod hash;
mod law;
mod parts;
mod placement;
mod sampling;
#[cfg(test)]
pub(crate) mod script;
mod source;
mod span;
mod stream;

pub(crate) use basis::{basis_seed, orthonormal_basis, random_basis};
#[cfg(test)]
pub(crate) use device::forced;
pub(crate) use device::{DeviceNoise, makes_noise};
pub use law::NoiseLaw;
pub(crate) use parts::parts;
pub use placement::Placement;
pub use sampling::Sampling;
#[cfg(test)]
pub(crate) use source::tests::source;
pub(crate) use source::{Fall, NoiseSource, RowKey, SHARED};
pub(crate) use span::Span;
