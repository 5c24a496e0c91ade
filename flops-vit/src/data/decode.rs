//! An image file, decoded whole or refused by name.

use super::options::LoadOptions;
use image::{DynamicImage, ImageDecoder, ImageError, ImageFormat, ImageReader};
use std::fs::{self, File};
use std::io::{Cursor, Read};
use std::path::{Path, PathBuf};

/// The most pixels of an image: twice `PIL.Image.MAX_IMAGE_PIXELS`, beyond which PIL refuses too.
const MOST_PIXELS: u64 = 178_956_970;
/// The most bytes of a file, which is read whole.
const MOST_BYTES: u64 = 512 << 20;

/// Why an image file is not read.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum ImageFault {
    /// A link whose target does not exist.
    #[error("a link to {}, which is not there", target.display())]
    BrokenLink {
        /// What the link names.
        target: PathBuf,
    },
    /// A pipe, a socket or a device.
    #[error("neither a file nor a folder")]
    NoFile,
    /// A file of 0 bytes.
    #[error("an empty file")]
    Empty,
    /// A file that takes too much memory.
    #[error("{bytes} bytes, more than {most}")]
    TooManyBytes {
        /// Its size.
        bytes: u64,
        /// The largest size that is read.
        most: u64,
    },
    /// An image that takes too much memory, or has no pixels.
    #[error("{width} × {height} pixels, read are 1 to {most}")]
    Pixels {
        /// Its columns.
        width: u32,
        /// Its rows.
        height: u32,
        /// The most pixels that are read.
        most: u64,
    },
    /// The end of the file is missing.
    #[error("the file is cut off: {missing}")]
    CutOff {
        /// What shows it.
        missing: &'static str,
    },
    /// The file cannot be opened or read.
    #[error(transparent)]
    Io(#[from] std::io::Error),
    /// The decoder's error, whose own words may be several lines.
    #[error("{}", one_line(.0))]
    Decoder(#[from] ImageError),
}

fn one_line(error: &ImageError) -> String {
    error.to_string().split_whitespace().collect::<Vec<_>>().join(" ")
}

/// Decodes an image and resizes it to `img_size`, as three planes.
///
/// Several frames or pages count as the first of them, as in PIL. The image is turned as its EXIF
/// orientation says.
pub(super) fn decode(path: &Path, options: &LoadOptions) -> Result<Vec<u8>, ImageFault> {
    let image = open(&read(path)?)?;
    let image = options.resizing.apply(&image, options.img_size).to_rgb8();
    Ok((0..3).flat_map(|channel| image.pixels().map(move |pixel| pixel[channel])).collect())
}

/// Reads a file; a pipe, on which a reader would wait, is none.
fn read(path: &Path) -> Result<Vec<u8>, ImageFault> {
    let about = fs::metadata(path).map_err(|error| match fs::read_link(path) {
        Ok(target) if error.kind() == std::io::ErrorKind::NotFound => ImageFault::BrokenLink { target },
        _ => error.into(),
    })?;
    match about.len() {
        _ if !about.is_file() => Err(ImageFault::NoFile),
        0 => Err(ImageFault::Empty),
        bytes if bytes > MOST_BYTES => Err(ImageFault::TooManyBytes { bytes, most: MOST_BYTES }),
        bytes => {
            let mut content = Vec::with_capacity(bytes as usize);
            File::open(path)?.take(MOST_BYTES).read_to_end(&mut content)?;
            Ok(content)
        }
    }
}

/// Decodes a file by its content, whatever its name is.
fn open(bytes: &[u8]) -> Result<DynamicImage, ImageFault> {
    // the reader's own limits of memory hold too
    let reader = ImageReader::new(Cursor::new(bytes)).with_guessed_format()?;
    let format = reader.format();
    let mut decoder = reader.into_decoder()?;
    let (width, height) = decoder.dimensions();
    let pixels = u64::from(width) * u64::from(height);
    if pixels == 0 || pixels > MOST_PIXELS {
        return Err(ImageFault::Pixels { width, height, most: MOST_PIXELS });
    }
    image::Limits::default().reserve(decoder.total_bytes())?;
    let orientation = decoder.orientation()?;
    let mut image = DynamicImage::from_decoder(decoder)?;
    // other decoders fail where bytes are missing; these fill the image with grey
    let missing = match format {
        Some(ImageFormat::Jpeg) if !has_end_marker(bytes) => Some("a JPEG without its end marker"),
        Some(ImageFormat::WebP) if !is_riff_whole(bytes) => Some("a WebP shorter than its header says"),
        _ => None,
    };
    if let Some(missing) = missing {
        return Err(ImageFault::CutOff { missing });
    }
    image.apply_orientation(orientation);
    Ok(image)
}

/// Returns whether a JPEG has its end marker (ITU-T T.81, B.1): PIL refuses one without it.
///
/// Segments are stepped over, so that the marker of a thumbnail does not count. What follows the
/// marker may be anything.
fn has_end_marker(bytes: &[u8]) -> bool {
    // behind the start marker
    let mut rest = bytes.get(2..).unwrap_or_default();
    loop {
        // 0xFF 0x00 is a byte of the image, 0xFF 0xFF fills up
        let marker = rest.windows(2).position(|pair| pair[0] == 0xFF && !matches!(pair[1], 0x00 | 0xFF));
        let Some(marker) = marker else { return false };
        let code = rest[marker + 1];
        rest = &rest[marker + 2..];
        match code {
            0xD9 => return true,
            // these have no length: restarts, a start, and one for arithmetic coding
            0xD0..=0xD8 | 0x01 => {}
            _ => {
                let length = rest.first_chunk::<2>().map(|length| usize::from(u16::from_be_bytes(*length)));
                let Some(behind) = length.and_then(|length| rest.get(length..)) else { return false };
                rest = behind;
            }
        }
    }
}

/// Returns whether a RIFF file has the bytes that its header announces, as libwebp asks for.
fn is_riff_whole(bytes: &[u8]) -> bool {
    let size = bytes.get(4..).and_then(<[u8]>::first_chunk::<4>).map(|size| u32::from_le_bytes(*size));
    size.is_some_and(|size| bytes.len() as u64 >= 8 + u64::from(size))
}

#[cfg(test)]
mod tests {
    use super::*;
    use image::{Luma, Rgb, RgbImage};
    use std::io::Write;

    /// 24 × 16 pixels: the left half red, the right half blue, the upper half darker.
    fn picture() -> RgbImage {
        RgbImage::from_fn(24, 16, |x, y| {
            let light = if y < 8 { 120 } else { 240 };
            if x < 12 { Rgb([light, 0, 0]) } else { Rgb([0, 0, light]) }
        })
    }

    fn encoded(format: ImageFormat) -> Vec<u8> {
        let mut bytes = Cursor::new(vec![]);
        picture().write_to(&mut bytes, format).unwrap();
        bytes.into_inner()
    }

    const FORMATS: [ImageFormat; 7] = [
        ImageFormat::Png,
        ImageFormat::Jpeg,
        ImageFormat::WebP,
        ImageFormat::Bmp,
        ImageFormat::Gif,
        ImageFormat::Tiff,
        ImageFormat::Pnm,
    ];

    #[test]
    fn the_formats_of_torchvision_and_gif_are_read() {
        for format in FORMATS {
            let image = open(&encoded(format)).unwrap().to_rgb8();
            assert_eq!(image.dimensions(), (24, 16), "{format:?}");
            for (x, y) in [(3, 3), (20, 3), (3, 12), (20, 12)] {
                let (found, expected) = (image.get_pixel(x, y), *picture().get_pixel(x, y));
                let off = (0..3).map(|c| found[c].abs_diff(expected[c])).max().unwrap();
                assert!(off <= 16, "{format:?} at {x}, {y}: {found:?}, expected {expected:?}");
            }
        }
    }

    #[test]
    fn a_file_cut_in_half_is_refused_in_every_format() {
        for format in FORMATS {
            let bytes = encoded(format);
            let found = open(&bytes[..bytes.len() / 2]);
            assert!(found.is_err(), "{format:?} of half the file was read");
        }
    }

    #[test]
    fn a_tiff_whose_directory_comes_first_is_refused_when_cut_off() {
        // 8 × 8 grey pixels, uncompressed, behind a directory of 8 entries
        let entry = |tag: u16, value: u32| {
            let long = 4u16;
            [&tag.to_le_bytes()[..], &long.to_le_bytes(), &1u32.to_le_bytes(), &value.to_le_bytes()].concat()
        };
        let entries = [(256, 8), (257, 8), (258, 8), (259, 1), (262, 1), (273, 110), (278, 8), (279, 64)];
        let mut bytes = b"II*\0\x08\0\0\0\x08\0".to_vec();
        entries.iter().for_each(|&(tag, value)| bytes.extend(entry(tag, value)));
        bytes.extend([0; 4]);
        assert_eq!(bytes.len(), 110);
        bytes.extend([99; 64]);
        assert_eq!(open(&bytes).unwrap().to_luma8().as_raw()[..], [99; 64]);
        assert!(open(&bytes[..140]).is_err());
    }

    // PIL 11: OSError "image file is truncated (0 bytes not processed)"
    #[test]
    fn a_jpeg_cut_off_anywhere_is_refused() {
        let bytes = encoded(ImageFormat::Jpeg);
        let scan = bytes.windows(2).position(|pair| pair == [0xFF, 0xDA]).unwrap();
        for length in [scan + 30, bytes.len() - 20, bytes.len() - 2, bytes.len() - 1] {
            let fault = open(&bytes[..length]).unwrap_err();
            assert!(
                matches!(fault, ImageFault::CutOff { .. } | ImageFault::Decoder(_)),
                "{length} of {}: {fault}",
                bytes.len()
            );
        }
        assert!(matches!(open(&bytes[..bytes.len() - 2]), Err(ImageFault::CutOff { .. })));
        // the decoder's words for this one end in a line feed
        let mut tables = bytes.clone();
        let table = bytes.windows(2).position(|pair| pair == [0xFF, 0xC4]).unwrap();
        tables.drain(table + 4..table + 9);
        tables.truncate(table + 17);
        assert_eq!(open(&tables).unwrap_err().to_string().lines().count(), 1);
    }

    #[test]
    fn a_jpeg_may_have_bytes_behind_its_end_and_a_thumbnail_before_it() {
        let bytes = encoded(ImageFormat::Jpeg);
        open(&[&bytes[..], b"anything \xFF\xD8\xFF"].concat()).unwrap();
        // a whole JPEG inside a segment APP1, and the image itself cut off
        let length = u16::try_from(bytes.len() + 2).unwrap().to_be_bytes();
        let with_thumbnail = [&bytes[..2], &[0xFF, 0xE1], &length, &bytes, &bytes[2..]].concat();
        assert!(has_end_marker(&with_thumbnail));
        assert!(!has_end_marker(&with_thumbnail[..with_thumbnail.len() - 2]));
        // the same where the file ends inside a segment or behind a marker
        for length in [0, 1, 2, 3, 4, 5, bytes.len() / 2] {
            assert!(!has_end_marker(&with_thumbnail[..length]), "{length} bytes");
        }
    }

    /// Returns the JPEG with an EXIF segment that holds nothing but the orientation.
    fn oriented(orientation: u8) -> Vec<u8> {
        // TIFF header, one entry: tag 0x0112 of type SHORT with one value, no further directory
        let mut exif = b"Exif\0\0MM\0\x2A\0\0\0\x08\0\x01\x01\x12\0\x03\0\0\0\x01".to_vec();
        exif.extend([0, orientation, 0, 0, 0, 0, 0, 0]);
        let length = u16::try_from(exif.len() + 2).unwrap().to_be_bytes();
        let bytes = encoded(ImageFormat::Jpeg);
        [&bytes[..2], &[0xFF, 0xE1], &length, &exif, &bytes[2..]].concat()
    }

    // PIL.ImageOps.exif_transpose, which `datasets.Image` calls: 6 is ROTATE_270, a quarter turn
    // clockwise, 3 is ROTATE_180, 2 is FLIP_LEFT_RIGHT, 5 is TRANSPOSE
    #[test]
    fn the_orientation_of_exif_is_applied() {
        let is_red = |image: &RgbImage, x, y| image.get_pixel(x, y)[0] > image.get_pixel(x, y)[2];
        for (orientation, size, first_is_red, last_is_red) in [
            (1, (24, 16), true, false),
            (2, (24, 16), false, true),
            (3, (24, 16), false, true),
            (5, (16, 24), true, false),
            (6, (16, 24), true, false),
            (8, (16, 24), false, true),
            // no orientation
            (0, (24, 16), true, false),
            (9, (24, 16), true, false),
        ] {
            let image = open(&oriented(orientation)).unwrap().to_rgb8();
            assert_eq!(image.dimensions(), size, "{orientation}");
            let (x, y) = (size.0 - 3, size.1 - 3);
            assert_eq!((is_red(&image, 2, 2), is_red(&image, x, y)), (first_is_red, last_is_red), "{orientation}");
        }
        // 5 and 6 differ in where the dark upper half comes to lie: on the left and on the right
        let light = |orientation, x| open(&oriented(orientation)).unwrap().to_rgb8().get_pixel(x, 2)[0];
        assert!(light(5, 2) < 180 && light(5, 13) > 180);
        assert!(light(6, 2) > 180 && light(6, 13) < 180);
    }

    #[test]
    fn sizes_that_take_too_much_memory_are_refused_by_their_header() {
        // PIL: DecompressionBombError for more than 178956970 pixels
        let mut bmp = encoded(ImageFormat::Bmp);
        bmp[18..26].copy_from_slice(&[20_000u32.to_le_bytes(), 20_000u32.to_le_bytes()].concat());
        let fault = open(&bmp).unwrap_err();
        assert!(matches!(fault, ImageFault::Pixels { width: 20_000, height: 20_000, most: MOST_PIXELS }), "{fault}");
        assert_eq!(fault.to_string(), "20000 × 20000 pixels, read are 1 to 178956970");
    }

    #[test]
    fn files_that_hold_no_image_are_named() {
        let dir = tempfile::tempdir().unwrap();
        let fault = |name: &str| read(&dir.path().join(name)).and_then(|bytes| open(&bytes)).unwrap_err().to_string();
        File::create(dir.path().join("empty.png")).unwrap();
        assert_eq!(fault("empty.png"), "an empty file");
        File::create(dir.path().join("text.png")).unwrap().write_all(b"no image").unwrap();
        assert!(fault("text.png").contains("format could not be determined"), "{}", fault("text.png"));
        fs::create_dir(dir.path().join("folder.png")).unwrap();
        assert_eq!(fault("folder.png"), "neither a file nor a folder");
        let large = File::create(dir.path().join("large.png")).unwrap();
        large.set_len(MOST_BYTES + 1).unwrap();
        assert_eq!(fault("large.png"), "536870913 bytes, more than 536870912");
        #[cfg(unix)]
        {
            std::os::unix::fs::symlink("nowhere.png", dir.path().join("link.png")).unwrap();
            assert_eq!(fault("link.png"), "a link to nowhere.png, which is not there");
        }
    }

    #[test]
    fn sixteen_bits_and_grey_become_rgb() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("grey.png");
        image::ImageBuffer::<Luma<u16>, Vec<u16>>::from_pixel(3, 3, Luma([0x8000])).save(&path).unwrap();
        assert_eq!(decode(&path, &LoadOptions::new(2)).unwrap(), [128; 12]);
    }
}
