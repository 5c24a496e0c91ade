//! The code of the derives.

use proc_macro2::{Group, Ident, TokenStream, TokenTree};
use quote::{format_ident, quote};
use syn::{
    DeriveInput, Error, GenericArgument, GenericParam, Generics, Result, Type, TypeParamBound, WherePredicate,
    parse_quote,
};

use crate::fields::{self, Field, Role};

/// `impl Rows`.
pub fn rows(input: &DeriveInput) -> Result<TokenStream> {
    let fields = fields::of(input)?;
    let name = &input.ident;
    let with_rows = || fields.iter().filter(|field| field.role == Role::Rows);

    let taken = each(&fields, |Field { member, role, .. }| match role {
        Role::Rows => quote!(::flops_core::Rows::rows(&self.#member, index)),
        Role::Shared | Role::Skip => quote!(::core::clone::Clone::clone(&self.#member)),
    });
    let names: Vec<_> = (0..fields.len()).map(|index| format_ident!("part_{index}")).collect();
    let (mut lists, mut pushed) = (quote!(), quote!());
    for (Field { member, .. }, name) in fields.iter().zip(&names).filter(|(field, _)| field.role == Role::Rows) {
        lists.extend(quote!(let mut #name = ::std::vec::Vec::with_capacity(parts.len());));
        pushed.extend(quote!(#name.push(part.#member);));
    }
    let shared: Vec<_> = fields.iter().zip(&names).filter(|(field, _)| field.role != Role::Rows).collect();
    let first = shared
        .iter()
        .map(|(Field { member, .. }, name)| quote!(let #name = ::core::clone::Clone::clone(&parts[0].#member);));
    let first = quote!(#(#first)*);
    let joined = fields.iter().zip(&names).map(|(Field { member, role, .. }, name)| match role {
        Role::Rows => quote!(#member: ::flops_core::Rows::cat(#name)),
        Role::Shared | Role::Skip => quote!(#member: #name),
    });
    let joined = quote!(#(#joined),*);
    let shapes = with_rows().map(|Field { member, .. }| quote!(::flops_core::Rows::row_shape(&self.#member)));
    let checks = with_rows().map(|Field { member, .. }| quote!(::flops_core::Rows::check_rows(&self.#member, rows)?;));
    let moved = each(&fields, |Field { member, role, .. }| match role {
        Role::Rows | Role::Shared => quote!(::flops_core::Rows::to_device_of(self.#member, device)),
        Role::Skip => quote!(self.#member),
    });
    // the values of a shared field are not those of rows, so they would be lost
    let travels = shared.is_empty().then(|| {
        let kinds = fields.iter().map(|field| &field.kind);
        let sent =
            fields.iter().map(|Field { member, .. }| quote!(::flops_core::Rows::to_host(&self.#member, values);));
        let got = each(&fields, |Field { member, .. }| quote!(::flops_core::Rows::with_values(&self.#member, values)?));
        quote! {
            const TRAVELS: bool = #(<#kinds as ::flops_core::Rows>::TRAVELS)&&*;

            fn to_host(&self, values: &mut ::std::vec::Vec<::flops_core::__private::TensorData>) {
                #(#sent)*
            }

            fn with_values(
                &self,
                values: &mut ::std::vec::IntoIter<::flops_core::__private::TensorData>,
            ) -> ::core::option::Option<Self> {
                ::core::option::Option::Some(Self { #got })
            }
        }
    });
    let mut generics = input.generics.clone();
    let kinds = with_other_parameters(&fields, &generics).map(|kind| parse_quote!(#kind: ::flops_core::Rows));
    let kinds: Vec<WherePredicate> = kinds.collect();
    if !kinds.is_empty() {
        generics.make_where_clause().predicates.extend(kinds);
    }
    let (of_impl, of_type, bounds) = generics.split_for_impl();
    Ok(quote! {
        impl #of_impl ::flops_core::Rows for #name #of_type #bounds {
            fn rows(&self, index: &[usize]) -> Self {
                Self { #taken }
            }

            fn cat(parts: ::std::vec::Vec<Self>) -> Self {
                #first
                #lists
                for part in parts {
                    #pushed
                }
                Self { #joined }
            }

            fn row_shape(&self) -> ::std::vec::Vec<usize> {
                [#(#shapes),*].concat()
            }

            fn check_rows(&self, rows: usize) -> ::core::result::Result<(), usize> {
                #(#checks)*
                ::core::result::Result::Ok(())
            }

            fn to_device_of(self, device: ::flops_core::__private::DeviceId) -> Self {
                Self { #moved }
            }

            #travels
        }
    })
}

/// `impl Lift`.
pub fn lift(input: &DeriveInput) -> Result<TokenStream> {
    let fields = fields::of(input)?;
    let name = &input.ident;
    let backend = backend(&input.generics).ok_or_else(|| {
        let what = "only a struct that is generic over a `Backend` is another one on another backend; \
                    write `struct Name<B: Backend>`, or `impl Lift` by hand";
        Error::new_spanned(name, what)
    })?;
    let lifted = each(&fields, |Field { member, role, .. }| match role {
        Role::Rows | Role::Shared => quote!(::flops_core::Lift::<__Lifted>::lift(self.#member)),
        Role::Skip => quote!(self.#member),
    });
    // the backend's parameter becomes that of the lifted struct
    let mut generics = input.generics.clone();
    for parameter in &mut generics.params {
        if let GenericParam::Type(parameter) = parameter
            && parameter.ident == backend
        {
            *parameter = parse_quote!(__Lifted: ::flops_core::__private::AutodiffBackend);
        }
    }
    if let Some(bounds) = &mut generics.where_clause {
        let of_backend =
            |bound: &WherePredicate| matches!(bound, WherePredicate::Type(bound) if is(&bound.bounded_ty, &backend));
        bounds.predicates = bounds.predicates.iter().filter(|bound| !of_backend(bound)).cloned().collect();
    }
    let inner: Type = parse_quote!(<__Lifted as ::flops_core::__private::AutodiffBackend>::InnerBackend);
    for kind in with_other_parameters(&fields, &input.generics) {
        let [from, to] = [quote!(#inner), quote!(__Lifted)].map(|by| replaced(quote!(#kind), &backend, &by));
        generics.make_where_clause().predicates.push(parse_quote!(
            #from: ::flops_core::Lift<__Lifted, Lifted = #to>
        ));
    }
    let arguments = |of_backend: GenericArgument| {
        let arguments = input.generics.params.iter().map(|parameter| -> GenericArgument {
            match parameter {
                GenericParam::Type(parameter) if parameter.ident == backend => of_backend.clone(),
                GenericParam::Type(parameter) => {
                    let parameter = &parameter.ident;
                    parse_quote!(#parameter)
                }
                GenericParam::Const(parameter) => {
                    let parameter = &parameter.ident;
                    parse_quote!(#parameter)
                }
                GenericParam::Lifetime(parameter) => GenericArgument::Lifetime(parameter.lifetime.clone()),
            }
        });
        quote!(<#(#arguments),*>)
    };
    let of_type = arguments(parse_quote!(#inner));
    let of_lifted = arguments(parse_quote!(__Lifted));
    let (of_impl, _, bounds) = generics.split_for_impl();
    Ok(quote! {
        impl #of_impl ::flops_core::Lift<__Lifted> for #name #of_type #bounds {
            type Lifted = #name #of_lifted;

            fn lift(self) -> Self::Lifted {
                #name { #lifted }
            }
        }
    })
}

/// `member: code` for each field.
fn each(fields: &[Field], code: impl Fn(&Field) -> TokenStream) -> TokenStream {
    let fields = fields.iter().map(|field| {
        let (member, code) = (&field.member, code(field));
        quote!(#member: #code)
    });
    quote!(#(#fields),*)
}

/// The types that have rows or go where rows go, in a struct with parameters beside the backend: whether
/// such a type has the trait is for its user to show.
fn with_other_parameters<'a>(fields: &'a [Field], generics: &Generics) -> impl Iterator<Item = &'a Type> {
    let backend = backend(generics);
    let has_others = generics.type_params().any(|parameter| Some(&parameter.ident) != backend.as_ref());
    fields.iter().filter(move |field| has_others && field.role != Role::Skip).map(|field| &field.kind)
}

/// The same code with something else in place of a name.
fn replaced(code: TokenStream, name: &Ident, by: &TokenStream) -> TokenStream {
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

/// The parameter that is bounded by a trait of the name `Backend`.
fn backend(generics: &Generics) -> Option<Ident> {
    let is_backend = |bound: &TypeParamBound| match bound {
        TypeParamBound::Trait(bound) => bound.path.segments.last().is_some_and(|last| last.ident == "Backend"),
        _ => false,
    };
    let inline = generics.type_params().find(|parameter| parameter.bounds.iter().any(is_backend));
    inline.map(|parameter| parameter.ident.clone()).or_else(|| {
        let bounds = generics.where_clause.as_ref()?.predicates.iter();
        let types = bounds.filter_map(|bound| match bound {
            WherePredicate::Type(bound) if bound.bounds.iter().any(is_backend) => Some(&bound.bounded_ty),
            _ => None,
        });
        let names: Vec<_> = types.collect();
        let found = generics.type_params().find(|parameter| names.iter().any(|kind| is(kind, &parameter.ident)));
        found.map(|parameter| parameter.ident.clone())
    })
}

/// Whether a type is the parameter of that name.
fn is(kind: &Type, name: &Ident) -> bool {
    matches!(kind, Type::Path(path) if path.path.is_ident(name))
}

#[cfg(test)]
mod tests {
    use super::*;

    fn refused(input: DeriveInput) -> [String; 2] {
        [rows(&input), lift(&input)].map(|code| code.err().map(|why| why.to_string()).unwrap_or_default())
    }

    #[test]
    fn what_has_no_rows_is_refused() {
        let why = refused(parse_quote!(
            enum Either<B: Backend> {
                One(Tensor<B, 1>),
                Other,
            }
        ));
        assert!(why.iter().all(|why| why.contains("only structs")), "{why:?}");
        for none in [
            parse_quote!(
                struct Nothing;
            ),
            parse_quote!(
                struct Shared<B: Backend> {
                    #[rows(shared)]
                    a: Tensor<B, 1>,
                }
            ),
        ] {
            let why = refused(none);
            assert!(why.iter().all(|why| why.contains("no field has rows")), "{why:?}");
        }
    }

    #[test]
    fn attributes_are_known_and_alone() {
        let why = refused(parse_quote!(
            struct A<B: Backend> {
                #[rows(skipped)]
                a: Tensor<B, 1>,
                b: Tensor<B, 1>,
            }
        ));
        assert!(why.iter().all(|why| why.contains("#[rows(shared)]")), "{why:?}");
        let why = refused(parse_quote!(
            struct A<B: Backend> {
                #[rows(shared, skip)]
                a: Tensor<B, 1>,
                b: Tensor<B, 1>,
            }
        ));
        assert!(why.iter().all(|why| why.contains("one of")), "{why:?}");
    }

    #[test]
    fn a_struct_without_a_backend_has_rows_and_no_other_form() {
        let [rows, lift] = refused(parse_quote!(
            struct Labels(Vec<u8>);
        ));
        assert!(rows.is_empty() && lift.contains("generic over a `Backend`"), "{rows:?}, {lift:?}");
    }

    /// The backend is known by its bound, wherever that stands.
    #[test]
    fn the_backend_is_found() {
        let of = |input: DeriveInput| backend(&input.generics).map(|name| name.to_string());
        assert_eq!(
            of(parse_quote!(
                struct A<T, B: Backend>(B, T);
            ))
            .as_deref(),
            Some("B")
        );
        assert_eq!(
            of(parse_quote!(
                struct A<Back>(Back)
                where
                    Back: burn::prelude::Backend;
            ))
            .as_deref(),
            Some("Back")
        );
        assert_eq!(
            of(parse_quote!(
                struct A<T: Clone>(T);
            )),
            None
        );
    }
}
