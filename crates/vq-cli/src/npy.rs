//! The `.npy` format of Python's arrays, for codes. candle's reader allocates whatever a header claims; this one
//! checks it against the file first.

/// An array of u32 as an `.npy` file: `shape` and its values, row by row.
pub(crate) fn write(shape: &[usize], values: &[u32]) -> Vec<u8> {
    let dims: Vec<String> = shape.iter().map(ToString::to_string).collect();
    let comma = if shape.len() == 1 { "," } else { "" };
    let mut header = format!(
        "{{'descr': '<u4', 'fortran_order': False, 'shape': ({}{comma}), }}",
        dims.join(", ")
    );
    // The values begin at a multiple of 64 bytes, after a line's end.
    while !(MAGIC.len() + 4 + header.len() + 1).is_multiple_of(64) {
        header.push(' ');
    }
    header.push('\n');
    let mut bytes = MAGIC.to_vec();
    bytes.extend([1, 0]);
    bytes.extend((header.len() as u16).to_le_bytes());
    bytes.extend(header.as_bytes());
    bytes.extend(values.iter().flat_map(|value| value.to_le_bytes()));
    bytes
}

/// The shape and the values of an `.npy` file of any integer type. The error says what is wrong.
pub(crate) fn read(bytes: &[u8]) -> Result<(Vec<usize>, Vec<u32>), String> {
    let rest = bytes.strip_prefix(MAGIC).ok_or("it does not begin like an .npy file")?;
    let (version, rest) = rest.split_at_checked(2).ok_or(CUT)?;
    let (length, rest) = if version == [1, 0] {
        let (length, rest) = rest.split_first_chunk::<2>().ok_or(CUT)?;
        (usize::from(u16::from_le_bytes(*length)), rest)
    } else {
        let (length, rest) = rest.split_first_chunk::<4>().ok_or(CUT)?;
        (u32::from_le_bytes(*length) as usize, rest)
    };
    let (header, data) = rest.split_at_checked(length).ok_or(CUT)?;
    let header = std::str::from_utf8(header).map_err(|_| "its header is not text")?;

    if field(header, "fortran_order")?.starts_with("True") {
        return Err("it is in Fortran order; save it with numpy.ascontiguousarray".to_owned());
    }
    let shape = field(header, "shape")?;
    let shape = shape.strip_prefix('(').and_then(|shape| shape.split_once(')'));
    let (shape, _) = shape.ok_or("its header has no shape")?;
    let shape: Result<Vec<usize>, _> =
        shape.split(',').map(str::trim).filter(|dim| !dim.is_empty()).map(str::parse).collect();
    let shape = shape.map_err(|_| "its shape is not made of whole numbers")?;
    let count = shape.iter().try_fold(1usize, |count, dim| count.checked_mul(*dim));

    let descr = field(header, "descr")?;
    let descr = descr.trim_start_matches(['\'', '"']);
    let descr = descr.split(['\'', '"']).next().unwrap_or_default();
    let values = match descr {
        "|u1" | "|i1" => integers::<1>(data, descr.contains('i'), false),
        "<u2" | "<i2" => integers::<2>(data, descr.contains('i'), false),
        "<u4" | "<i4" => integers::<4>(data, descr.contains('i'), false),
        "<u8" | "<i8" => integers::<8>(data, descr.contains('i'), false),
        ">u2" | ">i2" => integers::<2>(data, descr.contains('i'), true),
        ">u4" | ">i4" => integers::<4>(data, descr.contains('i'), true),
        ">u8" | ">i8" => integers::<8>(data, descr.contains('i'), true),
        _ => Err(format!("its type {descr} is not an integer's")),
    }?;
    if count != Some(values.len()) {
        return Err(format!("it holds {} values, its shape is {shape:?}", values.len()));
    }
    Ok((shape, values))
}

const MAGIC: &[u8] = b"\x93NUMPY";
const CUT: &str = "it is cut short";

/// What follows `'name':` in the header.
fn field<'a>(header: &'a str, name: &str) -> Result<&'a str, String> {
    ['\'', '"']
        .iter()
        .find_map(|quote| header.split_once(&format!("{quote}{name}{quote}:")))
        .map(|(_, value)| value.trim_start())
        .ok_or_else(|| format!("its header has no {name}"))
}

fn integers<const N: usize>(data: &[u8], signed: bool, big: bool) -> Result<Vec<u32>, String> {
    let (chunks, rest) = data.as_chunks::<N>();
    if !rest.is_empty() {
        return Err(CUT.to_owned());
    }
    let value = |bytes: &[u8; N]| {
        let mut wide = [0; 8];
        for (to, from) in wide.iter_mut().zip(bytes) {
            *to = *from;
        }
        if big {
            wide[..N].reverse();
        }
        let is_negative = signed && wide[N - 1] >= 0x80;
        u32::try_from(u64::from_le_bytes(wide))
            .ok()
            .filter(|_| !is_negative)
            .ok_or_else(|| "it holds a value that is no code".to_owned())
    };
    chunks.iter().map(value).collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_is_written_reads_back_here_and_in_candle() {
        let values: Vec<u32> = (0..24).collect();
        let bytes = write(&[2, 3, 4], &values);
        assert_eq!(read(&bytes), Ok((vec![2, 3, 4], values.clone())));
        assert_eq!((bytes.len() - 4 * 24) % 64, 0);

        let file = std::env::temp_dir().join(format!("vq-npy-{}.npy", std::process::id()));
        std::fs::write(&file, &bytes).unwrap();
        let tensor = candle_core::Tensor::read_npy(&file).unwrap();
        std::fs::remove_file(&file).unwrap();
        assert_eq!(tensor.dims(), [2, 3, 4]);
        assert_eq!(tensor.flatten_all().unwrap().to_vec1::<u32>().unwrap(), values);
    }

    fn npy(descr: &str, shape: &str, data: &[u8]) -> Vec<u8> {
        let header =
            format!("{{'descr': '{descr}', 'fortran_order': False, 'shape': {shape}, }}\n");
        let mut bytes = MAGIC.to_vec();
        bytes.extend([1, 0]);
        bytes.extend((header.len() as u16).to_le_bytes());
        bytes.extend(header.as_bytes());
        bytes.extend(data);
        bytes
    }

    #[test]
    fn every_integer_type_is_read() {
        let two = |descr, data: &[u8]| read(&npy(descr, "(2,)", data)).map(|(_, values)| values);
        assert_eq!(two("|u1", &[1, 200]), Ok(vec![1, 200]));
        assert_eq!(two("<i2", &[1, 0, 0, 1]), Ok(vec![1, 256]));
        assert_eq!(two(">i2", &[0, 1, 1, 0]), Ok(vec![1, 256]));
        assert_eq!(two("<i8", &[5, 0, 0, 0, 0, 0, 0, 0, 6, 0, 0, 0, 0, 0, 0, 0]), Ok(vec![5, 6]));
        assert!(two("<i2", &[0xff, 0xff, 0, 0]).is_err());
        assert!(two("<f4", &[0; 8]).unwrap_err().contains("<f4"));
    }

    #[test]
    fn damage_is_an_error() {
        let whole = write(&[2, 2], &[1, 2, 3, 4]);
        for length in 0..whole.len() {
            assert!(read(&whole[..length]).is_err(), "{length}");
        }
        assert!(read(&npy("<u4", "(99999999999999999999,)", &[])).is_err());
        assert!(read(&npy("<u4", "(4294967296, 4294967296, 2)", &[])).is_err());
        assert!(read(&npy("<u4", "(3,)", &[0; 8])).unwrap_err().contains("2 values"));
    }
}
