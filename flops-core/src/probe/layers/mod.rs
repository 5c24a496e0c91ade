//! The built-in layers, one file each: its method of [`Probe`](super::Probe) and its
//! [`Site`](super::Site).

mod affine;
mod batch_norm;
mod conv2d;
mod dropout;
mod embedding;
mod layer_norm;
mod linear;
mod module;
mod param;
#[cfg(test)]
mod tests;
mod tied_linear;

pub use module::Lifted;
