//! The files of a crate use each other without circles: if `a.rs` uses an item that is defined in
//! `b.rs`, then `b.rs` uses nothing of `a.rs`, directly or through other files.
//!
//! The sources are read token by token. Paths are resolved to the file that defines the item,
//! through re-exports. A `pub use` is no use, nor is anything under `#[cfg(test)]` or
//! `#[cfg(doc)]`, in comments, in strings or in the body of a macro. A glob, or a name that is not
//! found, counts as the file of the module that it was looked for in. Methods are not followed:
//! only names in paths, imports and calls of macros are.

mod tokens;

use std::collections::{BTreeMap, BTreeSet};
use std::path::Path;

use tokens::{closing, is_word, split, tokens, without_left_out};

/// The text of each source file, under its path relative to the package.
type Sources = BTreeMap<String, String>;

/// Items used, by the file that uses them and the file that defines them.
type Edges = BTreeMap<(String, String), BTreeSet<String>>;

#[test]
fn imports_have_no_circles() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    let mut packages = 0;
    let mut report = String::new();
    for entry in std::fs::read_dir(workspace).unwrap() {
        let package = entry.unwrap().path();
        if package.join("Cargo.toml").exists() {
            packages += 1;
            let name = package.file_name().unwrap().to_string_lossy().into_owned();
            report.extend(circles(&sources(&package)).iter().map(|circle| format!("\nin {name}:\n{circle}")));
        }
    }
    assert!(packages >= 5, "found {packages} packages in {}", workspace.display());
    assert!(report.is_empty(), "files import each other in circles:\n{report}");
}

/// Cargo builds examples and benches for a test run, and runs no test in them.
#[test]
fn programs_hold_no_tests() {
    let workspace = Path::new(env!("CARGO_MANIFEST_DIR")).parent().unwrap();
    for package in ["examples", "benches"] {
        let sources = sources(&workspace.join(package));
        let programs = sources.iter().filter(|(name, _)| !name.starts_with("src/"));
        let dead: Vec<&String> = programs.filter(|(_, text)| text.contains("#[test]")).map(|(name, _)| name).collect();
        assert!(dead.is_empty(), "no run takes the tests of {dead:?}; move them, and what they test, to {package}/src");
    }
}

/// Reads the Rust files of a package, its tests apart.
pub fn sources(package: &Path) -> Sources {
    fn read(package: &Path, dir: &Path, sources: &mut Sources) {
        for entry in std::fs::read_dir(dir).unwrap() {
            let path = entry.unwrap().path();
            if path.is_dir() {
                read(package, &path, sources);
            } else if path.extension().is_some_and(|extension| extension == "rs") {
                let parts = path.strip_prefix(package).unwrap().components();
                let name = parts.map(|part| part.as_os_str().to_string_lossy()).collect::<Vec<_>>().join("/");
                sources.insert(name, std::fs::read_to_string(&path).unwrap());
            }
        }
    }
    let mut sources = Sources::new();
    for folder in ["src", "examples", "benches"] {
        if package.join(folder).is_dir() {
            read(package, &package.join(folder), &mut sources);
        }
    }
    sources
}

/// Describes each circle among the files of a package: a line for each use in it.
pub fn circles(sources: &Sources) -> Vec<String> {
    let edges = edges(sources);
    let mut reach: BTreeMap<&str, BTreeSet<&str>> = BTreeMap::new();
    for from in edges.keys().map(|(from, _)| from.as_str()) {
        let mut open = vec![from];
        let reached = reach.entry(from).or_default();
        while let Some(file) = open.pop() {
            let next = edges.keys().filter(|(from, _)| from == file).map(|(_, to)| to.as_str());
            open.extend(next.filter(|to| reached.insert(to)));
        }
    }
    let reaches = |from: &str, to: &str| reach.get(from).is_some_and(|reached| reached.contains(to));
    let mut seen = BTreeSet::new();
    let mut circles = Vec::new();
    for &file in reach.keys() {
        if !reaches(file, file) || seen.contains(file) {
            continue;
        }
        let circle: BTreeSet<&str> = reach.keys().copied().filter(|f| reaches(file, f) && reaches(f, file)).collect();
        let inside = edges.iter().filter(|((from, to), _)| circle.contains(&from[..]) && circle.contains(&to[..]));
        let lines = inside.map(|((from, to), items)| {
            format!("  {from} -> {to} ({})\n", items.iter().cloned().collect::<Vec<_>>().join(", "))
        });
        circles.push(lines.collect());
        seen.extend(circle);
    }
    circles
}

/// Finds which file uses which, over all targets of a package.
fn edges(sources: &Sources) -> Edges {
    let is_root = |file: &&String| {
        let parts: Vec<&str> = file.split('/').collect();
        let (file, folder) = (parts.last().copied().unwrap_or_default(), &parts[..parts.len() - 1]);
        match folder {
            ["src"] => matches!(file, "lib.rs" | "main.rs"),
            ["src", "bin"] | ["examples" | "benches"] => true,
            ["src", "bin", _] | ["examples" | "benches", _] => file == "main.rs",
            _ => false,
        }
    };
    let mut edges = Edges::new();
    for root in sources.keys().filter(is_root) {
        let mut krate = Crate { sources, modules: Vec::new(), macros: BTreeMap::new() };
        krate.add_module(root, None, None);
        krate.add_edges(&mut edges);
    }
    edges
}

/// The modules of a target; the first is its root.
struct Crate<'a> {
    sources: &'a Sources,
    modules: Vec<Module>,
    /// The file of each `macro_rules!`.
    macros: BTreeMap<String, String>,
}

#[derive(Default)]
struct Module {
    file: String,
    /// The folder of the files of its children.
    folder: String,
    parent: usize,
    children: BTreeMap<String, usize>,
    items: BTreeSet<String>,
    imports: Vec<Import>,
    /// Its tokens without imports and child modules.
    code: Vec<String>,
}

#[derive(Clone)]
struct Import {
    path: Vec<String>,
    /// The name that it gives to the item; `*` for a glob.
    name: String,
    public: bool,
}

/// What a path leads to.
enum Found {
    Module(usize),
    Item { file: String, name: String },
    External,
}

impl Crate<'_> {
    /// Reads the module in `file`, or the one with this body in it, and its children.
    fn add_module(&mut self, file: &str, parent: Option<usize>, inline: Option<(&str, &[String])>) -> usize {
        let (above, leaf) = file.rsplit_once('/').unwrap_or((".", file));
        let mut folder = match leaf {
            "lib.rs" | "main.rs" | "mod.rs" => above.to_string(),
            _ if parent.is_none() => above.to_string(),
            _ => format!("{above}/{}", leaf.trim_end_matches(".rs")),
        };
        if let (Some((name, _)), Some(parent)) = (inline, parent) {
            folder = format!("{}/{name}", self.modules[parent].folder);
        }
        let index = self.modules.len();
        let parent = parent.unwrap_or(0);
        self.modules.push(Module { file: file.into(), folder, parent, ..Default::default() });
        match inline {
            Some((_, body)) => self.read_body(index, body),
            None => self.read_body(index, &without_left_out(&tokens(&self.sources[file]))),
        }
        index
    }

    fn read_body(&mut self, index: usize, body: &[String]) {
        let (mut i, mut depth) = (0, 0);
        while i < body.len() {
            let after = |k: usize| body.get(i + k).map_or("", String::as_str);
            match body[i].as_str() {
                "mod" if after(2) == ";" || after(2) == "{" => {
                    let name = body[i + 1].clone();
                    let child = if after(2) == ";" {
                        let base = format!("{}/{name}", self.modules[index].folder);
                        let files = [format!("{base}.rs"), format!("{base}/mod.rs")];
                        let file = files.iter().find(|file| self.sources.contains_key(*file));
                        let file = file.unwrap_or_else(|| panic!("module {base} has no file"));
                        i += 3;
                        self.add_module(file, Some(index), None)
                    } else {
                        let end = closing(body, i + 2);
                        let inner = &body[i + 3..end];
                        i = end + 1;
                        self.add_module(&self.modules[index].file.clone(), Some(index), Some((&name, inner)))
                    };
                    self.modules[index].children.insert(name, child);
                    continue;
                }
                "use" if after(1) != "<" => {
                    let public = i > 0 && (body[i - 1] == "pub" || body[i - 1] == ")");
                    let end = i + body[i..].iter().position(|token| token == ";").unwrap_or(body.len() - i - 1);
                    read_use(&body[i + 1..end], &[], public, &mut self.modules[index].imports);
                    self.modules[index].code.push(";".into());
                    i = end + 1;
                    continue;
                }
                "macro_rules" => {
                    self.macros.insert(body[i + 2].clone(), self.modules[index].file.clone());
                    self.modules[index].items.insert(body[i + 2].clone());
                }
                "fn" | "struct" | "enum" | "union" | "trait" | "type" | "const" | "static" if depth == 0 => {
                    let name = if after(1) == "mut" { after(2) } else { after(1) };
                    if is_word(name) && (i == 0 || !["<", ","].contains(&body[i - 1].as_str())) {
                        self.modules[index].items.insert(name.into());
                    }
                }
                "(" | "[" | "{" => depth += 1,
                ")" | "]" | "}" => depth -= 1,
                _ => {}
            }
            self.modules[index].code.push(body[i].clone());
            i += 1;
        }
    }

    fn add_edges(&self, edges: &mut Edges) {
        for (index, module) in self.modules.iter().enumerate() {
            let mut add = |file: &str, name: &str| {
                if file != module.file {
                    edges.entry((module.file.clone(), file.into())).or_default().insert(name.into());
                }
            };
            for import in module.imports.iter().filter(|import| !import.public || uses(&module.code, &import.name)) {
                match self.resolve(index, &import.path, &mut BTreeSet::new()) {
                    Found::Item { file, name } => add(&file, &name),
                    Found::Module(to) if import.name == "*" => add(&self.modules[to].file, "*"),
                    _ => {}
                }
            }
            for (i, word) in module.code.iter().enumerate().filter(|(_, word)| is_word(word)) {
                let before = i.checked_sub(1).map_or("", |i| &module.code[i]);
                let after = module.code.get(i + 1).map_or("", String::as_str);
                if after == "::" && before != "::" && before != "in" {
                    let rest = module.code[i..].chunks(2).take_while(|pair| is_word(&pair[0]));
                    let mut path = Vec::new();
                    for pair in rest {
                        path.push(pair[0].clone());
                        if pair.get(1).is_none_or(|token| token != "::") {
                            break;
                        }
                    }
                    if let Found::Item { file, name } = self.resolve(index, &path, &mut BTreeSet::new()) {
                        add(&file, &name);
                    }
                }
                if after == "!"
                    && before != "::"
                    && !module.items.contains(word)
                    && let Some(file) = self.macros.get(word)
                {
                    add(file, &format!("{word}!"));
                }
            }
        }
    }

    /// Follows a path that stands in the module `from`.
    fn resolve(&self, from: usize, path: &[String], seen: &mut BTreeSet<(usize, String, bool)>) -> Found {
        let mut current = from;
        for (i, name) in path.iter().enumerate() {
            let last = i + 1 == path.len();
            match name.as_str() {
                "crate" => current = 0,
                "self" => {}
                "super" => current = self.modules[current].parent,
                _ => match self.look_up(current, name, last, seen) {
                    Some(Found::Module(child)) => current = child,
                    Some(found) => return found,
                    None if i == 0 => return Found::External,
                    None => return Found::Item { file: self.modules[current].file.clone(), name: name.clone() },
                },
            }
        }
        Found::Module(current)
    }

    /// Finds a name in a module: its items, its imports, its children and what its globs bring.
    fn look_up(&self, at: usize, name: &str, last: bool, seen: &mut BTreeSet<(usize, String, bool)>) -> Option<Found> {
        if !seen.insert((at, name.into(), last)) {
            return None;
        }
        let module = &self.modules[at];
        let child = module.children.get(name).copied();
        if let (Some(child), false) = (child, last) {
            return Some(Found::Module(child));
        }
        if module.items.contains(name) {
            return Some(Found::Item { file: module.file.clone(), name: name.into() });
        }
        for import in module.imports.iter().filter(|import| import.name == name) {
            match self.resolve(at, &import.path, seen) {
                Found::External if child.is_some() => {}
                found => return Some(found),
            }
        }
        if let Some(child) = child {
            return Some(Found::Module(child));
        }
        for import in module.imports.iter().filter(|import| import.name == "*") {
            if let Found::Module(to) = self.resolve(at, &import.path, seen)
                && let Some(found) = self.look_up(to, name, last, seen)
            {
                return Some(found);
            }
        }
        let exported = self.macros.get(name).filter(|_| at == 0);
        exported.map(|file| Found::Item { file: file.clone(), name: format!("{name}!") })
    }
}

/// Whether a name that a module re-exports is also used in the code of that module.
///
/// A name in lower case has to be called or be the start of a path: it may be a variable's
/// otherwise.
fn uses(code: &[String], name: &str) -> bool {
    let upper = name.starts_with(|c: char| c.is_uppercase());
    code.iter().enumerate().any(|(i, word)| {
        let before = i.checked_sub(1).map_or("", |i| code[i].as_str());
        let after = code.get(i + 1).map_or("", String::as_str);
        let called = upper || ["(", "::", "!"].contains(&after);
        word == name && called && ![".", "::", "fn", "'"].contains(&before)
    })
}

/// Reads a tree of imports, such as `a::{b, c as d, e::*}`, that stands behind `prefix`.
fn read_use(tree: &[String], prefix: &[String], public: bool, imports: &mut Vec<Import>) {
    let mut path = prefix.to_vec();
    for (i, token) in tree.iter().enumerate() {
        match token.as_str() {
            "{" => {
                let inside = &tree[i + 1..closing(tree, i)];
                return split(inside).for_each(|part| read_use(part, &path, public, imports));
            }
            "*" => return imports.push(Import { path, name: "*".into(), public }),
            "as" => return imports.push(Import { path, name: tree[i + 1].clone(), public }),
            "self" if !path.is_empty() => {}
            word if is_word(word) => path.push(token.clone()),
            _ => {}
        }
    }
    if let Some(name) = path.last().cloned() {
        imports.push(Import { path, name, public });
    }
}

/// The circles among made-up files.
fn circles_of(files: &[(&str, &str)]) -> Vec<String> {
    circles(&files.iter().map(|(name, text)| (name.to_string(), text.to_string())).collect())
}

#[test]
fn circles_are_found() {
    let lib = ("src/lib.rs", "pub mod a; pub mod b; mod c; pub use c::C;");
    let two = [lib, ("src/a.rs", "use crate::b::{B, D as E}; pub struct A;"), ("src/b.rs", "fn f(_: super::a::A) {}")];
    let found = circles_of(&[&two[..], &[("src/c.rs", "use super::{a, b};")]].concat());
    assert_eq!(found, ["  src/a.rs -> src/b.rs (B, D)\n  src/b.rs -> src/a.rs (A)\n"]);

    // over three files: a re-export, a module's alias, and a glob
    let a = ("src/a.rs", "use crate::C; pub struct A;");
    let b = ("src/b.rs", "use super::a as x; pub struct B(Vec<x::A>);");
    let found = circles_of(&[lib, a, b, ("src/c.rs", "use super::b::*; pub struct C;")]);
    let edges = ["  src/a.rs -> src/c.rs (C)\n", "  src/b.rs -> src/a.rs (A)\n", "  src/c.rs -> src/b.rs (*)\n"];
    assert_eq!(found, [edges.concat()]);

    // a parent that uses an item of its child, re-exported or not
    for parent in [
        "fn f() { c::g() }",
        "use c::g;",
        "pub use c::g; fn f() { g() }",
        "mod m { use super::c::g; }",
        "#[error(\"{}\", crate::c::g())] enum E {}",
    ] {
        let parent = format!("mod c; pub struct P; {parent}");
        let found = circles_of(&[("src/lib.rs", &parent), ("src/c.rs", "use super::P; pub fn g() {}")]);
        assert_eq!(found.len(), 1, "{parent}");
    }
    // a macro, by its bare name
    let found = circles_of(&[
        ("src/lib.rs", "#[macro_use] mod m; fn f() { go!() }"),
        ("src/m.rs", "macro_rules! go { () => {} } use crate::f;"),
    ]);
    assert_eq!(found, ["  src/lib.rs -> src/m.rs (go!)\n  src/m.rs -> src/lib.rs (f)\n"]);
}

#[test]
fn what_is_no_use_makes_no_circle() {
    let uses_a = "use crate::a::A; pub struct B; pub struct D;";
    for a in [
        "pub use crate::b::B; pub struct A;",
        "pub(crate) use super::b::{self, B}; pub struct A;",
        "#[cfg(test)] use crate::b::B; pub struct A;",
        "#[cfg(all(test, feature = \"x\"))] #[allow(unused)] mod tests { use crate::b::B; } pub struct A;",
        "#[cfg(any(test, doc))] fn f<X, Y>(x: X) -> Vec<Y> { crate::b::f() } pub struct A;",
        "pub struct A { #[cfg(test)] b: Map<crate::b::B, crate::b::D>, c: u8 }",
        "pub struct A; fn f() { #[cfg(test)] let b = { crate::b::B }; }",
        "pub struct A; fn f() { match 1 { #[cfg(test)] 1 => { crate::b::B } _ => 2 } }",
        "#[cfg(test)] mod tests; pub struct A;",
        "/* crate::b::B /* */ crate::b::B */ /// [`crate::b::B`]\n pub struct A;",
        "pub struct A; const X: &str = \"crate::b::B\"; const Y: &str = r#\"\" crate::b::B\"#; const Z: char = '\"';",
        "pub struct A; macro_rules! m { () => { crate::b::B } }",
        "use std::b::B; use b::X; pub struct A; fn f<'b>(x: &'b B) { x::y(); 'b: loop { break 'b } }",
        "pub(in crate::b) struct A;",
    ] {
        let found = circles_of(&[("src/lib.rs", "mod a; mod b;"), ("src/a.rs", a), ("src/b.rs", uses_a)]);
        assert!(found.is_empty(), "{a}\n{found:?}");
        // the same with a use of it does
        let used = format!("{a} fn g() -> crate::b::D {{}}");
        let found = circles_of(&[("src/lib.rs", "mod a; mod b;"), ("src/a.rs", &used), ("src/b.rs", uses_a)]);
        assert_eq!(found.len(), 1, "{used}");
    }
}

#[test]
fn names_are_found_where_they_are_defined() {
    // a.rs stands above b.rs, which stands above the two files of c: through re-exports, globs and
    // inline modules
    let found = edges(
        &[
            ("src/lib.rs", "mod a; mod b; mod c; pub mod prelude { pub use crate::b::*; pub use crate::c::deep::X; }"),
            ("src/a.rs", "use crate::prelude::{B, X}; use crate::c::{Y, Generated, deep}; fn f() { deep::g::<B>() }"),
            ("src/b.rs", "pub struct B(crate::c::X);"),
            ("src/c/mod.rs", "pub mod deep; pub use deep::*; names! { pub enum Generated {} }"),
            ("src/c/deep.rs", "pub struct X; pub enum Y { Z } pub fn g<T>() {}"),
            ("src/bin/tool/main.rs", "mod part; use part::P;"),
            ("src/bin/tool/part.rs", "use flops::B; pub struct P;"),
        ]
        .map(|(name, text)| (name.to_string(), text.to_string()))
        .into(),
    );
    let found = found.iter().map(|((from, to), items)| format!("{from} {to} {items:?}"));
    assert_eq!(
        found.collect::<Vec<_>>(),
        [
            "src/a.rs src/b.rs {\"B\"}",
            "src/a.rs src/c/deep.rs {\"X\", \"Y\", \"g\"}",
            "src/a.rs src/c/mod.rs {\"Generated\"}",
            "src/b.rs src/c/deep.rs {\"X\"}",
            "src/bin/tool/main.rs src/bin/tool/part.rs {\"P\"}",
        ]
    );
}
