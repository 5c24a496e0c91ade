//! Where weights come from: a file, a folder, or the HuggingFace hub.

use std::fmt;
use std::path::{Component, Path, PathBuf};
use std::str::FromStr;

use hf_hub::{Cache, Repo, RepoType};
use serde::Deserialize;

use super::tensors::{WEIGHTS, json, shards};
use crate::error::{CheckpointError, VitError};

/// A source of weights as text: a path, or `hf:ORG/NAME`, with `@REVISION` where it is not `main`.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub enum Source {
    /// A file or a folder.
    Path(PathBuf),
    /// A model on the HuggingFace hub.
    Hub {
        /// `ORG/NAME`.
        repo: String,
        /// A branch, a tag or a commit.
        revision: String,
    },
}

impl FromStr for Source {
    type Err = VitError;

    fn from_str(text: &str) -> Result<Self, VitError> {
        let fail = || VitError::UnknownSource { name: text.into() };
        let Some(name) = text.strip_prefix("hf:") else {
            return if text.is_empty() { Err(fail()) } else { Ok(Self::Path(text.into())) };
        };
        let (repo, revision) = name.split_once('@').unwrap_or((name, "main"));
        let parts: Vec<&str> = repo.split('/').collect();
        let fine = |part: &str| {
            !part.is_empty()
                && !part.starts_with('.')
                && part.chars().all(|c| c.is_ascii_alphanumeric() || "-_.".contains(c))
        };
        let known = (1..=2).contains(&parts.len()) && parts.into_iter().all(fine);
        if !known || revision.is_empty() || revision.contains("..") {
            return Err(fail());
        }
        Ok(Self::Hub { repo: repo.into(), revision: revision.into() })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Path(path) => write!(f, "{}", path.display()),
            Self::Hub { repo, revision } if revision == "main" => write!(f, "hf:{repo}"),
            Self::Hub { repo, revision } => write!(f, "hf:{repo}@{revision}"),
        }
    }
}

impl Source {
    /// Returns the file or folder on this machine.
    ///
    /// A model of the hub is taken from the cache of HuggingFace's tools (`HF_HOME`). With the
    /// cargo feature `download` a missing model is fetched into it.
    ///
    /// # Errors
    /// [`VitError::Checkpoint`] where a model of the hub is neither in the cache nor fetched.
    pub fn resolve(&self) -> Result<PathBuf, VitError> {
        match self {
            Self::Path(path) => Ok(path.clone()),
            Self::Hub { repo, revision } => {
                let repo = Repo::with_revision(repo.clone(), RepoType::Model, revision.clone());
                snapshot(repo, &Cache::from_env()).map_err(|why| VitError::Checkpoint { path: self.to_string(), why })
            }
        }
    }
}

/// Files that a model may have beside its configuration and its weights.
const OPTIONAL: [&str; 5] = [
    "preprocessor_config.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "sentence_bert_config.json",
    "config_sentence_transformers.json",
];

/// An entry of `modules.json`.
#[derive(Deserialize)]
struct Module {
    path: String,
}

/// Fetches the files of the modules that sentence-transformers lists. What is missing is told by who
/// reads them.
fn fetch_modules(list: &Path, file: impl Fn(&str) -> Result<PathBuf, String>) {
    let inside = |module: &Module| {
        let mut parts = Path::new(&module.path).components();
        !module.path.is_empty() && parts.all(|part| matches!(part, Component::Normal(_)))
    };
    for Module { path } in json::<Vec<Module>>(list).unwrap_or_default().into_iter().filter(inside) {
        let _ = file(&format!("{path}/config.json"));
        let _ = file(&format!("{path}/model.safetensors")).or_else(|_| file(&format!("{path}/pytorch_model.bin")));
    }
}

/// Returns the folder of a model's files.
fn snapshot(repo: Repo, cache: &Cache) -> Result<PathBuf, CheckpointError> {
    let file = files(repo.clone(), cache)?;
    let absent = |why: String| {
        let looked_for = ["config.json"].into_iter().chain(WEIGHTS).map(String::from).collect();
        CheckpointError::Hub { cache: cache.path().join(repo.folder_name()), looked_for, why }
    };
    let config = file("config.json").map_err(&absent)?;
    // without them images are prepared by HuggingFace's defaults, texts are given as token ids, and
    // sentence encoders are those that transformers alone makes
    for optional in OPTIONAL {
        let _ = file(optional);
    }
    if let Ok(list) = file("modules.json") {
        fetch_modules(&list, &file);
    }
    let mut reason = String::new();
    for name in WEIGHTS {
        match file(name) {
            Ok(path) if name.ends_with(".index.json") => {
                for shard in shards(&path)? {
                    let named = |why| CheckpointError::Hub {
                        cache: cache.path().clone(),
                        looked_for: vec![shard.clone()],
                        why,
                    };
                    file(&shard).map_err(named)?;
                }
                return Ok(folder(&config));
            }
            Ok(_) => return Ok(folder(&config)),
            Err(why) => reason = why,
        }
    }
    Err(absent(reason))
}

fn folder(file: &Path) -> PathBuf {
    file.parent().unwrap_or(Path::new(".")).to_path_buf()
}

/// Returns a function that finds a file of the model, and fetches it if the cache lacks it.
#[cfg(feature = "download")]
fn files(repo: Repo, cache: &Cache) -> Result<impl Fn(&str) -> Result<PathBuf, String> + use<>, CheckpointError> {
    use hf_hub::api::sync::ApiBuilder;
    let cached = cache.repo(repo.clone());
    let mut api = ApiBuilder::from_cache(cache.clone()).with_progress(true);
    // a mirror, set as for HuggingFace's own tools
    if let Ok(endpoint) = std::env::var("HF_ENDPOINT") {
        api = api.with_endpoint(endpoint);
    }
    let api = api.build();
    let api = api.map(|api| api.repo(repo)).map_err(|e| e.to_string());
    Ok(move |name: &str| match cached.get(name) {
        Some(path) => Ok(path),
        None => api.as_ref().map_err(Clone::clone)?.get(name).map_err(|e| e.to_string()),
    })
}

/// Returns a function that finds a file of the model in the cache.
#[cfg(not(feature = "download"))]
fn files(repo: Repo, cache: &Cache) -> Result<impl Fn(&str) -> Result<PathBuf, String> + use<>, CheckpointError> {
    let cached = cache.repo(repo);
    let remedy = "this build does not fetch: build with `--features download`, or name a folder";
    Ok(move |name: &str| cached.get(name).ok_or_else(|| remedy.into()))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sources_round_trip_through_text_and_errors_name_them() {
        for text in ["hf:google/vit-base-patch16-224", "hf:gpt2", "hf:timm/vit_tiny@v1.0", "some/folder", "model.pth"] {
            assert_eq!(text.parse::<Source>().unwrap().to_string(), text);
        }
        for text in ["", "hf:", "hf:a/b/c", "hf:../x", "hf:a/", "hf:a b/c", "hf:a/b@", "hf:a/b@../c"] {
            let error = text.parse::<Source>().unwrap_err().to_string();
            assert!(error.contains(&format!("'{text}'")) && error.contains("hf:ORG/NAME"), "{error}");
        }
    }

    #[test]
    fn the_files_of_listed_modules_are_asked_for() {
        let dir = tempfile::tempdir().unwrap();
        let list = dir.path().join("modules.json");
        std::fs::write(&list, r#"[{"path": ""}, {"path": "1_Pooling"}, {"path": "../x"}, {"path": "2_Dense"}]"#)
            .unwrap();
        let asked = std::cell::RefCell::new(vec![]);
        fetch_modules(&list, |name| {
            asked.borrow_mut().push(name.to_string());
            if name.starts_with("2") { Ok(name.into()) } else { Err("there is none".into()) }
        });
        let pooling = ["config.json", "model.safetensors", "pytorch_model.bin"].map(|name| format!("1_Pooling/{name}"));
        let dense = ["config.json", "model.safetensors"].map(|name| format!("2_Dense/{name}"));
        assert_eq!(asked.into_inner(), [pooling.as_slice(), &dense].concat());
    }

    /// The cache is laid out as HuggingFace's tools do it.
    #[test]
    #[cfg(not(feature = "download"))]
    fn cached_models_are_found_and_errors_name_the_missing_file() {
        let dir = tempfile::tempdir().unwrap();
        let cache = Cache::new(dir.path().into());
        let repo = || Repo::with_revision("org/name".into(), RepoType::Model, "main".into());
        let message = || snapshot(repo(), &cache).unwrap_err().to_string();
        for expected in ["config.json", "pytorch_model.bin", "models--org--name", "--features download"] {
            assert!(message().contains(expected), "{expected}: {}", message());
        }
        let root = dir.path().join("models--org--name");
        let snapshot_dir = root.join("snapshots/abc");
        std::fs::create_dir_all(&snapshot_dir).unwrap();
        std::fs::create_dir_all(root.join("refs")).unwrap();
        std::fs::write(root.join("refs/main"), "abc").unwrap();
        std::fs::write(snapshot_dir.join("config.json"), "{}").unwrap();
        assert!(message().contains("model.safetensors"));
        let index = r#"{"weight_map": {"a": "one.safetensors", "b": "two.safetensors"}}"#;
        std::fs::write(snapshot_dir.join("model.safetensors.index.json"), index).unwrap();
        std::fs::write(snapshot_dir.join("one.safetensors"), "").unwrap();
        assert!(message().contains("two.safetensors"), "{}", message());
        std::fs::write(snapshot_dir.join("two.safetensors"), "").unwrap();
        assert_eq!(snapshot(repo(), &cache).unwrap(), snapshot_dir);
    }
}
