//! A folder of images with one sub-folder per class.

use super::dataset::{DataSplit, ImageItem, Skipped, stratify};
use super::error::DataError;
use super::options::LoadOptions;
use image::{ImageError, ImageReader};
use std::path::{Path, PathBuf};

/// Share of each class that becomes test images where the folder has no test part.
const TEST_PERCENT: usize = 20;
const SPLIT_SEED: u64 = 0;
const EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];
const LAYOUT: &str = "one sub-folder of images per class, or such folders in train/ and test/";

/// Loads `root/train/CLASS/*.png|jpg` and `root/test/CLASS` (or `root/val/CLASS`).
///
/// Without these folders it loads `root/CLASS/*`, and a fixed 20 % of each class become test
/// images. Classes are in alphabetical order. Several threads decode the images, which are resized
/// as [`LoadOptions::resizing`] says.
///
/// [`DataSplit::skipped`] names images that cannot be decoded. They change neither the ids of the
/// others nor the split.
///
/// # Errors
/// Folders that are missing or empty, and classes without any image that can be decoded. With
/// [`LoadOptions::strict`] also the first image that cannot be decoded.
pub fn load(root: &Path, options: &LoadOptions) -> Result<DataSplit, DataError> {
    load_classes(root, options, class_folders)
}

/// Loads as [`load`] does, but class folders may also lie in folders of their superclasses.
///
/// Classes are in alphabetical order of their own names.
pub(super) fn load_grouped(root: &Path, options: &LoadOptions) -> Result<DataSplit, DataError> {
    load_classes(root, options, grouped_class_folders)
}

/// Finds the class folders in a folder.
type FindClasses = fn(&Path) -> Result<Vec<PathBuf>, DataError>;

/// An image to be decoded; its id is its index among all files.
struct File {
    path: PathBuf,
    label: usize,
    is_test: bool,
}

fn load_classes(root: &Path, options: &LoadOptions, find: FindClasses) -> Result<DataSplit, DataError> {
    if options.img_size == 0 {
        return Err(DataError::ZeroImageSize);
    }
    let train_dir = root.join("train");
    let test_dir = ["test", "val"].map(|name| root.join(name)).into_iter().find(|dir| dir.is_dir());
    let train_dir = if test_dir.is_some() || train_dir.is_dir() { train_dir } else { root.to_path_buf() };
    let folders = find(&train_dir)?;
    if folders.len() < 2 {
        return Err(DataError::TooFewClasses { path: train_dir, found: folders.len() });
    }
    let mut files = vec![];
    for (label, folder) in folders.iter().enumerate() {
        list_class(folder, label, false, &mut files)?;
    }
    let classes: Vec<String> = folders.iter().map(|folder| name(folder)).collect();
    if let Some(test_dir) = test_dir {
        let train_files = files.len();
        for folder in find(&test_dir)? {
            let label = classes.iter().position(|class| *class == name(&folder));
            let label =
                label.ok_or_else(|| DataError::UnknownClass { path: folder.clone(), classes: classes.clone() })?;
            list_class(&folder, label, true, &mut files)?;
        }
        if files.len() == train_files {
            return Err(DataError::NoImages { path: test_dir });
        }
    } else {
        let labels: Vec<usize> = files.iter().map(|file| file.label).collect();
        for (file, is_test) in files.iter_mut().zip(stratify(&labels, classes.len(), TEST_PERCENT, SPLIT_SEED)) {
            file.is_test = is_test;
        }
    }
    let images = decode_all(&files, options)?;
    collect(files.into_iter().zip(images).collect(), classes, options.img_size)
}

/// Appends the images in `dir`.
fn list_class(dir: &Path, label: usize, is_test: bool, files: &mut Vec<File>) -> Result<(), DataError> {
    let images: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| path.is_file() && is_image(path)).collect();
    if images.is_empty() {
        return Err(DataError::NoImages { path: dir.to_path_buf() });
    }
    files.extend(images.into_iter().map(|path| File { path, label, is_test }));
    Ok(())
}

/// The planes of an image, or the decoder's error.
type Decoded = Result<Vec<u8>, ImageError>;

/// Decodes the files on several threads; with `strict` the first that fails is an error.
fn decode_all(files: &[File], options: &LoadOptions) -> Result<Vec<Decoded>, DataError> {
    let decode_part = |part: &[File]| -> Result<Vec<Decoded>, DataError> {
        let decode = |file: &File| match decode(&file.path, options) {
            Err(source) if options.strict => Err(DataError::Decode { path: file.path.clone(), source }),
            decoded => Ok(decoded),
        };
        part.iter().map(decode).collect()
    };
    let share = files.len().div_ceil(options.threads.max(1)).max(1);
    std::thread::scope(|scope| {
        let workers: Vec<_> = files.chunks(share).map(|part| scope.spawn(move || decode_part(part))).collect();
        let mut images = Vec::with_capacity(files.len());
        for worker in workers {
            match worker.join() {
                Ok(part) => images.extend(part?),
                Err(panic) => std::panic::resume_unwind(panic),
            }
        }
        Ok(images)
    })
}

/// Collects decoded images; every class folder must have at least one.
fn collect(files: Vec<(File, Decoded)>, classes: Vec<String>, side: usize) -> Result<DataSplit, DataError> {
    for class in files.chunk_by(|(a, _), (b, _)| a.path.parent() == b.path.parent()) {
        // a folder split into both parts may lose all its test images
        let tests = class.iter().all(|(file, _)| file.is_test);
        let needed: Vec<_> = class.iter().filter(|(file, _)| file.is_test == tests).collect();
        if let Some((File { path, .. }, Err(first))) = needed.first()
            && needed.iter().all(|(_, image)| image.is_err())
        {
            let path = path.parent().unwrap_or(path).to_path_buf();
            return Err(DataError::BrokenClass { path, files: needed.len(), reason: first.to_string() });
        }
    }
    let (mut items, mut skipped) = (vec![], vec![]);
    for (id, (File { path, label, is_test }, image)) in files.into_iter().enumerate() {
        match image {
            Ok(pixels) => items.push((ImageItem { id: id as u64, pixels, height: side, width: side, label }, is_test)),
            Err(error) => skipped.push(Skipped { path, reason: error.to_string() }),
        }
    }
    Ok(DataSplit { skipped, ..DataSplit::new(items, classes) })
}

/// Decodes an image and resizes it to `img_size`.
fn decode(path: &Path, options: &LoadOptions) -> Decoded {
    let image = ImageReader::open(path)?.with_guessed_format()?.decode()?;
    let image = options.resizing.apply(&image, options.img_size).to_rgb8();
    Ok((0..3).flat_map(|channel| image.pixels().map(move |pixel| pixel[channel])).collect())
}

/// The sub-folders in alphabetical order, without hidden ones.
fn class_folders(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    if !dir.is_dir() {
        return Err(DataError::MissingFolder { path: dir.to_path_buf(), layout: LAYOUT });
    }
    Ok(entries(dir)?.into_iter().filter(|path| path.is_dir() && !name(path).starts_with('.')).collect())
}

/// The class folders in `dir` and in those of its sub-folders that hold folders.
fn grouped_class_folders(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let mut folders = vec![];
    for folder in class_folders(dir)? {
        let inner = class_folders(&folder)?;
        if inner.is_empty() { folders.push(folder) } else { folders.extend(inner) }
    }
    folders.sort_by_key(|folder| name(folder));
    Ok(folders)
}

fn entries(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    let error = |source| DataError::io(dir, source);
    let paths: Result<Vec<_>, _> = std::fs::read_dir(dir).map_err(error)?.map(|entry| Ok(entry?.path())).collect();
    let mut paths = paths.map_err(error)?;
    paths.sort();
    Ok(paths)
}

fn name(path: &Path) -> String {
    path.file_name().unwrap_or_default().to_string_lossy().into_owned()
}

fn is_image(path: &Path) -> bool {
    let extension = path.extension().unwrap_or_default().to_string_lossy().to_lowercase();
    EXTENSIONS.contains(&extension.as_str()) && !name(path).starts_with('.')
}

#[cfg(test)]
mod tests {
    use super::super::dataset::ImageDataset;
    use super::*;
    use image::{Rgb, RgbImage};
    use std::fs;

    fn options() -> LoadOptions {
        LoadOptions::new(2).with_threads(2)
    }

    fn save(path: &Path, rgb: [u8; 3]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(6, 4, Rgb(rgb)).save(path).unwrap();
    }

    #[test]
    fn train_and_val_folders_load_with_classes_and_ids() {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("train/cat/1.png"), [255, 0, 0]);
        save(&dir.path().join("train/dog/1.png"), [0, 255, 0]);
        save(&dir.path().join("val/dog/1.JPG"), [0, 0, 255]);
        fs::write(dir.path().join("train/dog/notes.txt"), "not an image").unwrap();
        let split = load(dir.path(), &options()).unwrap();
        assert_eq!(split.train.classes, ["cat", "dog"]);
        assert_eq!(split.train.items[0].pixels, [255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(split.train.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(0, 0), (1, 1)]);
        assert_eq!(split.test.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(2, 1)]);
    }

    #[test]
    fn each_class_is_split_without_a_test_folder() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..5 {
            save(&dir.path().join(format!("cat/{i}.png")), [i, 0, 0]);
            save(&dir.path().join(format!("dog/{i}.png")), [0, i, 0]);
        }
        let split = load(dir.path(), &options()).unwrap();
        assert_eq!((split.train.items.len(), split.test.items.len()), (8, 2));
        assert_eq!(split.test.items, load(dir.path(), &options()).unwrap().test.items);
        assert_eq!((split.skipped, split.missing), (vec![], vec![]));
    }

    #[test]
    fn wide_images_are_cropped_to_the_centre() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wide.png");
        RgbImage::from_fn(6, 2, |x, _| if (2..4).contains(&x) { Rgb([9, 8, 7]) } else { Rgb([200; 3]) })
            .save(&path)
            .unwrap();
        assert_eq!(decode(&path, &LoadOptions::new(2)).unwrap(), [9, 9, 9, 9, 8, 8, 8, 8, 7, 7, 7, 7]);
    }

    #[test]
    fn errors_name_the_folder() {
        let dir = tempfile::tempdir().unwrap();
        let message = |root: &Path| load(root, &options()).unwrap_err().to_string();
        assert!(message(&dir.path().join("nowhere")).contains("there is no folder"));
        assert!(message(dir.path()).contains("holds 0 class folders"));
        save(&dir.path().join("a/1.png"), [0; 3]);
        fs::create_dir(dir.path().join("b")).unwrap();
        assert!(matches!(load(dir.path(), &options()), Err(DataError::NoImages { path }) if path.ends_with("b")));
        fs::write(dir.path().join("b/broken.png"), "no image").unwrap();
        assert!(message(dir.path()).contains("none of the 1 images of the class in"));
        fs::create_dir(dir.path().join("test")).unwrap();
        assert!(
            matches!(load(dir.path(), &options()), Err(DataError::MissingFolder { path, .. }) if path.ends_with("train"))
        );
        assert!(matches!(load(dir.path(), &LoadOptions::new(0)), Err(DataError::ZeroImageSize)));
    }

    #[test]
    fn test_class_without_training_images_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/cat", "train/dog", "test/cow"] {
            save(&dir.path().join(class).join("1.png"), [0; 3]);
        }
        assert!(
            matches!(load(dir.path(), &options()), Err(DataError::UnknownClass { path, .. }) if path.ends_with("cow"))
        );
    }

    fn ids(data: &ImageDataset) -> Vec<u64> {
        data.items.iter().map(|item| item.id).collect()
    }

    /// A folder with 5 images each of cat and dog, with ids 0 to 4 and 5 to 9.
    fn cats_and_dogs() -> tempfile::TempDir {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..5 {
            save(&dir.path().join(format!("cat/{i}.png")), [i, 0, 0]);
            save(&dir.path().join(format!("dog/{i}.png")), [0, i, 0]);
        }
        dir
    }

    #[test]
    fn broken_images_are_skipped_and_named() {
        let dir = cats_and_dogs();
        let whole = load(dir.path(), &options()).unwrap();
        let (broken, empty) = (dir.path().join("cat/1.png"), dir.path().join("dog/4.png"));
        fs::write(&broken, "no image").unwrap();
        fs::write(&empty, "").unwrap();
        let split = load(dir.path(), &options()).unwrap();
        assert_eq!(split.skipped.iter().map(|file| &file.path).collect::<Vec<_>>(), [&broken, &empty]);
        assert!(split.skipped.iter().all(|file| !file.reason.is_empty()));
        // the others keep their ids and their part of the split
        let without = |data: &ImageDataset| -> Vec<_> {
            data.items.iter().filter(|item| ![1, 9].contains(&item.id)).cloned().collect()
        };
        assert_eq!((split.train.items, split.test.items), (without(&whole.train), without(&whole.test)));
        assert_eq!(split.train.classes, whole.train.classes);
        let error = load(dir.path(), &options().with_strict(true)).unwrap_err();
        assert!(matches!(&error, DataError::Decode { path, .. } if *path == broken), "{error}");
        assert!(error.to_string().contains("cat/1.png"), "{error}");
    }

    #[test]
    fn truncated_images_are_skipped() {
        let dir = cats_and_dogs();
        let path = dir.path().join("cat/0.png");
        let bytes = fs::read(&path).unwrap();
        fs::write(&path, &bytes[..bytes.len() - 20]).unwrap();
        assert_eq!(load(dir.path(), &options()).unwrap().skipped[0].path, path);
    }

    #[test]
    fn result_does_not_depend_on_threads() {
        let dir = cats_and_dogs();
        fs::write(dir.path().join("cat/3.png"), "no image").unwrap();
        fs::write(dir.path().join("dog/0.png"), "no image").unwrap();
        let one = load(dir.path(), &options().with_threads(1)).unwrap();
        let mut all = [ids(&one.train), ids(&one.test)].concat();
        all.sort_unstable();
        assert_eq!(all, [0, 1, 2, 4, 6, 7, 8, 9]);
        for threads in [0, 3, 4, 99] {
            let other = load(dir.path(), &options().with_threads(threads)).unwrap();
            assert_eq!(one.train.items, other.train.items, "{threads} threads");
            assert_eq!(one.test.items, other.test.items, "{threads} threads");
            assert_eq!(one.skipped, other.skipped, "{threads} threads");
            let strict = load(dir.path(), &options().with_threads(threads).with_strict(true));
            assert!(matches!(strict, Err(DataError::Decode { path, .. }) if path.ends_with("cat/3.png")));
        }
    }

    #[test]
    fn class_with_only_broken_images_is_an_error() {
        let dir = cats_and_dogs();
        let broken = |class: &str, file: usize| {
            fs::write(dir.path().join(class).join(format!("{file}.png")), "no image").unwrap();
        };
        let split = load(dir.path(), &options()).unwrap();
        let (tests, trains): (Vec<_>, Vec<_>) = (0..5).partition(|id| ids(&split.test).contains(id));
        // the test images of a class may all be broken, its training images may not
        tests.iter().for_each(|&id| broken("cat", id as usize));
        let split = load(dir.path(), &options()).unwrap();
        assert_eq!((split.train.items.len(), split.test.items.len()), (8, 1));
        trains.iter().for_each(|&id| broken("cat", id as usize));
        let error = load(dir.path(), &options()).unwrap_err();
        assert!(matches!(&error, DataError::BrokenClass { path, files: 4, .. } if path.ends_with("cat")), "{error}");
    }

    #[test]
    fn test_class_with_only_broken_images_is_an_error() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/cat", "train/dog", "test/cat"] {
            save(&dir.path().join(class).join("1.png"), [0; 3]);
        }
        fs::create_dir(dir.path().join("test/dog")).unwrap();
        fs::write(dir.path().join("test/dog/1.png"), "no image").unwrap();
        let error = load(dir.path(), &options()).unwrap_err();
        assert!(
            matches!(&error, DataError::BrokenClass { path, files: 1, .. } if path.ends_with("test/dog")),
            "{error}"
        );
    }

    #[test]
    fn classes_may_lie_in_superclass_folders() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/pets/dog", "train/pets/ape", "train/herd/cow", "train/bee", "test/herd/cow"] {
            save(&dir.path().join(class).join("1.png"), [0; 3]);
        }
        let split = load_grouped(dir.path(), &options()).unwrap();
        assert_eq!(split.train.classes, ["ape", "bee", "cow", "dog"]);
        assert_eq!(split.train.items.iter().map(|item| item.label).collect::<Vec<_>>(), [0, 1, 2, 3]);
        assert_eq!(split.test.items.iter().map(|item| (item.id, item.label)).collect::<Vec<_>>(), [(4, 2)]);
        // superclasses are not classes in an ordinary folder
        assert!(matches!(load(dir.path(), &options()), Err(DataError::NoImages { .. })));
    }
}
