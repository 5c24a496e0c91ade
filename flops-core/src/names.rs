//! One list of names for each plain enum, from which its parsing and printing follow.

/// Gives an enum without fields `ALL`, `name()`, `Display` and `FromStr` from one list of names.
///
/// The list stands below the enum, which keeps its own docs and derives. The literal after the
/// enum's name says what it is, as the error of an unknown name words it. A variant missing from
/// the list does not compile.
///
/// ```text
/// named_enum! { NoiseLaw: "noise law" { Gaussian => "gaussian", Laplace => "laplace" } }
/// ```
macro_rules! named_enum {
    ($type:ident: $what:literal {
        $first:ident => $first_name:literal $(, $variant:ident => $name:literal)* $(,)?
    }) => {
        impl $type {
            #[doc = concat!("Every ", $what, ", in the order of the documentation.")]
            pub const ALL: [Self; [$first_name $(, $name)*].len()] = [Self::$first $(, Self::$variant)*];

            /// The name on command lines and in records.
            pub const fn name(self) -> &'static str {
                match self {
                    Self::$first => $first_name,
                    $(Self::$variant => $name,)*
                }
            }
        }

        impl std::fmt::Display for $type {
            fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
                f.write_str(self.name())
            }
        }

        impl std::str::FromStr for $type {
            type Err = $crate::Error;

            fn from_str(name: &str) -> Result<Self, $crate::Error> {
                Self::ALL.into_iter().find(|known| known.name() == name).ok_or_else(|| $crate::Error::Unknown {
                    what: $what,
                    name: name.into(),
                    choices: concat!($first_name $(, ", ", $name)*),
                })
            }
        }
    };
}

pub(crate) use named_enum;

#[cfg(test)]
mod tests {
    use crate::error::Error;

    #[derive(Clone, Copy, Debug, PartialEq)]
    enum Shade {
        Light,
        VeryDark,
    }

    named_enum! { Shade: "shade" { Light => "light", VeryDark => "very-dark" } }

    #[test]
    fn names_are_read_back_and_unknown_ones_list_the_choices() {
        assert_eq!(Shade::ALL, [Shade::Light, Shade::VeryDark]);
        for shade in Shade::ALL {
            assert_eq!(shade.to_string().parse::<Shade>(), Ok(shade));
        }
        let unknown = Error::Unknown { what: "shade", name: "grey".into(), choices: "light, very-dark" };
        assert_eq!("grey".parse::<Shade>(), Err(unknown));
    }
}
