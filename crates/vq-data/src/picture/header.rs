//! Whether a file is an image, from as little of it as will do.

use std::fs::File;
use std::io::{BufReader, Cursor, Read, Seek, SeekFrom};
use std::path::Path;

use image::{ImageFormat, ImageReader};

use super::{decoder, guarded, load, open};
use crate::Error;

/// Reads a file's header and its last bytes. Where these leave a doubt (an end that is missing, say) the
/// file is decoded, so what is refused here is what [`load`] refuses. Damage in the middle is not seen.
pub(crate) fn check(path: &Path) -> Result<(), Error> {
    let (mut file, format) = open(path)?;
    let has_end = has_end(&mut file, format).map_err(Error::io(path))?;
    if has_end && has_header(path, file, format)? {
        return Ok(());
    }
    load(path).map(drop)
}

/// How much of a JPEG is read in search of its dimensions: a small one whole, and what large
/// thumbnails and colour profiles leave room for. The decoder itself would read all of any.
const JPEG_STARTS: [u64; 2] = [1 << 13, 1 << 17];

fn has_header(path: &Path, mut file: File, format: ImageFormat) -> Result<bool, Error> {
    if format != ImageFormat::Jpeg {
        let reader = ImageReader::with_format(BufReader::new(file), format);
        return Ok(guarded(path, || decoder(reader).map(drop)).is_ok());
    }
    let mut start = Vec::new();
    for most in JPEG_STARTS {
        let more = most - start.len() as u64;
        file.by_ref().take(more).read_to_end(&mut start).map_err(Error::io(path))?;
        let reader = ImageReader::with_format(Cursor::new(&start), format);
        if guarded(path, || decoder(reader).map(drop)).is_ok() {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether the file ends as one of its format does; true where the format has no such mark. Leaves the
/// file at its start.
fn has_end(file: &mut File, format: ImageFormat) -> std::io::Result<bool> {
    let mark: &[u8] = match format {
        ImageFormat::Png => b"\0\0\0\0IEND\xae\x42\x60\x82",
        ImageFormat::Jpeg => b"\xff\xd9",
        ImageFormat::Gif => b";",
        _ => b"",
    };
    let length = file.seek(SeekFrom::End(0))?;
    if length < mark.len() as u64 {
        return Ok(false);
    }
    let is_whole = if format == ImageFormat::WebP {
        let mut head = [0; 8];
        file.rewind()?;
        file.read_exact(&mut head)?;
        let [.., a, b, c, d] = head;
        u64::from(u32::from_le_bytes([a, b, c, d])) + 8 <= length
    } else {
        let mut end = vec![0; mark.len()];
        file.seek(SeekFrom::End(-(mark.len() as i64)))?;
        file.read_exact(&mut end)?;
        end == mark
    };
    file.rewind()?;
    Ok(is_whole)
}

#[cfg(test)]
mod tests {
    use std::fs;

    use image::{Rgb, RgbImage};

    use super::*;

    /// Whatever is cut off: what the header pass refuses is what decoding refuses.
    #[test]
    fn cut_files_are_judged_as_by_decoding() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image");
        let image = RgbImage::from_fn(40, 30, |x, y| Rgb([x as u8 * 6, y as u8 * 8, 9]));
        for format in [ImageFormat::Png, ImageFormat::Jpeg, ImageFormat::WebP, ImageFormat::Gif] {
            image.save_with_format(&path, format).expect("writable");
            assert!(check(&path).is_ok(), "{format:?}");
            let whole = fs::read(&path).expect("is there");
            for length in (0..whole.len()).step_by(whole.len() / 23) {
                fs::write(&path, &whole[..length]).expect("writable");
                let (found, expected) = (check(&path), load(&path).map(drop));
                let text = |result: Result<(), Error>| result.err().map(|error| error.to_string());
                assert_eq!(text(found), text(expected), "{format:?}, {length} of {}", whole.len());
            }
            // Something after the end is nobody's business.
            fs::write(&path, [&whole[..], b"more"].concat()).expect("writable");
            assert!(check(&path).is_ok(), "{format:?}");
        }
    }

    /// A thumbnail or a profile before the dimensions.
    #[test]
    fn the_dimensions_of_a_jpeg_may_come_late() {
        let folder = tempfile::tempdir().expect("a folder");
        let path = folder.path().join("image.jpg");
        RgbImage::new(9, 9).save_with_format(&path, ImageFormat::Jpeg).expect("writable");
        let plain = fs::read(&path).expect("is there");
        for count in [1, 3] {
            let comment = [&b"\xff\xfe\xff\xff"[..], &vec![0; 0xfffd]].concat();
            let long = [&plain[..2], &comment.repeat(count), &plain[2..]].concat();
            fs::write(&path, long).expect("writable");
            assert!(check(&path).is_ok(), "{count}");
        }
    }
}
