//! The code of the derives.

use proc_macro2::{Ident, TokenStream};
use quote::{format_ident, quote};
use syn::{DeriveInput, GenericArgument, GenericParam, Generics, Result, Type, WherePredicate, parse_quote};

use crate::backend::{self, mentions, replaced};
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
    let shapes = with_rows().map(|Field { member, .. }| quote!(::flops_core::Rows::row_shape(&self.#member)));
    let checks = with_rows().map(|Field { member, .. }| quote!(::flops_core::Rows::check_rows(&self.#member, rows)?;));
    let moved = each(&fields, |Field { member, role, .. }| match role {
        Role::Rows | Role::Shared => quote!(::flops_core::Rows::to_device_of(self.#member, device)),
        Role::Skip => quote!(self.#member),
    });
    let (joined, travels) = (cat(&fields), travels(&fields));
    let mut generics = input.generics.clone();
    let kinds = with_other_parameters(&fields, &generics)?.map(|kind| parse_quote!(#kind: ::flops_core::Rows));
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

            #joined

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

/// `Rows::cat`: what is shared comes from the first part.
fn cat(fields: &[Field]) -> TokenStream {
    let names: Vec<_> = (0..fields.len()).map(|index| format_ident!("part_{index}")).collect();
    let lists = fields.iter().zip(&names).map(|(Field { member, role, .. }, name)| match role {
        Role::Rows => quote!(let mut #name = ::std::vec::Vec::with_capacity(parts.len());),
        Role::Shared | Role::Skip => quote!(let #name = ::core::clone::Clone::clone(&parts[0].#member);),
    });
    let with_rows = fields.iter().zip(&names).filter(|(field, _)| field.role == Role::Rows);
    let pushed = with_rows.map(|(Field { member, .. }, name)| quote!(#name.push(part.#member);));
    let joined = fields.iter().zip(&names).map(|(Field { member, role, .. }, name)| match role {
        Role::Rows => quote!(#member: ::flops_core::Rows::cat(#name)),
        Role::Shared | Role::Skip => quote!(#member: #name),
    });
    quote! {
        fn cat(parts: ::std::vec::Vec<Self>) -> Self {
            #(#lists)*
            for part in parts {
                #(#pushed)*
            }
            Self { #(#joined),* }
        }
    }
}

/// What sends rows to other processes. The values of a shared field are not those of rows and would be
/// lost, so a struct with one does not travel.
fn travels(fields: &[Field]) -> TokenStream {
    if fields.iter().any(|field| field.role != Role::Rows) {
        return quote!();
    }
    let kinds = fields.iter().map(|field| &field.kind);
    let sent = fields.iter().map(|Field { member, .. }| quote!(::flops_core::Rows::to_host(&self.#member, values);));
    let got = each(fields, |Field { member, .. }| quote!(::flops_core::Rows::with_values(&self.#member, values)?));
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
}

/// `impl Lift`.
pub fn lift(input: &DeriveInput) -> Result<TokenStream> {
    let fields = fields::of(input)?;
    let name = &input.ident;
    let backend = backend::lifted(input)?;
    let lifted = each(&fields, |Field { member, role, .. }| match role {
        Role::Rows | Role::Shared => quote!(::flops_core::Lift::<__Lifted>::lift(self.#member)),
        Role::Skip => quote!(self.#member),
    });
    let inner: Type = parse_quote!(<__Lifted as ::flops_core::__private::AutodiffBackend>::InnerBackend);
    let both = |code: TokenStream| [quote!(#inner), quote!(__Lifted)].map(|by| replaced(code.clone(), &backend, &by));
    // the backend's parameter becomes that of the lifted struct, and what is asked of it holds for both
    let mut generics = input.generics.clone();
    let mut predicates: Vec<WherePredicate> = vec![];
    for parameter in &mut generics.params {
        if let GenericParam::Type(parameter) = parameter
            && parameter.ident == backend
        {
            let bounds = &parameter.bounds;
            if !bounds.is_empty() {
                predicates.extend(both(quote!(#backend: #bounds)).map(|bound| parse_quote!(#bound)));
            }
            *parameter = parse_quote!(__Lifted: ::flops_core::__private::AutodiffBackend);
        }
    }
    for predicate in generics.where_clause.take().into_iter().flat_map(|bounds| bounds.predicates) {
        if mentions(quote!(#predicate), &backend) {
            predicates.extend(both(quote!(#predicate)).map(|bound| parse_quote!(#bound)));
        } else {
            predicates.push(predicate);
        }
    }
    for kind in with_other_parameters(&fields, &input.generics)? {
        let [from, to] = both(quote!(#kind));
        predicates.push(parse_quote!(#from: ::flops_core::Lift<__Lifted, Lifted = #to>));
    }
    if !predicates.is_empty() {
        generics.make_where_clause().predicates.extend(predicates);
    }
    let of_type = arguments(&input.generics, &backend, &inner);
    let of_lifted = arguments(&input.generics, &backend, &parse_quote!(__Lifted));
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

/// `<…>` behind the name of the struct, with another backend.
fn arguments(generics: &Generics, backend: &Ident, by: &Type) -> TokenStream {
    let arguments = generics.params.iter().map(|parameter| -> GenericArgument {
        match parameter {
            GenericParam::Type(parameter) if parameter.ident == *backend => parse_quote!(#by),
            GenericParam::Type(syn::TypeParam { ident, .. }) | GenericParam::Const(syn::ConstParam { ident, .. }) => {
                parse_quote!(#ident)
            }
            GenericParam::Lifetime(parameter) => GenericArgument::Lifetime(parameter.lifetime.clone()),
        }
    });
    quote!(<#(#arguments),*>)
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
fn with_other_parameters<'a>(fields: &'a [Field], generics: &Generics) -> Result<impl Iterator<Item = &'a Type>> {
    let backend = backend::of(generics)?;
    let has_others = generics.type_params().any(|parameter| Some(&parameter.ident) != backend.as_ref());
    Ok(fields.iter().filter(move |field| has_others && field.role != Role::Skip).map(|field| &field.kind))
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
        let shared: DeriveInput = parse_quote!(
            struct Shared<B: Backend> {
                #[rows(shared)]
                a: Tensor<B, 1>,
            }
        );
        for none in [
            parse_quote!(
                struct Nothing;
            ),
            shared,
        ] {
            let why = refused(none);
            assert!(why.iter().all(|why| why.contains("no field has rows")), "{why:?}");
        }
    }

    #[test]
    fn attributes_are_known_and_alone() {
        let with = |attribute: TokenStream| {
            refused(parse_quote!(
                struct A<B: Backend> {
                    #attribute
                    a: Tensor<B, 1>,
                    b: Tensor<B, 1>,
                }
            ))
        };
        for (attribute, what) in [
            (quote!(#[rows(skipped)]), "#[rows(shared)]"),
            (quote!(#[rows(shared, skip)]), "one of"),
            (quote!(#[rows(shared)] #[rows(skip)]), "one of"),
            (quote!(#[rows()]), "empty"),
        ] {
            let why = with(attribute);
            assert!(why.iter().all(|why| why.contains(what)), "{why:?}");
        }
        assert_eq!(with(quote!(#[rows(skip)])), ["", ""]);
    }

    #[test]
    fn a_struct_without_a_backend_has_rows_and_no_other_form() {
        let [rows, lift] = refused(parse_quote!(
            struct Labels(Vec<u8>);
        ));
        assert!(rows.is_empty() && lift.contains("generic over a `Backend`"), "{rows:?}, {lift:?}");
    }

    /// A parameter that belongs to one backend has no counterpart on the other.
    #[test]
    fn a_parameter_of_the_backend_is_not_lifted() {
        let [rows, lift] = refused(parse_quote!(
            struct A<B: Backend, M: Module<B>>(Tensor<B, 1>, M);
        ));
        assert!(rows.is_empty() && lift.contains("`M`"), "{rows:?}, {lift:?}");
        let why = refused(parse_quote!(
            struct A<B: Backend, C: Backend>(Tensor<B, 1>, Tensor<C, 1>);
        ));
        assert!(why.iter().all(|why| why.contains("`C`")), "{why:?}");
    }
}
