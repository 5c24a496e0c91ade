//! The fields of a struct and what their attributes say.

use proc_macro2::Span;
use syn::{Attribute, Data, DeriveInput, Error, Fields, Index, Member, Result, Type};

/// What becomes of a field when rows are taken.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Role {
    /// It has a row for each example.
    Rows,
    /// All rows share it; it goes where they go.
    Shared,
    /// All rows share it, and it stays as it is.
    Skip,
}

/// A field of a struct.
pub struct Field {
    pub member: Member,
    pub kind: Type,
    pub role: Role,
}

/// The fields of a struct, at least one of them with rows.
pub fn of(input: &DeriveInput) -> Result<Vec<Field>> {
    let Data::Struct(data) = &input.data else {
        let what = "only structs have rows field by field; write the impl of an enum or a union by hand";
        return Err(Error::new_spanned(&input.ident, what));
    };
    let member = |(index, field): (usize, &syn::Field)| match &field.ident {
        Some(name) => Member::Named(name.clone()),
        None => Member::Unnamed(Index { index: index as u32, span: Span::call_site() }),
    };
    let fields = match &data.fields {
        Fields::Named(fields) => Some(&fields.named),
        Fields::Unnamed(fields) => Some(&fields.unnamed),
        Fields::Unit => None,
    };
    let fields = fields.into_iter().flatten().enumerate();
    let fields = fields.map(|(index, field)| {
        let role = role(&field.attrs)?;
        Ok(Field { member: member((index, field)), kind: field.ty.clone(), role })
    });
    let fields = fields.collect::<Result<Vec<_>>>()?;
    if fields.iter().all(|field| field.role != Role::Rows) {
        let what = "no field has rows; leave out `#[rows(shared)]` or `#[rows(skip)]` where there is a row per example";
        return Err(Error::new_spanned(&input.ident, what));
    }
    Ok(fields)
}

/// What the attributes of a field say.
fn role(attributes: &[Attribute]) -> Result<Role> {
    let mut role = Role::Rows;
    for attribute in attributes.iter().filter(|attribute| attribute.path().is_ident("rows")) {
        let before = role;
        attribute.parse_nested_meta(|meta| {
            let said = match () {
                () if meta.path.is_ident("shared") => Role::Shared,
                () if meta.path.is_ident("skip") => Role::Skip,
                () => return Err(meta.error("unknown; write `#[rows(shared)]` or `#[rows(skip)]`")),
            };
            if role != Role::Rows {
                return Err(meta.error("a field has one of `shared` and `skip`"));
            }
            role = said;
            Ok(())
        })?;
        if role == before {
            return Err(Error::new_spanned(attribute, "empty; write `#[rows(shared)]` or `#[rows(skip)]`"));
        }
    }
    Ok(role)
}
