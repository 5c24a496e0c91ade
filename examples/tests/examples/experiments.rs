//! Every experiment on tiny data: its files, its results, and its errors for bad flags.

use std::fs;
use std::path::Path;

use serde_json::Value;

use crate::vit_cifar::folder;

/// Runs an experiment with a tiny model, checks its files and returns its `summary.json`.
fn summary(name: &str, dir: &Path, args: &[&str], files: &[&str]) -> Value {
    let out = crate::succeed(name, dir, &[&["--artifact-dir", "run", "--threads", "1"], args].concat());
    assert!(out.contains("summary.json"), "{out}");
    let run = dir.join("run");
    for file in files {
        let text = fs::read_to_string(run.join(file)).unwrap_or_else(|e| panic!("{file}: {e}"));
        if file.ends_with(".svg") {
            assert!(text.starts_with("<svg") && !text.contains("NaN"), "{file}");
        } else {
            assert!(text.lines().count() > 1, "{file} is empty");
        }
    }
    let summary: Value = serde_json::from_slice(&fs::read(run.join("summary.json")).unwrap()).unwrap();
    assert!(summary["seconds"].is_f64() && summary["versions"]["burn"].is_string());
    summary
}

const TINY: [&str; 6] = ["--weights", "tiny.safetensors", "--limit", "48", "--batch-size", "16"];

#[test]
fn variance_synthetic() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--seeds", "2", "--steps", "40", "--repeats", "30", "--batch-size", "32"];
    let files = ["variance.svg", "variance.csv", "parameters.csv", "sampling.csv"];
    let summary = summary("variance_synthetic", dir.path(), &flags, &files);
    let sampled = |name: &str| summary["sampling"][name]["mean"].as_f64().unwrap();
    // sampling the data costs the variance of the data besides: it never gets below Neyman's
    assert!(sampled("neyman") <= sampled("importance") && sampled("importance") < 1.0, "{summary}");
    assert_eq!(summary["parameters"].as_object().unwrap().len(), 7);
    let relative = &summary["relative_variance"];
    let of = |name: &str| relative[name].as_f64().unwrap();
    assert_eq!(of("uniform"), 1.0);
    // two seeds of 30 estimates: within a quarter of the floor
    assert!(of("floor") < 0.8 && (of("neyman") / of("floor") - 1.0).abs() < 0.25, "{relative}");
    assert!(of("gaussian") < 0.9 && of("bernoulli") < 0.95, "{relative}");
    // the same seeds give the same results
    let again = self::summary("variance_synthetic", dir.path(), &flags, &[]);
    assert_eq!(&again["relative_variance"], relative);
    assert!(crate::fail("variance_synthetic", dir.path(), &["--seeds", "0"]).contains("--seeds 0"));
    assert!(crate::fail("variance_synthetic", dir.path(), &["--batch-size", "0"]).contains("--batch-size 0"));
}

#[test]
fn allocator_ablation() {
    let dir = folder();
    let files = ["ablation.svg", "trajectory.csv", "training.csv", "curves.csv"];
    let flags = [TINY.as_slice(), &["--seeds", "2", "--steps", "12", "--every", "3", "--queries", "4"]].concat();
    let summary = summary("allocator_ablation", dir.path(), &flags, &files);
    let errors = &summary["squared_error_over_uniform"];
    assert_eq!(errors["uniform"]["expected"]["mean"], 1.0);
    for name in ["neyman, running", "gaussian, loss", "bernoulli, pilot:1", "neyman, variances known"] {
        assert!(errors[name]["measured"]["mean"].as_f64().unwrap() > 0.0, "{name}: {errors}");
    }
    assert_eq!(summary["training"]["gaussian, running"]["loss"].as_array().unwrap().len(), 2);
    assert!(summary["second_moment_by_layer"].as_array().unwrap().len() > 5);
    // what was not run is not drawn
    let drawn = |name: &str| fs::read_to_string(dir.path().join("run/ablation.svg")).unwrap().contains(name);
    assert!(drawn("bernoulli, running") && !drawn("bernoulli, loss"));
    let few = [flags.as_slice(), &["--contenders", "neyman", "--estimates", "loss"]].concat();
    self::summary("allocator_ablation", dir.path(), &few, &files);
    assert!(drawn("neyman, loss") && drawn("variances known") && !drawn("bernoulli") && !drawn("running"));
    let bad = [TINY.as_slice(), &["--queries", "0"]].concat();
    assert!(crate::fail("allocator_ablation", dir.path(), &bad).contains("queries_per_datum = 0"));
    let bad = [TINY.as_slice(), &["--contenders", "best"]].concat();
    assert!(crate::fail("allocator_ablation", dir.path(), &bad).contains("'best'"));
}

#[test]
fn noise_robustness() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--seeds", "1", "--steps", "10", "--samples", "20", "--queries", "4"];
    let files = ["kurtosis.svg", "variance.svg", "robustness.csv"];
    let summary = summary("noise_robustness", dir.path(), &flags, &files);
    assert_eq!(summary["cells"].as_array().unwrap().len(), 3 * flops_core::NoiseLaw::ALL.len());
    assert!(crate::fail("noise_robustness", dir.path(), &["--steps", "0"]).contains("--steps 0"));
}

#[test]
fn query_efficiency() {
    let dir = folder();
    let more = ["--seeds", "2", "--queries", "2,4", "--total", "600", "--looks", "2", "--target", "0.05"];
    let flags = [TINY.as_slice(), &more].concat();
    let summary = summary("query_efficiency", dir.path(), &flags, &["efficiency.svg", "efficiency.csv"]);
    assert_eq!(summary["target"], 0.05);
    let prices = summary["queries_to_target"].as_object().unwrap();
    for method in ["default", "flops", "eggroll", "es", "mezo", "fzoo", "lozo", "zo-muon"] {
        assert!(prices.contains_key(method), "{method}: {prices:?}");
    }
    assert!(prices["default"].is_u64() || prices["default"].is_null());
    let bad = [TINY.as_slice(), &["--queries", "1"]].concat();
    assert!(crate::fail("query_efficiency", dir.path(), &bad).contains("at least 2"));
    assert!(crate::fail("query_efficiency", dir.path(), &["--dataset", "mnist"]).contains("mnist"));
}

#[test]
fn sensitivity() {
    let dir = folder();
    // `--batch-size` is a list here
    let flags = ["--weights", "tiny.safetensors", "--limit", "48", "--batch-size", "8,16", "--lr", "0.01", "--sigma"];
    let flags = [flags.as_slice(), &["0.01,0.1", "--queries", "2,4", "--total", "300", "--seeds", "1"]].concat();
    let summary = summary("sensitivity", dir.path(), &flags, &["accuracy.svg", "error.svg", "sensitivity.csv"]);
    assert_eq!(summary["cells"].as_array().unwrap().len(), 8);
    assert!(crate::fail("sensitivity", dir.path(), &["--sigma", "0"]).contains("sigma = 0"));
    assert!(crate::fail("sensitivity", dir.path(), &["--lr", "7"]).contains("--lr 7"));
}

#[test]
fn inspect_allocation() {
    let dir = folder();
    let flags = [TINY.as_slice(), &["--seeds", "1", "--steps", "10"]].concat();
    let summary = summary("inspect_allocation", dir.path(), &flags, &["allocation.svg", "allocation.csv"]);
    assert!(summary["relative_variance"]["mean"].as_f64().unwrap() > 0.0);
    let svg = fs::read_to_string(dir.path().join("run/allocation.svg")).unwrap();
    assert_eq!(svg.matches("<image").count(), 16);
    // three with most queries and two with fewest
    crate::succeed(
        "inspect_allocation",
        dir.path(),
        &[&flags[..], &["--shown", "5", "--artifact-dir", "run"]].concat(),
    );
    let part = fs::read_to_string(dir.path().join("run/allocation.svg")).unwrap();
    assert!(part.matches("<image").count() == 5 && part.contains("5 of 16 images"));
    let queries = |svg: &str| -> Vec<usize> {
        svg.split(" queries<").filter_map(|text| text.rsplit('>').next()?.parse().ok()).collect()
    };
    let all = queries(&svg);
    assert_eq!(queries(&part), [&all[..3], &all[14..]].concat());
    for (flag, value, says) in [("--allocator", "best", "'best'"), ("--shown", "0", "--shown 0")] {
        let bad = [TINY.as_slice(), &[flag, value]].concat();
        assert!(crate::fail("inspect_allocation", dir.path(), &bad).contains(says));
    }
}

/// Few episodes: every method learns something, none is done.
#[test]
fn cartpole() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--seeds", "2", "--episodes", "400"];
    let summary = summary("cartpole", dir.path(), &flags, &["returns.svg", "returns.csv"]);
    for method in ["weights", "lowrank:1", "openai-es"] {
        let of = &summary["methods"][method];
        assert_eq!(of["runs"], 2, "{summary}");
        assert_eq!(of["last_return"].as_array().unwrap().len(), 2, "{summary}");
    }
    let looks = fs::read_to_string(dir.path().join("run/returns.csv")).unwrap();
    let best = looks.lines().skip(1).map(|line| line.split(',').nth(4).unwrap().parse::<f64>().unwrap());
    // an untrained policy lasts 10 to 40 steps
    assert!(best.fold(0.0, f64::max) > 60.0, "{looks}");
    let more = [&flags[..2], &["--episodes", "60", "--methods", "activation"]].concat();
    let refused = crate::fail("cartpole", dir.path(), &[&["--artifact-dir", "bad"], more.as_slice()].concat());
    assert!(refused.contains("calls that get noise") && refused.contains("mask"), "{refused}");
    for (flag, value) in
        [("--seeds", "0"), ("--episodes", "0"), ("--batch-size", "0"), ("--lr", "2"), ("--threads", "0")]
    {
        let error = crate::fail("cartpole", dir.path(), &[flag, value]);
        assert!(error.contains(&format!("{flag} {value}")), "{error}");
    }
    assert!(crate::fail("cartpole", dir.path(), &["--methods", "reinforce"]).contains("openai-es"));
    assert!(crate::fail("cartpole", dir.path(), &["--sigma", "0"]).contains("sigma = 0"));
    assert!(crate::fail("cartpole", dir.path(), &["--queries", "0"]).contains("queries_per_datum = 0"));
}

#[test]
fn imbalanced() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--seeds", "2", "--epochs", "4", "--steps", "4"];
    let summary = summary("imbalanced", dir.path(), &flags, &["macro_f1.svg", "scores.csv"]);
    let ways = &summary["ways"];
    for way in ["start", "cross-entropy", "weighted", "macro-f1"] {
        let f1 = ways[way]["test_macro_f1"]["mean"].as_f64().unwrap();
        // to call all wines ordinary is worth 30 %
        assert!((25.0..80.0).contains(&f1), "{way}: {summary}");
    }
    let passes = |way: &str| ways[way]["passes"]["mean"].as_f64().unwrap();
    assert!(passes("start") == 0.0 && passes("weighted") == passes("cross-entropy"), "{summary}");
    // to within a batch of 64 wines, of three passes each
    assert!((0.0..192.0).contains(&(passes("cross-entropy") - passes("macro-f1"))), "{summary}");
    for (flag, value) in [("--seeds", "0"), ("--epochs", "0"), ("--steps", "0"), ("--lr", "2")] {
        let error = crate::fail("imbalanced", dir.path(), &[flag, value]);
        assert!(error.contains(&format!("{flag} {value}")), "{error}");
    }
    assert!(crate::fail("imbalanced", dir.path(), &["--sigma", "0"]).contains("sigma = 0"));
}

/// Every method in both scopes; then a file of one's own on a folder of a BERT, and what is wrong with
/// others.
#[test]
fn text() {
    let dir = tempfile::tempdir().unwrap();
    let flags = ["--seeds", "2", "--row-forwards", "400", "--looks", "2", "--batch-size", "16"];
    let summary = summary("text", dir.path(), &flags, &["text.svg", "text.csv"]);
    let runs = summary["runs"].as_array().unwrap();
    assert_eq!(runs.len(), 2 * 3);
    for run in runs {
        let accuracy = run["test_accuracy_percent"]["mean"].as_f64().unwrap();
        assert!((20.0..=100.0).contains(&accuracy), "{run}");
        // lora:4 trains 2 layers × 2 adapters × 2·4·64 values and the head, full everything
        let trained = if run["scope"] == "lora:4" { 2.0 * 2.0 * 512.0 + 130.0 } else { 72_128.0 + 130.0 };
        assert_eq!(run["trained"].as_f64().unwrap(), trained, "{run}");
    }
    let csv = std::fs::read_to_string(dir.path().join("run/text.csv")).unwrap();
    let spent = csv.lines().skip(1).map(|line| line.split(',').nth(5).unwrap().parse::<u64>().unwrap());
    // the last look of a run is behind its budget by less than the costliest step
    assert!(spent.max().unwrap() < 400 + 16 * 9, "{csv}");
    let path = |name: &str| dir.path().join(name).display().to_string();
    let write = |name: &str, text: &str| std::fs::write(dir.path().join(name), text).unwrap();
    let lines = ["a small star,b", "a large disc,a", "\"a dotted ring, tiny\",b", "a plain red cross,a"].join("\n");
    write("own.csv", &format!("text,label\n{lines}\n"));
    let own = ["--csv", &path("own.csv"), "--scopes", "head", "--methods", "forward"];
    let quick = ["--seeds", "1", "--row-forwards", "40", "--batch-size", "1", "--looks", "1"];
    let ran = crate::succeed("text", dir.path(), &[own.as_slice(), &quick].concat());
    assert!(ran.contains("own.csv in 2 classes") && ran.contains("4 texts"), "{ran}");
    let fail = |flags: &[&str]| crate::fail("text", dir.path(), flags);
    write("unlabelled.csv", "text,class\na star,b\n");
    assert!(fail(&["--csv", &path("unlabelled.csv")]).contains("no column label"));
    write("foreign.csv", "text,label\nein roter Kreis,a\nein Stern,b\nzwei Sterne,a\ndrei Kreise,b\n");
    assert!(fail(&["--csv", &path("foreign.csv")]).contains("give one that does by --text FOLDER"));
    assert!(fail(&["--csv", &path("none.csv")]).contains("none.csv"));
    assert!(fail(&["--text", &path("none")]).contains("none"));
    assert!(fail(&["--scopes", "last:3"]).contains("scope = last:3"));
    assert!(fail(&["--scopes", "lora:65"]).contains("rank = 65"));
    assert!(fail(&["--scopes", "head,last:3"]).contains("scope = last:3"));
    assert!(fail(&["--test-share", "0.5"]).contains("captions have a test of their own"));
    let zeros = ["--row-forwards", "--batch-size", "--looks"].map(|flag| (flag, "0"));
    for (flag, value) in zeros.into_iter().chain([("--test-share", "1"), ("--lr", "2"), ("--max-tokens", "1")]) {
        let error = fail(&[flag, value]);
        assert!(error.contains(&format!("{flag} {value}")), "{error}");
    }
}

/// Every method once, and then again: finished runs are not repeated.
#[test]
fn deep_scopes() {
    let dir = folder();
    let tiny = [TINY.as_slice(), &["--looks", "2", "--fixed-batch", "8", "--row-forwards", "600"]].concat();
    let more = ["--scopes", "last:1,full", "--queries", "1,2", "--lrs", "0.001,0.002", "--seeds", "2"];
    let flags = [tiny.as_slice(), &more].concat();
    let files = ["final.csv", "curves.csv", "sites.csv", "accuracy-full.svg", "accuracy-last_1.svg", "alpha-full.svg"];
    let files = [files.as_slice(), &["explained-full.svg", "cosine-full.svg", "config.json"]].concat();
    let first = summary("deep_scopes", dir.path(), &flags, &files);
    let rows = first["final"].as_array().unwrap();
    let of = |method: &str, queries: u64| {
        let found = rows.iter().find(|r| r["method"] == method && r["queries"] == queries && r["subject"] == "full");
        found.unwrap_or_else(|| panic!("{method} with {queries} queries: {first}"))
    };
    let ours = ["unbiased", "unbiased-branch", "shrunk-linear", "shrunk-branch"];
    let recipes = flops_core::Recipe::ALL.into_iter().map(|recipe| recipe.name()).filter(|&name| name != "default");
    for method in ours.into_iter().chain(recipes) {
        let row = of(method, 2);
        // the last step is the first one that spends the budget
        let spent = row["row_forwards"].as_f64().unwrap();
        assert!((600.0..800.0).contains(&spent), "{method}: {spent}");
        assert_eq!((&row["seeds"], &row["failed"]), (&2.into(), &0.into()), "{row}");
        // so early a biased estimate may still be nothing
        assert!(row["cosine"].is_f64() || method.starts_with("shrunk") || method == "pseuzo", "{row}");
        assert_eq!(row["explained"].is_f64(), ours.contains(&method) || method == "pseuzo", "{row}");
    }
    assert_eq!(of("backprop", 0)["cosine"], 1.0);
    let left_out = first["left_out"].as_array().unwrap();
    assert!(left_out.iter().any(|line| line.as_str().unwrap().contains("fzoo, 1 queries")), "{left_out:?}");

    // the table in Markdown, from the runs alone
    let runs = || fs::read_dir(dir.path().join("run/runs")).unwrap().count();
    let before = runs();
    let again = [&["--artifact-dir", "run", "--threads", "2", "--report-only"], flags.as_slice()].concat();
    let out = crate::succeed("deep_scopes", dir.path(), &again);
    assert!(out.contains("| shrunk-branch | full | 2 | "), "{out}");
    assert_eq!(runs(), before);
    let path = dir.path().join("run/summary.json");
    let second: Value = serde_json::from_slice(&fs::read(path).unwrap()).unwrap();
    assert_eq!(second["final"], first["final"]);

    // a part of the grid in the same folder; other settings need another one
    let part = [tiny.as_slice(), &["--methods", "unbiased,backprop", "--scopes", "full", "--seeds", "1"]].concat();
    let part = [&["--artifact-dir", "run", "--queries", "2", "--lrs", "0.001"], part.as_slice()].concat();
    assert!(crate::succeed("deep_scopes", dir.path(), &part).contains("| unbiased | full | 2 | 0.001 | "));
    assert_eq!(runs(), before);
    let other = [part.as_slice(), &["--sigma", "0.5"]].concat();
    assert!(crate::fail("deep_scopes", dir.path(), &other).contains("sigma is 0.5"));
    let bad = [TINY.as_slice(), &["--methods", "best"]].concat();
    assert!(crate::fail("deep_scopes", dir.path(), &bad).contains("shrunk-branch"));
    assert!(crate::fail("deep_scopes", dir.path(), &["--queries", "0"]).contains("queries_per_datum = 0"));
    assert!(crate::fail("deep_scopes", dir.path(), &["--sigma", "0"]).contains("sigma = 0"));
}

#[test]
fn deep_scopes_from_scratch() {
    let dir = folder();
    let flags = [TINY.as_slice(), &["--from-scratch", "--networks", "mlp,cnn,vit", "--queries", "2"]].concat();
    let more = ["--methods", "unbiased,shrunk-linear,shrunk-branch,mezo,backprop", "--lrs", "0.002", "--seeds", "1"];
    let flags = [flags.as_slice(), &more, &["--row-forwards", "600", "--looks", "1", "--fixed-batch", "8"]].concat();
    let summary = summary("deep_scopes", dir.path(), &flags, &["final.csv", "accuracy-mlp.svg", "explained-cnn.svg"]);
    // only the ViT has branches
    assert_eq!(summary["final"].as_array().unwrap().len(), 4 + 4 + 5, "{summary}");
    assert_eq!(summary["left_out"].as_array().unwrap().len(), 2, "{summary}");
    let bad = crate::fail("deep_scopes", dir.path(), &["--from-scratch", "--networks", "resnet"]);
    assert!(bad.contains("choose from mlp, cnn, vit"), "{bad}");
    assert!(crate::fail("deep_scopes", dir.path(), &["--networks", "mlp"]).contains("--from-scratch"));
}

#[test]
fn quantized() {
    let dir = folder();
    let flags = [TINY.as_slice(), &["--seeds", "2", "--steps", "12", "--queries", "4", "--looks", "2"]].concat();
    // the tiny model is mostly narrower than a block
    let schemes =
        [flags.as_slice(), &["--schemes", "int8-tensor,int4-tensor", "--trained-scheme", "int4-tensor"]].concat();
    let summary = summary("quantized", dir.path(), &schemes, &["quantized.svg", "quantized.csv"]);
    let rows = summary["methods"].as_array().unwrap();
    let of =
        |method: &str| rows.iter().find(|r| r["method"] == method).unwrap_or_else(|| panic!("{method}: {summary}"));
    let bytes = |method: &str| of(method)["bytes"].as_f64().unwrap();
    assert_eq!(rows.len(), 7);
    for row in rows {
        assert!((0.0..=100.0).contains(&row["accuracy_percent"]["mean"].as_f64().unwrap()), "{row}");
    }
    let [float, int8, int4] = ["float", "int8-tensor frozen", "int4-tensor frozen"].map(bytes);
    let trained = bytes("int4-tensor stochastic");
    assert!(float > int8 && int8 > int4 && int4 > trained, "{summary}");
    // error feedback keeps a float for each trained value of a matrix
    let feedback = of("int4-tensor error-feedback");
    assert_eq!(feedback["bytes"].as_f64().unwrap() - feedback["residual_bytes"].as_f64().unwrap(), trained);
    assert!(of("int4-tensor scales")["trained"].as_f64() < of("float")["trained"].as_f64());
    let csv = fs::read_to_string(dir.path().join("run/quantized.csv")).unwrap();
    assert_eq!(csv.lines().count(), 1 + 7 * 2 * 2);
    let bad = [TINY.as_slice(), &["--schemes", "int3"]].concat();
    let line = crate::fail("quantized", dir.path(), &bad);
    assert!(line.contains("int3") && line.contains("int8, int4, int8-tensor, int4-tensor"), "{line}");
    assert!(crate::fail("quantized", dir.path(), &["--steps", "0"]).contains("--steps 0"));
    assert!(crate::fail("quantized", dir.path(), &["--unpack", "never"]).contains("each-pass"));
    let twice = ["--methods", "frozen,float", "--schemes", "int4,int4"];
    assert!(crate::fail("quantized", dir.path(), &twice).contains("int4 frozen would be compared with itself"));
}
