//! The derives of flops-core, which exports them under the names of their traits.
//!
//! Both are for structs of tensors, options, vectors and each other. Two attributes of a field say that
//! it has no rows: `#[rows(shared)]` is a value that all rows of a batch share, such as a scale, and
//! `#[rows(skip)]` is one that stays as it is, whatever the device or the backend. A skipped field whose
//! type names the backend cannot be lifted by a derive.
#![deny(missing_docs)]

mod backend;
mod expand;
mod fields;

use proc_macro::TokenStream;
use syn::{DeriveInput, parse_macro_input};

/// Derives flops-core's trait `Rows`: rows are gathered and joined field by field.
#[proc_macro_derive(Rows, attributes(rows))]
pub fn derive_rows(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand::rows(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}

/// Derives flops-core's trait `Lift`: a struct that is generic over a `Backend` is lifted field by field.
#[proc_macro_derive(Lift, attributes(rows))]
pub fn derive_lift(input: TokenStream) -> TokenStream {
    let input = parse_macro_input!(input as DeriveInput);
    expand::lift(&input).unwrap_or_else(syn::Error::into_compile_error).into()
}
