//! What the examples share: the backend they run on.

pub mod backend;
