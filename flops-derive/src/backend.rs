//! The parameter of a struct that is its backend.

use proc_macro2::{Group, Ident, TokenStream, TokenTree};
use quote::quote;
use syn::{DeriveInput, Error, Generics, Result, Type, TypeParamBound, WherePredicate};

/// The parameter that is bounded by a trait of the name `Backend`, if there is one.
pub fn of(generics: &Generics) -> Result<Option<Ident>> {
    let is_backend = |bound: &TypeParamBound| match bound {
        TypeParamBound::Trait(bound) => bound.path.segments.last().is_some_and(|last| last.ident == "Backend"),
        _ => false,
    };
    let bounds = generics.where_clause.iter().flat_map(|bounds| &bounds.predicates);
    let named: Vec<&Type> = bounds
        .filter_map(|bound| match bound {
            WherePredicate::Type(bound) if bound.bounds.iter().any(is_backend) => Some(&bound.bounded_ty),
            _ => None,
        })
        .collect();
    let is = |kind: &Type, name: &Ident| matches!(kind, Type::Path(path) if path.path.is_ident(name));
    let mut found = generics
        .type_params()
        .map(|parameter| (&parameter.ident, &parameter.bounds))
        .filter(|(name, bounds)| bounds.iter().any(is_backend) || named.iter().any(|kind| is(kind, name)));
    let first = found.next().map(|(name, _)| name.clone());
    match found.next() {
        Some((second, _)) => {
            Err(Error::new_spanned(second, format!("`{second}` is a second backend; write the impl by hand")))
        }
        None => Ok(first),
    }
}

/// The backend of a struct that has a form on another one.
pub fn lifted(input: &DeriveInput) -> Result<Ident> {
    let backend = of(&input.generics)?.ok_or_else(|| {
        let what = "only a struct that is generic over a `Backend` is another one on another backend; \
                    write `struct Name<B: Backend>`, or `impl Lift` by hand";
        Error::new_spanned(&input.ident, what)
    })?;
    for parameter in input.generics.type_params().filter(|parameter| parameter.ident != backend) {
        let (name, bounds) = (&parameter.ident, &parameter.bounds);
        if mentions(quote!(#bounds), &backend) {
            let what = format!(
                "`{name}` belongs to one backend, and nothing tells what it is on another; \
                                write `impl Lift` by hand"
            );
            return Err(Error::new_spanned(name, what));
        }
    }
    Ok(backend)
}

/// Whether code has a name in it.
pub fn mentions(code: TokenStream, name: &Ident) -> bool {
    code.into_iter().any(|token| match token {
        TokenTree::Ident(found) => found == *name,
        TokenTree::Group(group) => mentions(group.stream(), name),
        _ => false,
    })
}

/// The same code with something else in place of a name.
pub fn replaced(code: TokenStream, name: &Ident, by: &TokenStream) -> TokenStream {
    let tokens = code.into_iter().flat_map(|token| match token {
        TokenTree::Ident(found) if found == *name => by.clone(),
        TokenTree::Group(group) => {
            let inside = replaced(group.stream(), name, by);
            TokenTree::Group(Group::new(group.delimiter(), inside)).into()
        }
        other => other.into(),
    });
    tokens.collect()
}

#[cfg(test)]
mod tests {
    use syn::parse_quote;

    use super::*;

    /// The backend is known by its bound, wherever that stands.
    #[test]
    fn the_backend_is_found() {
        let of = |input: DeriveInput| of(&input.generics).unwrap().map(|name| name.to_string());
        assert_eq!(
            of(parse_quote!(
                struct A<T, B: Backend>(B, T);
            ))
            .as_deref(),
            Some("B")
        );
        let bounds = parse_quote!(
            struct A<Back>(Back)
            where
                Back: burn::prelude::Backend;
        );
        assert_eq!(of(bounds).as_deref(), Some("Back"));
        assert_eq!(
            of(parse_quote!(
                struct A<T: Clone>(T);
            )),
            None
        );
    }
}
