//! Any folder of images with one sub-folder per class.

use super::{DataError, DataSplit, ImageDataset, ImageItem};
use image::ImageReader;
use image::imageops::FilterType;
use std::path::{Path, PathBuf};

/// What is held out where the folder has no test images of its own.
const TEST_PERCENT: usize = 20;
const SPLIT_SEED: u64 = 0;
const EXTENSIONS: [&str; 3] = ["png", "jpg", "jpeg"];
const LAYOUT: &str = "one sub-folder of images per class, or such folders in train/ and test/";

/// Loads `root/train/CLASS/*.png|jpg` and `root/test/CLASS` (or `root/val/CLASS`); without these folders `root/CLASS/*`, of which
/// a fixed 20 % of each class become the test images.
///
/// Images are decoded, cropped to the central square and resized to `img_size`. Classes are in alphabetical order.
pub fn load(root: &Path, img_size: usize) -> Result<DataSplit, DataError> {
    if img_size == 0 {
        return Err(DataError::ZeroImageSize);
    }
    let train_dir = root.join("train");
    let test_dir = ["test", "val"].map(|name| root.join(name)).into_iter().find(|dir| dir.is_dir());
    let Some(test_dir) = test_dir else {
        let dir = if train_dir.is_dir() { &train_dir } else { root };
        let (items, classes) = load_train(dir, img_size)?;
        return Ok(DataSplit::stratified(items, classes, TEST_PERCENT, SPLIT_SEED));
    };
    let (items, classes) = load_train(&train_dir, img_size)?;
    let mut test = vec![];
    for dir in class_folders(&test_dir)? {
        let label = classes.iter().position(|class| *class == name(&dir));
        let label = label.ok_or_else(|| DataError::UnknownClass { path: dir.clone(), classes: classes.clone() })?;
        load_class(&dir, label, img_size, items.len() as u64, &mut test)?;
    }
    if test.is_empty() {
        return Err(DataError::NoImages { path: test_dir });
    }
    Ok(DataSplit {
        train: ImageDataset { items, classes: classes.clone() },
        test: ImageDataset { items: test, classes },
        missing: vec![],
    })
}

fn load_train(dir: &Path, img_size: usize) -> Result<(Vec<ImageItem>, Vec<String>), DataError> {
    let folders = class_folders(dir)?;
    if folders.len() < 2 {
        return Err(DataError::TooFewClasses { path: dir.to_path_buf(), found: folders.len() });
    }
    let mut items = vec![];
    for (label, folder) in folders.iter().enumerate() {
        load_class(folder, label, img_size, 0, &mut items)?;
    }
    Ok((items, folders.iter().map(|folder| name(folder)).collect()))
}

/// Appends the images in `dir`; ids count on from `first_id`.
fn load_class(
    dir: &Path,
    label: usize,
    img_size: usize,
    first_id: u64,
    items: &mut Vec<ImageItem>,
) -> Result<(), DataError> {
    let files: Vec<PathBuf> = entries(dir)?.into_iter().filter(|path| path.is_file() && is_image(path)).collect();
    if files.is_empty() {
        return Err(DataError::NoImages { path: dir.to_path_buf() });
    }
    for path in files {
        let id = first_id + items.len() as u64;
        items.push(ImageItem { id, pixels: decode(&path, img_size)?, height: img_size, width: img_size, label });
    }
    Ok(())
}

/// The planes of the image's central square at `img_size`.
fn decode(path: &Path, img_size: usize) -> Result<Vec<u8>, DataError> {
    let reader = ImageReader::open(path).and_then(ImageReader::with_guessed_format);
    let image = reader.map_err(|source| DataError::io(path, source))?.decode();
    let image = image.map_err(|source| DataError::Decode { path: path.to_path_buf(), source })?;
    let image = image.resize_to_fill(img_size as u32, img_size as u32, FilterType::Triangle).to_rgb8();
    Ok((0..3).flat_map(|channel| image.pixels().map(move |pixel| pixel[channel])).collect())
}

/// The sub-folders, hidden ones left out, in alphabetical order.
fn class_folders(dir: &Path) -> Result<Vec<PathBuf>, DataError> {
    if !dir.is_dir() {
        return Err(DataError::MissingFolder { path: dir.to_path_buf(), layout: LAYOUT });
    }
    Ok(entries(dir)?.into_iter().filter(|path| path.is_dir() && !name(path).starts_with('.')).collect())
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
    use super::*;
    use image::{Rgb, RgbImage};
    use std::fs;

    fn save(path: &Path, rgb: [u8; 3]) {
        fs::create_dir_all(path.parent().unwrap()).unwrap();
        RgbImage::from_pixel(6, 4, Rgb(rgb)).save(path).unwrap();
    }

    #[test]
    fn split_folders_keep_their_classes_and_ids() {
        let dir = tempfile::tempdir().unwrap();
        save(&dir.path().join("train/cat/1.png"), [255, 0, 0]);
        save(&dir.path().join("train/dog/1.png"), [0, 255, 0]);
        save(&dir.path().join("val/dog/1.JPG"), [0, 0, 255]);
        fs::write(dir.path().join("train/dog/notes.txt"), "not an image").unwrap();
        let split = load(dir.path(), 2).unwrap();
        assert_eq!(split.train.classes, ["cat", "dog"]);
        assert_eq!(split.train.items[0].pixels, [255, 255, 255, 255, 0, 0, 0, 0, 0, 0, 0, 0]);
        assert_eq!(split.train.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(0, 0), (1, 1)]);
        assert_eq!(split.test.items.iter().map(|i| (i.id, i.label)).collect::<Vec<_>>(), [(2, 1)]);
    }

    #[test]
    fn without_split_folders_each_class_is_split() {
        let dir = tempfile::tempdir().unwrap();
        for i in 0..5 {
            save(&dir.path().join(format!("cat/{i}.png")), [i, 0, 0]);
            save(&dir.path().join(format!("dog/{i}.png")), [0, i, 0]);
        }
        let split = load(dir.path(), 2).unwrap();
        assert_eq!((split.train.items.len(), split.test.items.len()), (8, 2));
        assert_eq!(split.test.items, load(dir.path(), 2).unwrap().test.items);
    }

    #[test]
    fn wide_images_are_cropped_to_the_centre() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("wide.png");
        RgbImage::from_fn(6, 2, |x, _| if (2..4).contains(&x) { Rgb([9, 8, 7]) } else { Rgb([200; 3]) })
            .save(&path)
            .unwrap();
        assert_eq!(decode(&path, 2).unwrap(), [9, 9, 9, 9, 8, 8, 8, 8, 7, 7, 7, 7]);
    }

    #[test]
    fn what_is_wrong_is_named() {
        let dir = tempfile::tempdir().unwrap();
        let message = |root: &Path| load(root, 2).unwrap_err().to_string();
        assert!(message(&dir.path().join("nowhere")).contains("there is no folder"));
        assert!(message(dir.path()).contains("holds 0 class folders"));
        save(&dir.path().join("a/1.png"), [0; 3]);
        fs::create_dir(dir.path().join("b")).unwrap();
        assert!(matches!(load(dir.path(), 2), Err(DataError::NoImages { path }) if path.ends_with("b")));
        fs::write(dir.path().join("b/broken.png"), "no image").unwrap();
        assert!(message(dir.path()).contains("broken.png"));
        fs::create_dir(dir.path().join("test")).unwrap();
        assert!(matches!(load(dir.path(), 2), Err(DataError::MissingFolder { path, .. }) if path.ends_with("train")));
        assert!(matches!(load(dir.path(), 0), Err(DataError::ZeroImageSize)));
    }

    #[test]
    fn a_test_class_must_have_training_images() {
        let dir = tempfile::tempdir().unwrap();
        for class in ["train/cat", "train/dog", "test/cow"] {
            save(&dir.path().join(class).join("1.png"), [0; 3]);
        }
        assert!(matches!(load(dir.path(), 2), Err(DataError::UnknownClass { path, .. }) if path.ends_with("cow")));
    }
}
