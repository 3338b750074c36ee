//! Whole files.

use candle_core::Tensor;
use vq_model::{Likelihood, Precision, VqVae};

use super::super::*;
use super::{CPU, block, model, priors, same};
use crate::Prior;

struct File {
    model: VqVae,
    priors: Vec<Prior>,
    blocks: Vec<Block>,
    bytes: Vec<u8>,
}

/// Of two blocks: 64 and 3 images.
fn file() -> File {
    let model = model(1, 1, Likelihood::Mse, 3);
    let priors = priors(&model, 2, false, 3);
    let blocks = vec![block(&model, 2, false, 64, 1), block(&model, 2, false, 3, 2)];
    let mut writer = CompressedWriter::new(Vec::new(), head(67)).unwrap();
    let codec = Codec::new(&model, &priors, false).unwrap();
    for block in &blocks {
        writer.write(&codec, block).unwrap();
    }
    let (bytes, payload, overhead) = writer.finish().unwrap();
    assert_eq!(bytes.len() as u64, payload + overhead);
    File { model, priors, blocks, bytes }
}

fn head(images: usize) -> CompressedHead {
    CompressedHead {
        model: "a model's hash".to_owned(),
        priors: vec!["a prior's hash".to_owned()],
        machine: "cpu test".to_owned(),
        precision: Precision::F32,
        lossless: false,
        size: [8, 8],
        images,
        names: Vec::new(),
    }
}

/// All blocks of a file, or the error that it ends in.
fn read(bytes: &[u8], codec: &Codec) -> Result<Vec<Block>, CompressError> {
    let mut reader = CompressedReader::new(bytes)?;
    let mut blocks = Vec::new();
    while let Some(block) = reader.read(codec, "cpu here")? {
        blocks.push(block);
    }
    Ok(blocks)
}

#[test]
fn a_file_comes_back_and_no_damage_goes_unseen() {
    let File { model, priors, blocks, bytes } = file();
    let codec = Codec::new(&model, &priors, false).unwrap();
    let back = read(&bytes, &codec).unwrap();
    assert_eq!(back.len(), 2);
    assert!(blocks.iter().zip(&back).all(|(a, b)| same(a, b)));
    CompressedReader::new(&bytes[..]).unwrap().check().unwrap();

    let refused = |bytes: &[u8], what: &str| {
        let checked = CompressedReader::new(bytes).and_then(CompressedReader::check);
        let error = checked.expect_err(what);
        let typed = matches!(error, CompressError::Damaged { .. } | CompressError::OtherFormat);
        assert!(typed, "{what}: {error}");
    };
    for length in 0..bytes.len() {
        refused(&bytes[..length], &format!("cut to {length}"));
    }
    let mut longer = bytes.clone();
    longer.push(0);
    refused(&longer, "longer");
    for at in 0..bytes.len() {
        for bit in [0, 5] {
            let mut flipped = bytes.clone();
            flipped[at] ^= 1 << bit;
            refused(&flipped, &format!("bit {bit} of byte {at}"));
        }
    }
    // Not by decoding either.
    let mut flipped = bytes.clone();
    let middle = bytes.len() / 2;
    flipped[middle] ^= 4;
    assert!(matches!(read(&flipped, &codec), Err(CompressError::Damaged { .. })));
}

#[test]
fn networks_that_compute_otherwise_are_noticed() {
    let File { model, priors, bytes, .. } = file();
    // As far as the file can tell, the same priors on another machine.
    let others = super::priors(&model, 2, false, 4);
    let codec = Codec::new(&model, &others, false).unwrap();
    let error = read(&bytes, &codec).unwrap_err();
    let is_other = matches!(error, CompressError::OtherMachine { block: 0, .. });
    assert!(is_other, "{error}");
    let text = error.to_string();
    assert!(text.contains("cpu test") && text.contains("cpu here"), "{text}");
    // One weight by one unit in the last place, and a network that hardly matters: still noticed or right.
    let name = priors[0].parameters().keys().next().unwrap();
    let var = &priors[0].parameters()[name];
    let mut values = var.flatten_all().unwrap().to_vec1::<f32>().unwrap();
    values[0] = f32::from_bits(values[0].to_bits() + (1 << 16));
    var.set(&Tensor::from_vec(values, var.dims(), CPU).unwrap()).unwrap();
    let codec = Codec::new(&model, &priors, false).unwrap();
    match read(&bytes, &codec) {
        Ok(blocks) => assert!(file().blocks.iter().zip(&blocks).all(|(a, b)| same(a, b))),
        Err(error) => assert!(matches!(error, CompressError::OtherMachine { .. }), "{error}"),
    }
}

#[test]
fn other_models_and_priors_are_refused_by_their_hashes() {
    let head = head(1);
    let prior = |hash: &str| vec![hash.to_owned()];
    head.require("a model's hash", &prior("a prior's hash")).unwrap();
    for (model, priors, part) in [
        ("another", prior("a prior's hash"), "--model"),
        ("a model's hash", prior("another"), "--prior"),
        ("a model's hash", Vec::new(), "1 prior(s), and 0"),
        ("a model's hash", [prior("a prior's hash"), prior("b")].concat(), "1 prior(s), and 2"),
    ] {
        let error = head.require(model, &priors).unwrap_err().to_string();
        assert!(error.contains(part), "{error}");
    }
    let without = CompressedHead { priors: Vec::new(), ..head };
    let error = without.require("a model's hash", &prior("a")).unwrap_err().to_string();
    assert!(error.contains("leave out --prior"), "{error}");
}

#[test]
fn a_newer_version_and_other_files_are_named() {
    let bytes = CompressedWriter::new(Vec::new(), head(0)).unwrap().finish().unwrap().0;
    // No image: nothing that was ever written.
    assert!(matches!(CompressedReader::new(&bytes[..]), Err(CompressError::Damaged { .. })));
    let mut newer = bytes[..bytes.len() - 4].to_vec();
    newer[8] = 2;
    newer.extend(crc32fast::hash(&newer).to_le_bytes());
    let error = CompressedReader::new(&newer[..]).unwrap_err();
    assert!(matches!(error, CompressError::Version { found: 2, supported: 1 }), "{error}");
    for other in [&b""[..], b"VQIMAGE", b"\x89PNG\r\n\x1a\n0123456789abcdef"] {
        assert!(matches!(CompressedReader::new(other), Err(CompressError::OtherFormat)));
    }
}
