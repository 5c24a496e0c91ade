//! The pages for readers: short where they are to be, in the book, without dead links or untested code.

use std::path::{Path, PathBuf};

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// All pages: those of the top folder and of `docs`.
fn pages() -> Vec<PathBuf> {
    let of = |folder: PathBuf| std::fs::read_dir(folder).unwrap().map(|entry| entry.unwrap().path());
    let all = of(root().to_path_buf()).chain(of(root().join("docs")));
    let mut pages: Vec<PathBuf> = all.filter(|path| path.extension().is_some_and(|end| end == "md")).collect();
    pages.sort();
    assert!(pages.len() > 10, "{pages:?}");
    pages
}

/// What links of a page point at, without those to other sites.
fn targets(text: &str) -> Vec<String> {
    let behind = text.split("](").skip(1).filter_map(|rest| rest.split_once(')').map(|(target, _)| target));
    behind.filter(|target| !target.starts_with("http")).map(String::from).collect()
}

/// The anchor of a heading: small letters, no signs, hyphens for spaces.
fn anchor(heading: &str) -> String {
    let kept = heading.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
    kept.collect::<String>().to_lowercase().replace(' ', "-")
}

#[test]
fn links_lead_somewhere() {
    let mut links = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for target in targets(&text) {
            let (path, place) = target.split_once('#').unwrap_or((&target, ""));
            let file = if path.is_empty() { page.clone() } else { page.with_file_name("").join(path) };
            assert!(file.exists(), "{}: {target} is not there", page.display());
            if !place.is_empty() {
                let text = std::fs::read_to_string(&file).unwrap();
                let headings = text.lines().filter_map(|line| line.strip_prefix('#'));
                let found = headings.map(|line| anchor(line.trim_start_matches('#').trim())).any(|it| it == place);
                assert!(found, "{}: {target} has no such heading", page.display());
            }
            links += 1;
        }
    }
    assert!(links > 40, "{links} links");
}

#[test]
fn the_readme_fits_a_screen_or_two_and_names_the_guide() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    assert!(text.len() <= 9000, "{} bytes", text.len());
    assert!(text.contains("docs/SUMMARY.md"), "README.md does not name docs/SUMMARY.md");
}

/// The path of a page from the top folder.
fn name(page: &Path) -> String {
    page.strip_prefix(root()).unwrap().to_string_lossy().replace('\\', "/")
}

/// The book has every page, once.
#[test]
fn the_summary_names_every_page() {
    let summary = std::fs::read_to_string(root().join("docs/SUMMARY.md")).unwrap();
    let mut listed: Vec<String> = targets(&summary).iter().map(|target| format!("docs/{target}")).collect();
    listed.sort();
    let pages: Vec<String> = pages().iter().map(|page| name(page)).collect();
    let expected = pages.into_iter().filter(|page| page.starts_with("docs/") && page != "docs/SUMMARY.md");
    assert_eq!(listed, expected.collect::<Vec<_>>());
}

/// What stands behind the opening fence of each code block of a page: its language.
fn languages(text: &str) -> Vec<&str> {
    let fences = text.lines().filter_map(|line| line.trim_start().strip_prefix("```"));
    fences.step_by(2).map(str::trim).collect()
}

/// rustdoc runs the Rust blocks of the pages that `examples/src/lib.rs` names.
#[test]
fn rust_blocks_are_tested() {
    let source = std::fs::read_to_string(root().join("examples/src/lib.rs")).unwrap();
    let mut blocks = 0;
    for page in pages() {
        let (text, name) = (std::fs::read_to_string(&page).unwrap(), name(&page));
        let languages = languages(&text);
        assert!(languages.iter().all(|it| !it.is_empty()), "{name}: rustdoc takes a block of no language for Rust");
        let skipped = languages.iter().find(|it| it.contains("ignore"));
        assert_eq!(skipped, None, "{name}: nothing tests this block");
        let rust = languages.iter().filter(|it| it.split(',').next() == Some("rust")).count();
        let tested = source.contains(&format!("\"{name}\","));
        assert_eq!(tested, rust > 0, "{name} has {rust} Rust blocks; mend `guide` in examples/src/lib.rs");
        blocks += rust;
    }
    assert!(blocks > 15, "{blocks} blocks");
}

/// The texts of errors that the guide explains are those of the libraries.
#[test]
fn errors_on_pages_exist() {
    let crates = ["flops-core/src/error.rs", "flops-vit/src/error.rs", "flops-multimodal/src/error.rs"];
    let joined = |path| {
        let text = std::fs::read_to_string(root().join(path)).unwrap();
        // a text that goes on in the next line
        text.split("\\\n").map(str::trim_start).collect::<String>()
    };
    let sources: String = crates.into_iter().map(joined).collect();
    let questions = std::fs::read_to_string(root().join("docs/questions.md")).unwrap();
    let texts: Vec<&str> = questions.lines().filter_map(|l| l.strip_prefix("| `")?.split('`').next()).collect();
    assert!(texts.len() > 15, "{texts:?}");
    for text in texts {
        assert!(sources.contains(text), "no error says `{text}`");
    }
}

/// Programs that pages tell readers to run exist.
#[test]
fn programs_on_pages_exist() {
    let mut named = 0;
    for page in pages() {
        let text = std::fs::read_to_string(&page).unwrap();
        for rest in text.split("--example ").skip(1) {
            let name: String = rest.chars().take_while(|c| c.is_alphanumeric() || *c == '_').collect();
            if name.is_empty() || name == "NAME" {
                continue;
            }
            let folder = root().join("examples/examples").join(&name);
            let file = folder.with_extension("rs");
            assert!(file.exists() || folder.join("main.rs").exists(), "{}: there is no {name}", page.display());
            named += 1;
        }
    }
    assert!(named > 20, "{named} programs");
}
