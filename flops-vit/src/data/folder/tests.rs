//! Folders of images, as they are found and as they go wrong.

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
    save(&dir.path().join("a/2.png"), [0; 3]);
    fs::create_dir(dir.path().join("b")).unwrap();
    assert!(matches!(load(dir.path(), &options()), Err(DataError::NoImages { path }) if path.ends_with("b")));
    fs::write(dir.path().join("b/broken.png"), "no image").unwrap();
    assert!(message(dir.path()).contains("none of the 1 images of the class in"));
    fs::create_dir_all(dir.path().join("test/a")).unwrap();
    assert!(matches!(load(dir.path(), &options()), Err(DataError::NoTrainingPart { path }) if path.ends_with("test")));
    assert!(matches!(load(dir.path(), &LoadOptions::new(0)), Err(DataError::ZeroImageSize)));
}

#[test]
fn test_class_without_training_images_is_an_error() {
    let dir = tempfile::tempdir().unwrap();
    for class in ["train/cat", "train/dog", "test/cow"] {
        save(&dir.path().join(class).join("1.png"), [0; 3]);
    }
    assert!(matches!(load(dir.path(), &options()), Err(DataError::UnknownClass { path, .. }) if path.ends_with("cow")));
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
    assert!(matches!(&error, DataError::BrokenClass { path, files: 1, .. } if path.ends_with("test/dog")), "{error}");
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
    // in an ordinary folder superclasses are the classes, with all images below them
    let split = load(dir.path(), &options()).unwrap();
    assert_eq!(split.train.classes, ["bee", "herd", "pets"]);
    assert_eq!(split.train.items.iter().map(|item| item.label).collect::<Vec<_>>(), [0, 1, 2, 2]);
}

/// Names of files below `dir`, with their reasons.
fn named<'a>(dir: &Path, files: &'a [Skipped]) -> Vec<(String, &'a str)> {
    let relative = |path: &Path| path.strip_prefix(dir).unwrap().display().to_string();
    files.iter().map(|file| (relative(&file.path), file.reason.as_str())).collect()
}

#[test]
fn a_jpeg_cut_in_half_is_no_image() {
    let dir = cats_and_dogs();
    let path = dir.path().join("cat/9.jpg");
    RgbImage::from_fn(64, 64, |x, y| Rgb([4 * x as u8, 4 * y as u8, 99])).save(&path).unwrap();
    assert_eq!(load(dir.path(), &options().with_strict(true)).unwrap().skipped, []);
    let bytes = fs::read(&path).unwrap();
    fs::write(&path, &bytes[..bytes.len() / 2]).unwrap();
    let split = load(dir.path(), &options()).unwrap();
    assert_eq!(split.skipped.iter().map(|file| &file.path).collect::<Vec<_>>(), [&path]);
    let strict = load(dir.path(), &options().with_strict(true)).unwrap_err();
    assert!(matches!(&strict, DataError::Decode { path, .. } if path.ends_with("cat/9.jpg")), "{strict}");
}

#[test]
fn images_below_a_class_are_its_images_and_the_rest_is_counted() {
    let dir = cats_and_dogs();
    for name in ["cat/old/1.webp", "cat/old/er/2.BMP", "dog/3.tiff", "dog/4.gif", "dog/5.ppm"] {
        save(&dir.path().join(name), [9; 3]);
    }
    for name in ["cat/notes.txt", "dog/Thumbs.db", "labels.csv", "cat/.DS_Store"] {
        fs::write(dir.path().join(name), "no image").unwrap();
    }
    let split = load(dir.path(), &options().with_strict(true)).unwrap();
    assert_eq!(split.train.items.len() + split.test.items.len(), 15);
    let nine = split.train.items.iter().chain(&split.test.items).filter(|item| item.pixels == [9; 12]).count();
    assert_eq!(nine, 5, "an image of another format has other pixels");
    assert_eq!(
        named(dir.path(), &split.left_out),
        [("labels.csv".into(), "in no class folder"), ("cat/notes.txt".into(), "no image by its name")]
    );
    assert!(split.split_off);
}

#[cfg(unix)]
#[test]
fn links_to_nothing_are_counted_as_images() {
    let dir = cats_and_dogs();
    std::os::unix::fs::symlink("nowhere.png", dir.path().join("cat/9.png")).unwrap();
    let split = load(dir.path(), &options()).unwrap();
    let reason = "a link to nowhere.png, which is not there";
    assert_eq!(named(dir.path(), &split.skipped), [("cat/9.png".into(), reason)]);
    assert!(load(dir.path(), &options().with_strict(true)).is_err());
}

#[test]
fn valid_beside_train_holds_the_test_images() {
    let dir = tempfile::tempdir().unwrap();
    for class in ["Train/cat", "Train/dog", "VALID/cat", "VALID/dog", "extra/cat"] {
        save(&dir.path().join(class).join("1.png"), [0; 3]);
    }
    save(&dir.path().join("Train/stray.png"), [0; 3]);
    fs::write(dir.path().join("README.md"), "text").unwrap();
    let split = load(dir.path(), &options()).unwrap();
    assert_eq!((split.train.items.len(), split.test.items.len(), split.split_off), (2, 2, false));
    let names: Vec<String> = named(dir.path(), &split.left_out).into_iter().map(|file| file.0).collect();
    assert_eq!(names, ["extra", "Train/stray.png", "README.md"]);
}

#[test]
fn messages_say_what_is_the_matter_with_classes() {
    let message = |files: &[&str]| {
        let dir = tempfile::tempdir().unwrap();
        files.iter().for_each(|file| save(&dir.path().join(file), [0; 3]));
        load(dir.path(), &options()).unwrap_err().to_string().replace(&dir.path().display().to_string(), "ROOT")
    };
    // a single image a class
    let found = message(&["cat/1.png", "dog/1.png"]);
    assert!(found.contains("each class in ROOT has a single image"), "{found}");
    // upper and lower case
    let found = message(&["train/Cat/1.png", "train/dog/1.png", "test/cat/1.png"]);
    assert!(found.contains("ROOT/test/cat is a class without training images; the training class Cat"), "{found}");
    // a class called train that holds folders
    let found = message(&["bus/1.png", "car/1.png", "train/old/1.png"]);
    assert!(found.contains("ROOT/train holds 1 class folders") && found.contains("bus, car would be left"), "{found}");
    // an archive that was unpacked into a folder of its own
    let found = message(&["pets/train/cat/1.png", "pets/test/cat/1.png"]);
    assert!(found.contains("ROOT/pets holds several folders: give that one"), "{found}");
    for message in [message(&["train/1.png", "test/1.png"]), message(&["cat/1.png"])] {
        assert!(message.contains("ROOT") && message.lines().count() == 1, "{message}");
    }
}

#[test]
fn a_class_may_be_called_train() {
    let dir = tempfile::tempdir().unwrap();
    for file in ["bus/1.png", "bus/2.png", "train/1.png", "train/2.png"] {
        save(&dir.path().join(file), [0; 3]);
    }
    assert_eq!(load(dir.path(), &options()).unwrap().train.classes, ["bus", "train"]);
}

#[test]
fn an_image_of_one_row_is_not_blown_up() {
    let dir = cats_and_dogs();
    // a million columns by 224 × 224 pixels each are 200 GB
    let image = RgbImage::from_fn(1_000_000, 1, |x, _| Rgb([if x.abs_diff(500_000) < 100 { 7 } else { 200 }; 3]));
    image.save(dir.path().join("cat/9.png")).unwrap();
    let split = load(dir.path(), &LoadOptions::new(224).with_threads(1)).unwrap();
    let found = split.train.items.iter().chain(&split.test.items).find(|item| item.id == 5).unwrap();
    assert!(found.pixels.iter().all(|&pixel| pixel == 7));
}
