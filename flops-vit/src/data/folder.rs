//! A folder of images with one sub-folder per class.

use super::dataset::{DataSplit, ImageItem, Skipped, stratify};
use super::decode::{ImageFault, decode};
use super::error::DataError;
use super::layout::{Layout, class_folders, grouped_class_folders};
use super::options::LoadOptions;
use super::walk::{folders, images_below, name, stray_files};
use std::path::{Path, PathBuf};

/// Share of each class that becomes test images where the folder has no test part.
const TEST_PERCENT: usize = 20;
const SPLIT_SEED: u64 = 0;

/// Loads `root/train/CLASS/**/IMAGE` and `root/test/CLASS/**/IMAGE`.
///
/// These folders may be called by every customary name, in upper or lower case: `train` or
/// `training`; `test`, `testing`, `eval` or `evaluation`, else `val`, `valid`, `validation` or
/// `dev`. Where each folder in `root` has a longer name, such as `train_set`, that counts too.
/// Without such folders it loads `root/CLASS/**/IMAGE`. Without test images a fixed 20 % of each
/// class become them ([`DataSplit::split_off`]). Folders that may be classes as well as parts are
/// parts if they hold folders.
///
/// Classes are in alphabetical order. Images are found in a class folder and in all folders below
/// it. Read are JPEG, PNG, WebP, BMP, GIF, TIFF and PNM, as the content of a file says. Several
/// threads decode the images. They are turned as their EXIF orientation says (as HuggingFace's
/// `datasets` does, and torchvision does not), then resized as [`LoadOptions::resizing`] says.
///
/// [`DataSplit::skipped`] names images that cannot be decoded: cut off, of more pixels than PIL
/// reads, links to nothing, and formats such as HEIC. They change neither the ids of the others nor
/// the split. [`DataSplit::left_out`] names all other files, and folders beside those that are
/// read. Hidden files and what systems leave behind (`Thumbs.db`, `desktop.ini`, `__MACOSX`,
/// `@eaDir`) are not named.
///
/// # Errors
/// Folders that are missing or empty, or whose parts are not told by their names. Classes without
/// any image that can be decoded. With [`LoadOptions::strict`] also the first image that cannot be
/// decoded.
pub fn load(root: &Path, options: &LoadOptions) -> Result<DataSplit, DataError> {
    load_classes(root, options, class_folders)
}

/// Loads as [`load`] does, but class folders may also lie in folders of their superclasses.
///
/// Classes are in alphabetical order of their own names. What is left out is not named.
pub(super) fn load_grouped(root: &Path, options: &LoadOptions) -> Result<DataSplit, DataError> {
    let split = load_classes(root, options, grouped_class_folders)?;
    Ok(DataSplit { left_out: vec![], ..split })
}

/// Finds the class folders in a folder.
type FindClasses = fn(&Path) -> Result<Vec<PathBuf>, DataError>;

/// An image to be decoded; its id is its index among all files.
struct File {
    path: PathBuf,
    label: usize,
    /// Index of its class folder.
    folder: usize,
    is_test: bool,
}

/// What is to be decoded, in the order of the class folders.
#[derive(Default)]
struct Listing {
    files: Vec<File>,
    folders: Vec<PathBuf>,
    classes: Vec<String>,
    left_out: Vec<Skipped>,
}

impl Listing {
    /// Lists the images of both parts.
    fn of(layout: &Layout, find: FindClasses) -> Result<Self, DataError> {
        let mut listing = Self { left_out: layout.unread.clone(), ..Self::default() };
        let train = find(&layout.train)?;
        if train.len() < 2 {
            return Err(too_few_classes(layout, &train));
        }
        listing.classes = train.iter().map(|folder| name(folder)).collect();
        stray_files(&layout.train, &mut listing.left_out)?;
        for (label, folder) in train.into_iter().enumerate() {
            listing.add_class(folder, label, false)?;
        }
        let Some(dir) = &layout.test else { return Ok(listing) };
        stray_files(dir, &mut listing.left_out)?;
        for folder in find(dir)? {
            let Some(label) = listing.classes.iter().position(|class| *class == name(&folder)) else {
                return Err(DataError::UnknownClass { path: folder, classes: listing.classes });
            };
            listing.add_class(folder, label, true)?;
        }
        Ok(listing)
    }

    /// Appends the images of a class folder.
    fn add_class(&mut self, path: PathBuf, label: usize, is_test: bool) -> Result<(), DataError> {
        let images = images_below(&path, &mut self.left_out)?;
        if images.is_empty() {
            return Err(DataError::NoImages { path });
        }
        let folder = self.folders.len();
        self.folders.push(path);
        self.files.extend(images.into_iter().map(|path| File { path, label, folder, is_test }));
        Ok(())
    }

    /// Makes a part of each class test images.
    fn split_off(&mut self) {
        let labels: Vec<usize> = self.files.iter().map(|file| file.label).collect();
        let is_test = stratify(&labels, self.classes.len(), TEST_PERCENT, SPLIT_SEED);
        self.files.iter_mut().zip(is_test).for_each(|(file, is_test)| file.is_test = is_test);
    }
}

fn load_classes(root: &Path, options: &LoadOptions, find: FindClasses) -> Result<DataSplit, DataError> {
    if options.img_size == 0 {
        return Err(DataError::ZeroImageSize);
    }
    let layout = Layout::of(root)?;
    let mut listing = Listing::of(&layout, find)?;
    if layout.train != root {
        stray_files(root, &mut listing.left_out)?;
    }
    if layout.test.is_none() {
        listing.split_off();
        if !listing.files.iter().any(|file| file.is_test) {
            return Err(DataError::NoTestImages { path: layout.train });
        }
    }
    let images = decode_all(&listing.files, options)?;
    let split = collect(listing, images, options.img_size)?;
    Ok(DataSplit { split_off: layout.test.is_none(), ..split })
}

/// The error of a folder with too few class folders, with what may be meant instead.
fn too_few_classes(layout: &Layout, found: &[PathBuf]) -> DataError {
    let inner = match found {
        [only] => Some(only).filter(|only| folders(only).is_ok_and(|inside| inside.len() > 1)),
        _ => None,
    };
    let beside = layout.unread.iter().map(|folder| name(&folder.path)).collect();
    DataError::TooFewClasses { path: layout.train.clone(), found: found.len(), beside, inner: inner.cloned() }
}

/// The planes of an image, or why there are none.
type Decoded = Result<Vec<u8>, ImageFault>;

/// Decodes the files on several threads; with `strict` the first that fails is an error.
fn decode_all(files: &[File], options: &LoadOptions) -> Result<Vec<Decoded>, DataError> {
    let decode_part = |part: &[File]| -> Result<Vec<Decoded>, DataError> {
        let decode = |file: &File| match decode(&file.path, options) {
            Err(why) if options.strict => Err(DataError::Decode { path: file.path.clone(), why }),
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
fn collect(listing: Listing, images: Vec<Decoded>, side: usize) -> Result<DataSplit, DataError> {
    let files: Vec<(File, Decoded)> = listing.files.into_iter().zip(images).collect();
    for class in files.chunk_by(|(a, _), (b, _)| a.folder == b.folder) {
        // a folder split into both parts may lose all its test images
        let tests = class.iter().all(|(file, _)| file.is_test);
        let needed: Vec<_> = class.iter().filter(|(file, _)| file.is_test == tests).collect();
        if let Some((File { folder, .. }, Err(first))) = needed.first()
            && needed.iter().all(|(_, image)| image.is_err())
        {
            let path = listing.folders[*folder].clone();
            return Err(DataError::BrokenClass { path, files: needed.len(), reason: first.to_string() });
        }
    }
    let (mut items, mut skipped) = (vec![], vec![]);
    for (id, (File { path, label, is_test, .. }, image)) in files.into_iter().enumerate() {
        match image {
            Ok(pixels) => items.push((ImageItem { id: id as u64, pixels, height: side, width: side, label }, is_test)),
            Err(fault) => skipped.push(Skipped::new(path, fault)),
        }
    }
    Ok(DataSplit { skipped, left_out: listing.left_out, ..DataSplit::new(items, listing.classes) })
}

#[cfg(test)]
mod tests;
