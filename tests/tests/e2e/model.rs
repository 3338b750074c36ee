//! What can be done with a trained model.

use std::fs;
use std::path::Path;

use image::{RgbImage, imageops};
use serde_json::Value;

use crate::support::{fail, names, picture, succeed, train, trained};

/// `--model` of the trained run, for a command that runs elsewhere.
fn model() -> String {
    format!("--model={}", trained().join("run").display())
}

fn open(path: impl AsRef<Path>) -> RgbImage {
    image::open(path).unwrap().into_rgb8()
}

#[test]
fn decoded_codes_are_the_reconstruction() {
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["a.png", "b.png", "c.jpg"] {
        picture(&path(name), 24, 16);
    }
    let model = model();
    let images = ["a.png", "b.png", "c.jpg"];
    let args = |command: &'static str, more: &[&'static str]| -> Vec<String> {
        let mut args = vec![command.to_owned(), model.clone()];
        args.extend(more.iter().map(ToString::to_string));
        args.extend(images.map(str::to_owned));
        args
    };
    let run = |args: Vec<String>| succeed(folder.path(), args.iter().map(String::as_str));
    let said = run(args("reconstruct", &["--out", "recon"]));
    assert_eq!(said.out.matches("24×16").count(), 3, "{said:?}");
    run(args("encode", &["--out", "codes.safetensors"]));
    run(args("encode", &["--out", "codes.npy"]));
    succeed(folder.path(), ["decode", "codes.safetensors", &model, "--out", "named"]);
    succeed(folder.path(), ["decode", "codes.npy", &model, "--out", "numbered"]);
    assert_eq!(names(&path("recon")), ["a_recon.png", "b_recon.png", "c_recon.png"]);
    assert_eq!(names(&path("named")), ["a_decoded.png", "b_decoded.png", "c_decoded.png"]);

    for (index, name) in ["a", "b", "c"].iter().enumerate() {
        let both = open(path(&format!("recon/{name}_recon.png")));
        assert_eq!(both.dimensions(), (2 * 24 + 2, 16));
        let reconstruction = imageops::crop_imm(&both, 26, 0, 24, 16).to_image();
        assert_eq!(open(path(&format!("named/{name}_decoded.png"))), reconstruction);
        assert_eq!(open(path(&format!("numbered/{index:05}_decoded.png"))), reconstruction);
    }
    let original = imageops::crop_imm(&open(path("recon/a_recon.png")), 0, 0, 24, 16).to_image();
    assert_eq!(original, open(path("a.png")));

    let codes = candle_core::Tensor::read_npy(path("codes.npy")).unwrap();
    assert_eq!(codes.dims(), [3, 4, 6]);
    let codes = codes.flatten_all().unwrap().to_vec1::<u32>().unwrap();
    assert!(codes.iter().all(|&code| code < 16));
    let bytes = fs::read(path("codes.safetensors")).unwrap();
    let file = safetensors::SafeTensors::deserialize(&bytes).unwrap();
    let stored = file.tensor("levels.0").unwrap();
    let expected: Vec<u8> = codes.iter().flat_map(|code| code.to_le_bytes()).collect();
    assert_eq!((stored.shape(), stored.data()), (&[3, 4, 6][..], &expected[..]));
}

#[test]
fn codes_of_another_model_are_refused() {
    let folder = tempfile::tempdir().unwrap();
    picture(&folder.path().join("a.png"), 16, 16);
    succeed(folder.path(), train("other", &["--seed=7", "--epochs=1"]));
    let model = model();
    succeed(folder.path(), ["encode", "a.png", &model]);
    succeed(folder.path(), ["decode", "codes.safetensors", &model]);
    let args = ["decode", "codes.safetensors", "--model=other", "--out=wrong"];
    fail(folder.path(), args, &["codes.safetensors", "another model", "--model"]);
    assert!(!folder.path().join("wrong").exists());
}

#[cfg(target_os = "linux")]
#[test]
fn paths_need_not_be_text() {
    use std::ffi::OsStr;
    use std::os::unix::ffi::OsStrExt;

    let folder = tempfile::tempdir().unwrap();
    let name = |text: &[u8]| OsStr::from_bytes(text).to_owned();
    picture(&folder.path().join(name(b"a-\xff.png")), 16, 16);
    let model = OsStr::new(&model()).to_owned();
    for (command, more) in [
        ("encode", name(b"--out=\xfe.safetensors")),
        ("reconstruct", name(b"--out=\xfe")),
        ("compress", name(b"--out=\xfe.vq")),
    ] {
        let args = [OsStr::new(command).to_owned(), name(b"a-\xff.png"), model.clone(), more];
        succeed(folder.path(), args);
    }
    let codes = name(b"\xfe.safetensors");
    let out = name(b"--out=decoded-\xfe");
    succeed(folder.path(), [OsStr::new("decode").to_owned(), codes, model.clone(), out]);
    let args = ["decompress".into(), name(b"\xfe.vq"), model, name(b"--out=back-\xfe")];
    succeed(folder.path(), args);
}

#[test]
fn any_size_is_taken() {
    let folder = tempfile::tempdir().unwrap();
    picture(&folder.path().join("odd.png"), 41, 23);
    picture(&folder.path().join("small.png"), 3, 50);
    let model = model();
    let said = succeed(folder.path(), ["reconstruct", &model, "odd.png"]);
    assert!(said.err.contains("cropped to multiples of 4"), "{said:?}");
    assert_eq!(open(folder.path().join("odd_recon.png")).dimensions(), (2 * 40 + 2, 20));
    succeed(folder.path(), ["reconstruct", &model, "odd.png", "small.png", "--size=64x48"]);
    assert_eq!(open(folder.path().join("small_recon.png")).dimensions(), (2 * 64 + 2, 48));

    fail(folder.path(), ["reconstruct", &model, "small.png"], &["small.png", "3×50", "--size"]);
    fail(folder.path(), ["reconstruct", &model, "odd.png", "--size=30"], &["multiples", "4"]);
    picture(&folder.path().join("other.png"), 16, 16);
    fail(
        folder.path(),
        ["encode", &model, "odd.png", "other.png"],
        &["odd.png", "other.png", "--size"],
    );
    assert!(!folder.path().join("codes.safetensors").exists());
}

#[test]
fn the_evaluation_is_that_of_the_run() {
    let metrics = fs::read_to_string(trained().join("run/metrics.jsonl")).unwrap();
    let records = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let epochs: Vec<Value> = records.filter(|record| record["event"] == "epoch").collect();
    let folder = tempfile::tempdir().unwrap();
    let last = format!("--model={}", trained().join("run/last").display());
    let args = ["eval", &last, "--log-format=json", "--batch-size=5", "--out=pictures"];
    let said = succeed(folder.path(), args);
    let record: Value = serde_json::from_str(&said.out).unwrap();
    for name in ["mse", "nmse", "psnr", "ssim", "perplexity", "codes_in_use"] {
        let (now, then) =
            (record[name].as_f64().unwrap(), epochs[1]["test"][name].as_f64().unwrap());
        assert!((now - then).abs() <= 1e-9 * then.abs(), "{name}: {now} {then}");
    }
    assert_eq!(record["images"], 16);
    let pictures = ["eval_codebook.svg", "eval_orig.png", "eval_recon.png"];
    assert_eq!(names(&folder.path().join("pictures")), pictures);

    let said = succeed(folder.path(), ["eval", &model(), "--split=train"]);
    assert!(said.out.contains("psnr") && said.out.contains("96 images"), "{said:?}");
}

#[test]
fn inspect_says_what_is_there() {
    let said = succeed(trained(), ["inspect", "run/last"]);
    for part in [
        "16×16 of 3 channels",
        "mean [0.5, 0.5, 0.5]",
        "K = 16, D = 4, rule ema",
        "64 bits an image",
        "parameters",
        "multiply-adds",
        "step 24: 2 epochs and 0 of 12 batches done",
        "codes_in_use",
        "codebook 0    lengths",
        "duplicates",
        "drift",
        "code_distance",
        "circle",
    ] {
        assert!(said.out.contains(part), "`{part}` is missing: {said:?}");
    }
    let said = succeed(trained(), ["inspect", "run", "--log-format=json"]);
    let record: Value = serde_json::from_str(&said.out).unwrap();
    assert_eq!(record["config"]["levels"][0]["quantizer"]["codebook_size"], 16);
    assert!(record["parameters"].as_u64().unwrap() > 500);
    assert_eq!(record["codebooks"][0][0]["codes"], 16);
    assert!(record["advice"].is_array());

    // A model alone, as other programs are given it.
    let folder = tempfile::tempdir().unwrap();
    for name in ["config.json", "model.safetensors"] {
        fs::copy(trained().join("run/last").join(name), folder.path().join(name)).unwrap();
    }
    let said = succeed(folder.path(), ["inspect", "."]);
    assert!(said.out.contains("no training state"), "{said:?}");
}

#[test]
fn the_embedded_recipes_are_listed_and_printed() {
    let folder = tempfile::tempdir().unwrap();
    let said = succeed(folder.path(), ["configs"]);
    for name in [
        "cifar10",
        "cifar10-paper",
        "cifar10-hierarchical",
        "cifar10-likelihood",
        "imagenet256",
        "images1024",
        "shapes",
    ] {
        assert!(said.out.contains(name), "{said:?}");
        let printed = succeed(folder.path(), ["configs", name]).out;
        let file = Path::new(env!("CARGO_MANIFEST_DIR")).join(format!("../configs/{name}.toml"));
        assert_eq!(printed.trim_end(), fs::read_to_string(file).unwrap().trim_end());
    }
    fail(folder.path(), ["configs", "imagenet"], &["imagenet256", "cifar10-paper"]);
}

#[test]
fn a_model_with_several_codes_at_each_position_goes_all_the_way() {
    let folder = tempfile::tempdir().unwrap();
    let kind = "--set=model.levels.0.quantizer.kind=residual";
    let stages = "--set=model.levels.0.quantizer.stages=3";
    let mut args =
        train("run", &[kind, stages, "--set=model.levels.0.quantizer.quantizer_dropout=0.5"]);
    args.retain(|arg| *arg != "--epochs=2");
    args.push("--epochs=1");
    succeed(folder.path(), args);
    let path = |name: &str| folder.path().join(name);
    for stage in 0..3 {
        assert!(path(&format!("run/codebook-{stage}.svg")).is_file());
    }
    let said = succeed(folder.path(), ["inspect", "run"]);
    for part in ["times 3 codes out of K = 16, D = 4, rule ema", "kind residual", "192 bits"] {
        assert!(said.out.contains(part), "`{part}` is missing: {said:?}");
    }
    let said = succeed(folder.path(), ["eval", "--model=run", "--out=eval"]);
    assert!(said.out.contains("perplexity/2"), "{said:?}");
    assert!(path("eval/eval_codebook-2.svg").is_file());

    picture(&path("a.png"), 24, 16);
    succeed(folder.path(), ["reconstruct", "--model=run", "a.png", "--out=recon"]);
    succeed(folder.path(), ["encode", "--model=run", "a.png", "--out=codes.npy"]);
    succeed(folder.path(), ["encode", "--model=run", "a.png", "--out=codes.safetensors"]);
    succeed(folder.path(), ["decode", "codes.npy", "--model=run", "--out=numbered"]);
    succeed(folder.path(), ["decode", "codes.safetensors", "--model=run", "--out=named"]);
    let both = open(path("recon/a_recon.png"));
    let reconstruction = imageops::crop_imm(&both, 26, 0, 24, 16).to_image();
    assert_eq!(open(path("named/a_decoded.png")), reconstruction);
    assert_eq!(open(path("numbered/00000_decoded.png")), reconstruction);

    // The first stages alone, as another program may write them.
    let codes = candle_core::Tensor::read_npy(path("codes.npy")).unwrap();
    assert_eq!(codes.dims(), [1, 4, 6, 3]);
    codes.narrow(3, 0, 2).unwrap().contiguous().unwrap().write_npy(path("two.npy")).unwrap();
    succeed(folder.path(), ["decode", "two.npy", "--model=run", "--out=two"]);
    assert_ne!(open(path("two/00000_decoded.png")), reconstruction);
    codes.narrow(3, 0, 1).unwrap().squeeze(3).unwrap().write_npy(path("flat.npy")).unwrap();
    fail(folder.path(), ["decode", "flat.npy", "--model=run"], &["[B, h, w, 3]", "[1, 4, 6]"]);
}
