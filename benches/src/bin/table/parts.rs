//! Parts of a step: noise, and matrix products.

use std::hint::black_box;

use burn::prelude::*;
use burn::tensor::Distribution;
use flops_backend::{B, Device, ON_HOST};
use flops_core::NoiseLaw;

use crate::measure::timed;
use crate::report::{Row, Table};

/// Measures the values per second of each noise law, and the multiply-adds per second of a matrix
/// product that fills the device.
pub fn measure(rounds: usize, table: &mut Table) {
    let device = Default::default();
    noise_of_host(rounds, table);
    if !ON_HOST {
        noise_of_device(rounds, table, &device);
    }
    let n = if ON_HOST { 2048 } else { 4096 };
    let a = Tensor::<B, 2>::random([n, n], Distribution::Normal(0.0, 1.0), &device);
    let product = || {
        black_box(a.clone().matmul(a.clone()));
        B::sync(&device).expect("the device answers");
    };
    product();
    let found: Vec<f64> = (0..rounds).map(|_| timed(product)).collect();
    table.rows.push(Row::plain("matmul", "multiply-adds", n * n * n, &found));
}

fn noise_of_host(rounds: usize, table: &mut Table) {
    let mut values = vec![0f32; 1 << 20];
    for law in NoiseLaw::ALL {
        let found: Vec<f64> =
            (0..rounds as u64).map(|seed| timed(|| law.sample(seed, black_box(&mut values)))).collect();
        table.rows.push(Row::plain("noise", law.name(), values.len(), &found));
    }
}

fn noise_of_device(rounds: usize, table: &mut Table, device: &Device) {
    let n = 1 << 24;
    for law in NoiseLaw::ALL {
        let draw = |seed| {
            black_box(law.sample_on::<B>(seed, n, device));
            B::sync(device).expect("the device answers");
        };
        draw(0);
        let found: Vec<f64> = (0..rounds as u64).map(|seed| timed(|| draw(seed))).collect();
        table.rows.push(Row::plain("noise", &format!("{law}, made by the device"), n, &found));
    }
}
