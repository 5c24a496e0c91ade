//! The cost of a step by scope and noise law, and against queries, batch and depth.

use flops_benches::{Case, INFERENCE_ROWS, micro};
use flops_core::{NoiseLaw, Placement, Sampling, Space};
use flops_report::Progress;
use flops_vit::{Scope, ViTConfig};

use crate::args::Args;
use crate::measure::{SCOPES, paired};
use crate::memory;
use crate::report::{Row, Table};

/// Measures every scope in every space and by backpropagation, then every law in full scope.
pub fn scopes_and_laws(args: &Args, config: &ViTConfig, table: &mut Table, progress: &mut Progress) {
    let small = |case: Case| Case { batch: 16, max_rows: args.max_rows, ..case };
    let mut measure = |section: &str, name: &str, case: Case| {
        let found = paired(&case, config, args.rounds, args.inference_rows());
        table.rows.push(Row::step(section, name, &case, config.depth, &found));
    };
    for (i, scope) in SCOPES.into_iter().enumerate() {
        progress.at(i, SCOPES.len(), || format!("scope {scope}"));
        for space in Space::ALL {
            measure("scopes", "step", small(Case::new(scope, space)));
        }
        let single = small(Case::new(scope, Space::activation())).with_placement(Placement::Single);
        measure("scopes", "step", single);
        measure("scopes", "backprop", Case::backprop(scope, 64));
    }
    for (i, law) in NoiseLaw::ALL.into_iter().enumerate() {
        progress.at(i, NoiseLaw::ALL.len(), || format!("law {law}"));
        for space in [Space::activation(), Space::weights()] {
            for sampling in [Sampling::OneSided, Sampling::Antithetic] {
                measure("laws", "step", Case { law, sampling, ..small(Case::new(Scope::Full, space)) });
            }
        }
    }
}

/// Measures time and memory against queries, batch and depth.
pub fn dependence(args: &Args, table: &mut Table, progress: &mut Progress) {
    for space in [Space::activation(), Space::weights()] {
        let base = Case { batch: 16, queries: 10, ..Case::new(Scope::Full, space) };
        let queries = [5, 10, 20, 40].map(|queries| (Case { queries, ..base }, 6, "queries"));
        let batches = [8, 16, 32, 64].map(|batch| (Case { batch, ..base }, 6, "batch"));
        let depths = [2, 4, 6, 8].map(|depth| (base, depth, "depth"));
        for (i, (case, depth, section)) in queries.into_iter().chain(batches).chain(depths).enumerate() {
            progress.at(i, 12, || format!("cost against {section}"));
            let found = paired(&case, &micro(depth), args.rounds.min(3), INFERENCE_ROWS);
            let mut row = Row::step(section, "step", &case, depth, &found);
            row.peak_mib = memory::peak(&format!("{depth} {case}"), true);
            table.rows.push(row);
        }
    }
}
