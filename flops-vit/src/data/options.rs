//! Options for loading images.

use crate::resizing::Resizing;
use std::path::PathBuf;

/// Where images are looked for, and how they are decoded.
#[derive(Clone, Debug, PartialEq)]
#[non_exhaustive]
pub struct LoadOptions {
    /// Folder of CIFAR; without it Burn's data set cache is searched.
    pub data_dir: Option<PathBuf>,
    /// Whether to fetch a missing CIFAR into that cache (cargo feature `download`).
    pub download: bool,
    /// Side of the digits and of images from folders, in pixels, at least 1.
    ///
    /// CIFAR stays at 32×32; the batcher resizes it.
    pub img_size: usize,
    /// How images from folders are resized to that size.
    pub resizing: Resizing,
    /// Whether an image of a folder that cannot be decoded is an error; otherwise it is skipped.
    pub strict: bool,
    /// Number of threads that decode a folder's images; 0 counts as 1.
    ///
    /// The result does not depend on it.
    pub threads: usize,
}

impl LoadOptions {
    /// Options for images of side `img_size`, in pixels.
    ///
    /// The defaults: no folder, no download, broken images skipped, a thread per core, at most 8.
    #[must_use]
    pub fn new(img_size: usize) -> Self {
        let threads = std::thread::available_parallelism().map_or(1, usize::from).min(8);
        Self { data_dir: None, download: false, img_size, resizing: Resizing::default(), strict: false, threads }
    }

    /// Sets [`data_dir`](Self::data_dir).
    #[must_use]
    pub fn with_data_dir(mut self, data_dir: Option<PathBuf>) -> Self {
        self.data_dir = data_dir;
        self
    }

    /// Sets [`download`](Self::download).
    #[must_use]
    pub fn with_download(mut self, download: bool) -> Self {
        self.download = download;
        self
    }

    /// Sets [`resizing`](Self::resizing).
    #[must_use]
    pub fn with_resizing(mut self, resizing: Resizing) -> Self {
        self.resizing = resizing;
        self
    }

    /// Sets [`strict`](Self::strict).
    #[must_use]
    pub fn with_strict(mut self, strict: bool) -> Self {
        self.strict = strict;
        self
    }

    /// Sets [`threads`](Self::threads).
    #[must_use]
    pub fn with_threads(mut self, threads: usize) -> Self {
        self.threads = threads;
        self
    }
}
