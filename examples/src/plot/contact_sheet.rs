//! Contact sheets: small images with captions, as one SVG that holds their pixels.

use std::fmt::Write;
use std::io::Cursor;

use anyhow::{Result, ensure};
use base64::Engine;
use base64::engine::general_purpose::STANDARD;
use image::{ImageFormat, Rgb, RgbImage};

/// An image and its caption.
#[derive(Clone, Debug)]
pub struct Picture {
    /// Pixels by colour plane and row, `[3, height, width]`.
    pub pixels: Vec<u8>,
    /// The number of rows of pixels.
    pub height: usize,
    /// The number of columns of pixels.
    pub width: usize,
    /// The two lines of the caption.
    pub lines: [String; 2],
    /// The length of the bar under the image, from 0 to 1.
    pub share: f64,
}

const COLUMNS: usize = 8;
const SIDE: usize = 96;
const CELL: (usize, usize) = (128, 150);
const TOP: usize = 44;

/// Draws the pictures in rows of eight under `title`.
///
/// # Errors
/// If the pixels of an image do not match its height and width.
pub fn contact_sheet(title: &str, pictures: &[Picture]) -> Result<String> {
    let rows = pictures.len().div_ceil(COLUMNS).max(1);
    let (width, height) = (COLUMNS * CELL.0 + 16, TOP + rows * CELL.1 + 8);
    let mut svg = format!(
        "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" xmlns=\"http://www.w3.org/2000/svg\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <g font-family=\"sans-serif\" fill=\"#3c3c3c\" text-anchor=\"middle\">\n\
         <text x=\"{}\" y=\"26\" font-size=\"18\">{}</text>\n",
        width / 2,
        escaped(title)
    );
    for (i, picture) in pictures.iter().enumerate() {
        let (x, y) = (8 + i % COLUMNS * CELL.0, TOP + i / COLUMNS * CELL.1);
        let left = x + (CELL.0 - SIDE) / 2;
        write!(svg, "<image x=\"{left}\" y=\"{y}\" width=\"{SIDE}\" height=\"{SIDE}\" image-rendering=\"pixelated\" ")?;
        writeln!(svg, "href=\"data:image/png;base64,{}\"/>", STANDARD.encode(png(picture)?))?;
        let bar = (SIDE as f64 * picture.share.clamp(0.0, 1.0)).round();
        writeln!(svg, "<rect x=\"{left}\" y=\"{}\" width=\"{bar}\" height=\"4\" fill=\"#2060a8\"/>", y + SIDE + 3)?;
        for (k, line) in picture.lines.iter().enumerate() {
            let (middle, base) = (x + CELL.0 / 2, y + SIDE + 22 + 15 * k);
            writeln!(svg, "<text x=\"{middle}\" y=\"{base}\" font-size=\"12\">{}</text>", escaped(line))?;
        }
    }
    svg.push_str("</g>\n</svg>\n");
    Ok(svg)
}

/// An image that was retrieved for a caption.
#[derive(Clone, Debug)]
pub struct Found {
    /// Pixels by colour plane and row, `[3, side, side]`.
    pub pixels: Vec<u8>,
    /// The number of rows and of columns of pixels.
    pub side: usize,
    /// The cosine similarity of image and caption.
    pub similarity: f64,
    /// Whether the image belongs to the caption.
    pub right: bool,
}

/// Draws one row per caption with its retrieved images, the nearest first. The image that belongs
/// to the caption has a frame.
///
/// # Errors
/// If the pixels of an image do not match its side.
pub fn retrieval_sheet(title: &str, rows: &[(String, Vec<Found>)]) -> Result<String> {
    let most = rows.iter().map(|(_, found)| found.len()).max().unwrap_or(0);
    let (side, left, cell, high) = (72, 360, 84, 100);
    let (width, height) = (left + most * cell + 16, TOP + rows.len() * high + 8);
    let mut svg = format!(
        "<svg width=\"{width}\" height=\"{height}\" viewBox=\"0 0 {width} {height}\" xmlns=\"http://www.w3.org/2000/svg\">\n\
         <rect width=\"{width}\" height=\"{height}\" fill=\"#ffffff\"/>\n\
         <g font-family=\"sans-serif\" fill=\"#3c3c3c\">\n\
         <text x=\"16\" y=\"26\" font-size=\"18\">{}</text>\n",
        escaped(title)
    );
    for (i, (caption, found)) in rows.iter().enumerate() {
        let y = TOP + i * high;
        writeln!(svg, "<text x=\"16\" y=\"{}\" font-size=\"13\">{}</text>", y + side / 2 + 5, escaped(caption))?;
        for (k, found) in found.iter().enumerate() {
            let x = left + k * cell;
            let picture = Picture {
                pixels: found.pixels.clone(),
                height: found.side,
                width: found.side,
                lines: Default::default(),
                share: 0.0,
            };
            write!(
                svg,
                "<image x=\"{x}\" y=\"{y}\" width=\"{side}\" height=\"{side}\" image-rendering=\"pixelated\" "
            )?;
            writeln!(svg, "href=\"data:image/png;base64,{}\"/>", STANDARD.encode(png(&picture)?))?;
            if found.right {
                writeln!(
                    svg,
                    "<rect x=\"{}\" y=\"{}\" width=\"{w}\" height=\"{w}\" fill=\"none\" stroke=\"#009e73\" stroke-width=\"3\"/>",
                    x - 2,
                    y - 2,
                    w = side + 4
                )?;
            }
            let (middle, base) = (x + side / 2, y + side + 15);
            writeln!(
                svg,
                "<text x=\"{middle}\" y=\"{base}\" font-size=\"11\" text-anchor=\"middle\">{:.2}</text>",
                found.similarity
            )?;
        }
    }
    svg.push_str("</g>\n</svg>\n");
    Ok(svg)
}

fn escaped(text: &str) -> String {
    text.replace('&', "&amp;").replace('<', "&lt;").replace('>', "&gt;")
}

/// Encodes the image as PNG.
fn png(picture: &Picture) -> Result<Vec<u8>> {
    let (h, w) = (picture.height, picture.width);
    let values = picture.pixels.len();
    ensure!(values == 3 * h * w, "an image of {h}×{w} has {values} values instead of {}", 3 * h * w);
    let image = RgbImage::from_fn(w as u32, h as u32, |x, y| {
        Rgb([0, 1, 2].map(|plane| picture.pixels[(plane * h + y as usize) * w + x as usize]))
    });
    let mut bytes = Cursor::new(vec![]);
    image.write_to(&mut bytes, ImageFormat::Png)?;
    Ok(bytes.into_inner())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_image_of_a_caption_is_framed() {
        let found = |right| Found { pixels: vec![9; 12], side: 2, similarity: 0.51, right };
        let rows = vec![("a < b".to_string(), vec![found(false), found(true)]), ("c".into(), vec![])];
        let svg = retrieval_sheet("found", &rows).unwrap();
        assert_eq!((svg.matches("<image").count(), svg.matches("stroke-width").count()), (2, 1));
        assert!(svg.contains("a &lt; b") && svg.contains("0.51"));
    }

    #[test]
    fn contact_sheets_embed_their_images() {
        let picture = Picture {
            pixels: vec![255, 0, 0, 0, 0, 0],
            height: 1,
            width: 2,
            lines: ["20 queries".into(), "a < b".into()],
            share: 1.0,
        };
        let svg = contact_sheet("title & more", &vec![picture.clone(); 9]).unwrap();
        assert_eq!(svg.matches("<image").count(), 9);
        assert!(svg.contains("title &amp; more") && svg.contains("20 queries") && svg.contains("a &lt; b"));
        let decoded = image::load_from_memory(&png(&picture).unwrap()).unwrap().into_rgb8();
        assert_eq!((decoded.dimensions(), decoded.into_raw()), ((2, 1), vec![255, 0, 0, 0, 0, 0]));
        assert!(png(&Picture { width: 3, ..picture }).is_err());
    }
}
