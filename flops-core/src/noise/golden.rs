//! The first values of every law and key, as they were when this file was written.
//!
//! Resumed runs rely on them: a change here is a change of every run with a given seed. Where one
//! is meant, run the tests and copy the values that they print.

use burn::backend::Flex;

use super::source::tests::source;
use super::{NoiseLaw, NoiseSource, RowKey, Sampling};

/// What a stream is keyed by, beside the seed 3.
#[derive(Clone, Copy, Debug)]
struct Key {
    sampling: Sampling,
    site: usize,
    step: u64,
    position: u64,
    query: usize,
}

const BASE: Key = Key { sampling: Sampling::OneSided, site: 1, step: 5, position: 2, query: 4 };

fn keyed(law: NoiseLaw, key: Key) -> (NoiseSource, RowKey) {
    let source = NoiseSource { step: key.step, sigma: 1.0, ..source(law, key.sampling) };
    (source, RowKey { position: key.position, query: key.query })
}

/// The first values on the host, and of a device.
fn first(law: NoiseLaw, key: Key) -> [[f32; 3]; 2] {
    let (source, row) = keyed(law, key);
    let device = source.device_noise::<Flex>(key.site, &[row], &Default::default()).take(3);
    let host = source.perturbation(key.site, &[row], 3);
    [host, device.into_data().iter::<f32>().collect()].map(|values| values.try_into().unwrap())
}

/// Compares up to the last bits of logarithms and cosines.
fn check(got: &[[[f32; 3]; 2]], expected: &[[[f32; 3]; 2]]) {
    let near = |a: &f32, b: &f32| (a - b).abs() <= 2e-6 * b.abs().max(1.0);
    let same = got.iter().flatten().flatten().zip(expected.iter().flatten().flatten()).all(|(a, b)| near(a, b));
    assert!(got.len() == expected.len() && same, "{got:?}");
}

#[test]
fn laws_have_their_first_values() {
    let got: Vec<_> = NoiseLaw::ALL.map(|law| first(law, BASE)).into();
    check(
        &got,
        &[
            [[-0.87314093, 0.10058802, -0.8039884], [1.2666036, -0.009795086, 0.42886034]],
            [[0.7895465, 0.2024117, 1.49086], [-1.3365492, 0.071985155, -0.31253657]],
            [[1.0, -1.0, -1.0], [-1.0, 1.0, 1.0]],
            [[0.59792095, 0.6856727, -0.8697398], [-1.2088096, 1.3967535, 0.4945138]],
        ],
    );
}

#[test]
fn every_part_of_a_key_has_its_first_values() {
    let keys = [
        Key { site: 2, ..BASE },
        Key { step: 6, ..BASE },
        Key { position: 3, ..BASE },
        Key { query: 5, ..BASE },
        Key { sampling: Sampling::Antithetic, ..BASE },
        Key { sampling: Sampling::Antithetic, query: 5, ..BASE },
    ];
    let got: Vec<_> = keys.iter().map(|&key| first(NoiseLaw::Uniform, key)).collect();
    check(
        &got,
        &[
            // a device has one stream for all sites: this is the base's
            [[-1.4581339, 0.33333573, 0.25649673], [-1.2088096, 1.3967535, 0.4945138]],
            [[-0.3614179, 0.054769143, -0.36419934], [0.65051675, 1.7259697, -0.90258116]],
            [[-1.6747161, -0.46027595, -0.15555458], [-1.46429, 0.9936985, -0.15561962]],
            [[1.4233043, 1.0397155, -1.7127885], [-0.17354673, -1.4498464, 0.8228792]],
            [[-1.3322763, 0.23209698, 1.5527346], [-1.1186725, -1.4452523, 0.36212516]],
            [[1.3322763, -0.23209698, -1.5527346], [1.1186725, 1.4452523, -0.36212516]],
        ],
    );
}

/// The sites of twelve directions, drawn one by one and spread, of two examples and in two steps.
#[test]
fn sites_have_their_first_choices() {
    let choices = [(false, 5, 2), (false, 5, 3), (false, 6, 2), (true, 5, 2), (true, 5, 3), (true, 6, 2)];
    let got = choices.map(|(spread, step, position)| {
        let source = NoiseSource {
            sites: Some([0.2, 0.5, 0.3].into()),
            spread,
            step,
            ..source(NoiseLaw::Rademacher, Sampling::OneSided)
        };
        (0..12).map(|direction| source.chosen(position, direction).unwrap().to_string()).collect::<String>()
    });
    let independent = ["210220210220", "111201212210", "111122001220"];
    let spread = ["210210112102", "102101121021", "102121121011"];
    assert_eq!(got, [independent, spread].concat().as_slice());
}
