//! What the programs share: their backend, command line, training loop, black box, and the
//! experiments' testbed.
//!
//! Programs show how the libraries are used. What a user would need again belongs into a library.
// devices are `Copy` on some backends only
#![allow(clippy::clone_on_copy)]

#[macro_use]
extern crate flops_report;

pub mod blackbox;
pub mod cli;
pub mod data;
pub mod experiment;
pub mod plot;
pub mod run;

pub use flops_backend as backend;

/// A pass frees megabytes that the next one asks for again. The allocator of Linux's C library gives them
/// back to the system in between, which clears them page by page: see docs/backends.md.
#[global_allocator]
static ALLOCATOR: mimalloc::MiMalloc = mimalloc::MiMalloc;

/// The Rust blocks of the README and of the guide, which the tests run. A page that is missing here fails
/// the test `rust_blocks_are_tested`.
#[cfg(doctest)]
mod guide {
    macro_rules! pages {
        ($($name:ident: $file:literal,)+) => {$(
            #[doc = include_str!(concat!("../../", $file))]
            pub struct $name;
        )+};
    }
    pages! {
        Readme: "README.md",
        Backends: "docs/backends.md",
        Choosing: "docs/choosing.md",
        Distributed: "docs/distributed.md",
        OtherModels: "docs/other-models.md",
        OwnModel: "docs/own-model.md",
        Quantized: "docs/quantized.md",
        Questions: "docs/questions.md",
        Start: "docs/start.md",
    }
}

/// The version of Burn that the workspace is pinned to.
pub const BURN_VERSION: &str = "0.21.0";

#[cfg(test)]
mod tests {
    #[test]
    fn the_burn_version_matches_the_workspace() {
        let pinned = format!("burn = {{ version = \"={}\"", super::BURN_VERSION);
        assert!(include_str!("../../Cargo.toml").contains(&pinned), "the workspace pins another version of Burn");
    }
}
