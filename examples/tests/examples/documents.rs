//! The pages for readers: short where they are to be, and without dead links.

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
fn the_readme_fits_a_screen_or_two_and_names_every_page() {
    let text = std::fs::read_to_string(root().join("README.md")).unwrap();
    assert!(text.len() <= 9000, "{} bytes", text.len());
    for page in pages().iter().filter(|page| page.parent().unwrap().ends_with("docs")) {
        let name = page.file_name().unwrap().to_string_lossy();
        assert!(text.contains(&format!("docs/{name}")), "README.md does not name docs/{name}");
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
