//! What lies in folders: the images below a class, and what is no image.

use super::dataset::Skipped;
use super::error::DataError;
use std::collections::HashSet;
use std::path::{Path, PathBuf};

/// How the names of images end: torchvision's `IMG_EXTENSIONS`, other spellings of these formats,
/// and GIF.
const READ: [&str; 14] =
    ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp", "jpe", "jfif", "pbm", "pnm", "gif"];
/// Images that no decoder is there for. They count as images that cannot be decoded.
const NOT_READ: [&str; 9] = ["avif", "heic", "heif", "ico", "jp2", "jxl", "psd", "svg", "tga"];
/// What systems leave in folders, in lower case.
const BY_SYSTEMS: [&str; 5] = ["thumbs.db", "ehthumbs.db", "desktop.ini", "__macosx", "@eadir"];

/// Returns the images in `dir` and in all folders below it, in the order of their paths.
///
/// Links are followed, as torchvision does, but a folder is read once: links may go round in
/// circles. What is no image by its name is added to `left_out`.
pub(super) fn images_below(dir: &Path, left_out: &mut Vec<Skipped>) -> Result<Vec<PathBuf>, DataError> {
    let (mut images, mut others) = (vec![], vec![]);
    let (mut waiting, mut seen) = (vec![dir.to_path_buf()], HashSet::new());
    while let Some(folder) = waiting.pop() {
        let place = std::fs::canonicalize(&folder).map_err(|source| DataError::io(&folder, source))?;
        if !seen.insert(place) {
            others.push(Skipped::new(folder, "a link to a folder of the same class that was read"));
            continue;
        }
        for path in entries(&folder)? {
            match () {
                () if path.is_dir() => waiting.push(path),
                () if is_image(&path) => images.push(path),
                () if !path.exists() => others.push(Skipped::new(path, "a link to nothing")),
                () => others.push(Skipped::new(path, "no image by its name")),
            }
        }
    }
    images.sort();
    others.sort_by(|a, b| a.path.cmp(&b.path));
    left_out.extend(others);
    Ok(images)
}

/// Adds the files that lie in `dir` itself, beside the class folders.
pub(super) fn stray_files(dir: &Path, left_out: &mut Vec<Skipped>) -> Result<(), DataError> {
    let files = entries(dir)?.into_iter().filter(|path| !path.is_dir());
    left_out.extend(files.map(|path| Skipped::new(path, "in no class folder")));
    Ok(())
}

/// The folders in `dir`, in alphabetical order.
pub(super) fn folders(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    Ok(entries(dir)?.into_iter().filter(|path| path.is_dir()).collect())
}

/// What lies in a folder, in alphabetical order, without hidden files and those of systems.
fn entries(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let error = |source| DataError::io(dir, source);
    let paths: Result<Vec<_>, _> = std::fs::read_dir(dir).map_err(error)?.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(error)?;
    paths.retain(|path| !is_hidden(&name(path)));
    paths.sort();
    Ok(paths)
}

fn is_hidden(name: &str) -> bool {
    name.starts_with('.') || BY_SYSTEMS.contains(&name.to_lowercase().as_str())
}

/// The last part of a path.
pub(super) fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    READ.contains(&extension.as_str()) || NOT_READ.contains(&extension.as_str())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::fs;

    fn touch(dir: &Path, name: &str) {
        let path = dir.join(name);
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        fs::write(path, "").unwrap();
    }

    /// The images and what is left out, as paths below `dir` and reasons.
    fn found(dir: &Path) -> (Vec<String>, Vec<(String, String)>) {
        let relative = |path: &Path| path.strip_prefix(dir).unwrap().display().to_string();
        let mut left_out = vec![];
        let images = images_below(dir, &mut left_out).unwrap();
        let left_out = left_out.iter().map(|file| (relative(&file.path), file.reason.clone())).collect();
        (images.iter().map(|path| relative(path)).collect(), left_out)
    }

    // torchvision.datasets.folder: os.walk below each class; has_file_allowed_extension compares in
    // lower case with .jpg .jpeg .png .ppm .bmp .pgm .tif .tiff .webp
    #[test]
    fn images_are_found_below_a_class_by_their_names() {
        let dir = tempfile::tempdir().unwrap();
        let torchvision = ["jpg", "jpeg", "png", "ppm", "bmp", "pgm", "tif", "tiff", "webp"];
        torchvision.iter().for_each(|end| touch(dir.path(), &format!("{end}/x.{}", end.to_uppercase())));
        touch(dir.path(), "a/b/c/deep.png");
        touch(dir.path(), "photo.heic");
        let (images, left_out) = found(dir.path());
        assert_eq!((images.len(), left_out.len()), (torchvision.len() + 2, 0), "{images:?} {left_out:?}");
        assert!(images.is_sorted() && images.contains(&"a/b/c/deep.png".to_string()), "{images:?}");
    }

    #[test]
    fn what_is_no_image_is_named_and_hidden_files_are_not() {
        let dir = tempfile::tempdir().unwrap();
        for name in
            ["1.png", "b/notes.txt", "label", ".DS_Store", "Thumbs.db", "b/.2.png", ".git/3.png", "@eaDir/4.png"]
        {
            touch(dir.path(), name);
        }
        let (images, left_out) = found(dir.path());
        assert_eq!(images, ["1.png"]);
        let reason = "no image by its name".to_string();
        assert_eq!(left_out, [("b/notes.txt".to_string(), reason.clone()), ("label".to_string(), reason)]);
    }

    #[cfg(unix)]
    #[test]
    fn links_are_followed_once_and_broken_ones_named() {
        use std::os::unix::fs::symlink;
        let (dir, other) = (tempfile::tempdir().unwrap(), tempfile::tempdir().unwrap());
        touch(other.path(), "far.png");
        touch(dir.path(), "a/1.png");
        symlink(other.path(), dir.path().join("more")).unwrap();
        symlink("..", dir.path().join("a/up")).unwrap();
        symlink("nowhere", dir.path().join("lost")).unwrap();
        symlink("nowhere", dir.path().join("lost.png")).unwrap();
        let (images, left_out) = found(dir.path());
        // a broken link with the name of an image is one that cannot be decoded
        assert_eq!(images, ["a/1.png", "lost.png", "more/far.png"]);
        let expected = [("a/up", "a link to a folder of the same class that was read"), ("lost", "a link to nothing")];
        assert_eq!(left_out, expected.map(|(path, reason)| (path.to_string(), reason.to_string())));
    }

    #[test]
    fn files_beside_class_folders_are_named() {
        let dir = tempfile::tempdir().unwrap();
        for name in ["cat/1.png", "labels.csv", "stray.png", ".hidden"] {
            touch(dir.path(), name);
        }
        let mut left_out = vec![];
        stray_files(dir.path(), &mut left_out).unwrap();
        let names: Vec<String> = left_out.iter().map(|file| name(&file.path)).collect();
        assert_eq!(names, ["labels.csv", "stray.png"]);
        assert_eq!(folders(dir.path()).unwrap(), [dir.path().join("cat")]);
    }
}
