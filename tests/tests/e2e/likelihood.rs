//! Bits per dimension, and files of so many bits: train, encode, train-prior, eval, compress, decompress.

use std::fs;
use std::path::Path;
use std::sync::OnceLock;

use serde_json::Value;

use crate::support::{fail, names, picture, run, succeed, train, trained, vq};

/// A folder with a model of two codes at each position in `run`, its `codes` and a prior for them in `prior`.
fn made() -> &'static Path {
    static FOLDER: OnceLock<tempfile::TempDir> = OnceLock::new();
    let folder = FOLDER.get_or_init(|| {
        let folder = tempfile::tempdir().unwrap();
        let more = [
            "--set=model.likelihood=logistic-mixture",
            "--set=model.mixtures=3",
            "--set=model.levels.0.quantizer.kind=residual",
            "--set=model.levels.0.quantizer.stages=2",
            // Two blocks of a file.
            "--set=data.test_count=80",
        ];
        let said = succeed(folder.path(), train("run", &more));
        assert!(said.out.contains("bits per dimension for the pixels"), "{said:?}");
        succeed(folder.path(), ["encode", "--model=run", "--dataset=train", "--out=codes"]);
        let prior = [
            "train-prior",
            "--model=run",
            "--codes=codes",
            "--out=prior",
            "--set=prior.network.channels=8",
            "--set=prior.network.layers=2",
            "--set=prior.network.skip_channels=8",
            "--set=prior.head_hidden=8",
            "--set=train.samples=4",
            "--batch-size=8",
            "--epochs=1",
        ];
        succeed(folder.path(), prior);
        folder
    });
    folder.path()
}

/// The JSON record that a command ends with.
fn record(folder: &Path, args: &[&str]) -> Value {
    let mut all = args.to_vec();
    all.push("--log-format=json");
    let said = succeed(folder, all);
    serde_json::from_str(said.out.lines().last().unwrap()).unwrap()
}

fn number(record: &Value, name: &str) -> f64 {
    record[name].as_f64().unwrap_or_else(|| panic!("no {name}: {record}"))
}

#[test]
fn the_files_size_is_the_bits_that_are_computed() {
    let folder = made();
    let model = format!("--model={}", folder.join("run").display());
    let prior = format!("--prior={}", folder.join("prior").display());
    let out = tempfile::tempdir().unwrap();
    for (name, prior) in [("with", Some(prior.as_str())), ("without", None)] {
        let mut eval = vec!["eval", &model, "--bits-per-dim"];
        eval.extend(prior);
        let judged = record(out.path(), &eval);
        let terms =
            ["pixels", "codes"].map(|term| number(&judged, &format!("bits_per_dim/{term}")));
        let labels = judged["bits_per_dim/labels"].as_f64().unwrap_or(0.0);
        let sum = terms.iter().sum::<f64>() + labels;
        assert!((sum - number(&judged, "bits_per_dim")).abs() < 1e-9, "{judged}");
        assert_eq!(judged["has_priors"], prior.is_some());
        if prior.is_none() {
            // 4×4 positions of two codes of 4 bits.
            assert!((terms[1] - 16.0 * 8.0 / 768.0).abs() < 1e-9, "{judged}");
        }

        let file = format!("--out={name}.vq");
        let mut compress = vec!["compress", &model, "--dataset=test", "--lossless", &file];
        compress.extend(prior);
        let packed = record(out.path(), &compress);
        let bytes = fs::metadata(out.path().join(format!("{name}.vq"))).unwrap().len() as f64;
        assert_eq!(bytes.to_bits(), number(&packed, "bytes").to_bits());
        let (payload, overhead) =
            (number(&packed, "payload_bytes"), number(&packed, "overhead_bytes"));
        assert_eq!((payload + overhead).to_bits(), bytes.to_bits());
        // The head and the checksums are some hundred bytes, whatever the images are.
        assert!(overhead < 1000.0, "{packed}");
        let computed = number(&judged, "bits_per_image") * 80.0;
        let ratio = payload * 8.0 / computed;
        assert!((ratio - 1.0).abs() < 0.005, "{payload} bytes for {computed} bits");
        let ratio = number(&packed, "computed_bits") / computed;
        assert!((ratio - 1.0).abs() < 1e-4, "{packed} {judged}");

        let to = format!("--out={name}");
        let file = format!("{name}.vq");
        let mut decompress = vec!["decompress", &file, &model, &to];
        decompress.extend(prior);
        let restored = record(out.path(), &decompress);
        assert_eq!(restored["images"], 80);
        assert_eq!(names(&out.path().join(name)).len(), 81);
    }
    // Whatever they were coded with, the same images.
    for image in ["00000_restored.png", "00079_restored.png", "codes.safetensors"] {
        let bytes = |folder: &str| fs::read(out.path().join(folder).join(image)).unwrap();
        assert_eq!(bytes("with"), bytes("without"), "{image}");
    }
}

#[test]
fn images_come_back_as_they_were() {
    let made = made();
    let model = format!("--model={}", made.join("run").display());
    let prior = format!("--prior={}", made.join("prior").display());
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    for name in ["a.png", "b.png"] {
        picture(&path(name), 16, 16);
    }
    image::RgbImage::from_pixel(16, 16, image::Rgb([255, 0, 255])).save(path("b.png")).unwrap();
    let compress = ["compress", "a.png", "b.png", &model, &prior];
    let with = |more: &[&'static str]| {
        let mut args = compress.to_vec();
        args.extend(more);
        succeed(folder.path(), args)
    };
    let said = with(&["--lossless", "--out=exact.vq"]);
    assert!(said.out.contains("bits per dimension") && said.out.contains("for pixels"), "{said:?}");
    with(&["--out=codes.vq"]);
    assert!(fs::metadata(path("codes.vq")).unwrap().len() < 1000);

    let decompress = |file: &str, out: &str| {
        succeed(folder.path(), ["decompress", file, &model, &prior, "--out", out])
    };
    decompress("exact.vq", "exact");
    decompress("codes.vq", "decoded");
    let open = |name: &str| image::open(path(name)).unwrap().into_rgb8();
    assert_eq!(names(&path("exact")), ["a_restored.png", "b_restored.png", "codes.safetensors"]);
    for name in ["a", "b"] {
        assert_eq!(open(&format!("{name}.png")), open(&format!("exact/{name}_restored.png")));
    }
    // What `vq encode` and `vq decode` give.
    succeed(folder.path(), ["encode", "a.png", "b.png", &model]);
    let codes = fs::read(path("codes.safetensors")).unwrap();
    assert_eq!(codes, fs::read(path("exact/codes.safetensors")).unwrap());
    assert_eq!(codes, fs::read(path("decoded/codes.safetensors")).unwrap());
    succeed(folder.path(), ["decode", "codes.safetensors", &model, "--out=by-decode"]);
    for name in ["a_decoded.png", "b_decoded.png"] {
        assert_eq!(open(&format!("decoded/{name}")), open(&format!("by-decode/{name}")));
    }

    // Other kernels give the same images or say so; and damage is never a picture.
    let mut other = vq(folder.path());
    other.env("VQ_CPU", "portable").args(["decompress", "exact.vq", &model, &prior, "--out=other"]);
    let said: crate::support::Said = other.output().unwrap().into();
    if said.code == Some(0) {
        assert_eq!(open("a.png"), open("other/a_restored.png"));
    } else {
        let parts = ["exact.vq", "computes otherwise", "here cpu portable", "VQ_CPU"];
        crate::support::refused(&said, &parts);
        assert!(!path("other").exists());
    }
    let whole = fs::read(path("exact.vq")).unwrap();
    for at in [0, 20, whole.len() / 2, whole.len() - 1] {
        let mut flipped = whole.clone();
        flipped[at] ^= 16;
        fs::write(path("flipped.vq"), flipped).unwrap();
        let args = ["decompress", "flipped.vq", &model, &prior, "--out=flipped"];
        fail(folder.path(), args, &["flipped.vq"]);
        fs::write(path("cut.vq"), &whole[..at]).unwrap();
        fail(folder.path(), ["decompress", "cut.vq", &model, &prior, "--out=cut"], &["cut.vq"]);
    }
    assert!(!path("flipped").exists() && !path("cut").exists());
    fail(folder.path(), ["decompress", "a.png", &model], &["a.png", "vq compress"]);
    fail(folder.path(), ["decompress", "exact.vq", &model], &["1 prior(s), and 0", "--prior"]);
    let plain = format!("--model={}", trained().join("run").display());
    fail(folder.path(), ["decompress", "exact.vq", &plain], &["another model", "--model"]);
    fail(
        folder.path(),
        ["decompress", "exact.vq", &model, "--prior", made.join("run").to_str().unwrap()],
        &["this is a model", "give a prior"],
    );
    let swapped = format!("--model={}", made.join("prior").display());
    fail(folder.path(), ["decompress", "exact.vq", &swapped], &["this is a prior"]);
    picture(&path("large.png"), 32, 16);
    fail(folder.path(), ["compress", "large.png", &model, &prior], &["16×16", "--size"]);
    fail(
        folder.path(),
        ["compress", "large.png", &model, &prior, "--lossless"],
        &["16×16", "leave out the priors"],
    );
    assert!(!path("images.vq").exists());
}

#[test]
fn a_lossless_file_takes_no_image_that_would_lose_something() {
    let made = made();
    let model = format!("--model={}", made.join("run").display());
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    picture(&path("odd.png"), 17, 16);
    picture(&path("a.png"), 16, 16);
    picture(&path("wide.png"), 20, 16);
    image::RgbaImage::from_pixel(16, 16, image::Rgba([9, 9, 9, 9]))
        .save(path("clear.png"))
        .unwrap();
    let deep = image::ImageBuffer::from_pixel(16, 16, image::Rgb([256u16, 2, 3]));
    deep.save(path("deep.png")).unwrap();
    for (more, parts) in [
        (&["odd.png"][..], &["odd.png", "17×16", "multiples of 4", "pad it"][..]),
        (&["a.png", "--size=16"], &["--size", "leave out one"]),
        (&["a.png", "wide.png"], &["16×16", "wide.png is 20×16", "file each"]),
        (&["clear.png"], &["clear.png", "transparent", "convert it"]),
        (&["deep.png"], &["deep.png", "8 bits", "convert it"]),
    ] {
        let mut args = vec!["compress", &model, "--lossless"];
        args.extend(more);
        fail(folder.path(), args, parts);
    }
    assert!(!path("images.vq").exists());
    // Where pixels need not be kept, they are cut or converted as they were.
    for more in [&["odd.png"][..], &["a.png", "--size=16"], &["clear.png"], &["deep.png"]] {
        let mut args = vec!["compress", &model];
        args.extend(more);
        succeed(folder.path(), args);
    }
}

#[test]
fn broken_files_of_a_data_set_are_named_or_refused() {
    let made = made();
    let model = format!("--model={}", made.join("run").display());
    let folder = tempfile::tempdir().unwrap();
    let path = |name: &str| folder.path().join(name);
    fs::create_dir(path("images")).unwrap();
    for index in 0..20 {
        picture(&path(&format!("images/{index}.png")), 16 + index, 16);
    }
    // Damage in the middle: its header and its end are those of an image.
    let mut bytes = fs::read(path("images/7.png")).unwrap();
    let middle = bytes.len() / 2;
    bytes[middle..middle + 8].fill(0x55);
    fs::write(path("images/7.png"), bytes).unwrap();
    let compress = ["compress", &model, "--dataset=train", "--data=folder:images", "--out=a.vq"];
    let lossless = || compress.into_iter().chain(["--lossless"]);
    let parts = ["7.png", "--lossless keeps every image", "mend or remove"];
    fail(folder.path(), lossless(), &parts);
    assert!(!path("a.vq").exists());
    let said = succeed(folder.path(), compress);
    assert!(said.err.contains("cannot decode") && said.err.contains("7.png"), "{said:?}");
    fs::remove_file(path("a.vq")).unwrap();
    // Known by now, and no less missing.
    fail(folder.path(), lossless(), &parts);
    let skip = lossless().chain(["--on-broken=skip"]);
    fail(folder.path(), skip, &["--on-broken skip", "leave out one"]);
    assert!(!path("a.vq").exists());
}

#[test]
fn what_has_no_likelihood_says_what_to_do() {
    let folder = tempfile::tempdir().unwrap();
    let plain = format!("--model={}", trained().join("run").display());
    let parts = ["model.likelihood", "cifar10-likelihood"];
    fail(folder.path(), ["eval", &plain, "--bits-per-dim"], &parts);
    picture(&folder.path().join("a.png"), 24, 16);
    fail(folder.path(), ["compress", "a.png", "--lossless", &plain], &parts);
    assert_eq!(names(folder.path()), ["a.png"]);
    // Its codes can be compressed all the same, of any size without a prior.
    succeed(folder.path(), ["compress", "a.png", &plain]);
    succeed(folder.path(), ["decompress", "images.vq", &plain]);
    let expected = ["a_decoded.png", "codes.safetensors"];
    assert_eq!(names(&folder.path().join("decompressed")), expected);
    let said = run(folder.path(), ["compress", &plain]);
    assert_eq!(said.code, Some(2), "{said:?}");
}

#[test]
fn priors_are_inspected_and_judged() {
    let folder = made();
    let said = succeed(folder, ["inspect", "prior"]);
    for part in [
        "4×4 positions",
        "[16, 16]",
        "PixelCNN, 2 layers of 8",
        "attention     none",
        "circle",
        "step ",
    ] {
        assert!(said.out.contains(part), "`{part}` is missing: {said:?}");
    }
    let inspected = record(folder, &["inspect", "prior/last"]);
    assert_eq!(inspected["config"]["codebook_sizes"], serde_json::json!([16, 16]));

    // As at the end of its training.
    let metrics = fs::read_to_string(folder.join("prior/metrics.jsonl")).unwrap();
    let mut records = metrics.lines().map(|line| serde_json::from_str::<Value>(line).unwrap());
    let last = records.rfind(|record| record["event"] == "epoch").unwrap();
    let judged = record(folder, &["eval", "--model=prior/last"]);
    for name in ["nats_per_code", "bits_per_code", "bits_per_image", "unigram_bits_per_code"] {
        let (now, then) = (number(&judged, name), number(&last["test"], name));
        assert!((now - then).abs() < 1e-9 * then, "{name}: {now} {then}");
    }
    succeed(folder, ["encode", "--model=run", "--dataset=test", "--out=codes-test"]);
    let judged = record(folder, &["eval", "--model=prior", "--codes=codes-test"]);
    assert_eq!((&judged["images"], &judged["data"]), (&80.into(), &"codes-test".into()));
    // Without its run, and without the codes that it learned.
    let alone = tempfile::tempdir().unwrap();
    crate::support::copy(&folder.join("prior/checkpoints"), &alone.path().join("checkpoints"));
    crate::support::copy(&folder.join("codes-test"), &alone.path().join("codes-test"));
    let step = names(&alone.path().join("checkpoints")).pop().unwrap();
    fs::rename(alone.path().join("checkpoints").join(step), alone.path().join("prior")).unwrap();
    let again = record(alone.path(), &["eval", "--model=prior", "--codes=codes-test"]);
    assert_eq!(again["unigram_from"], "training codes");
    for name in ["bits_per_code", "unigram_bits_per_code"] {
        assert!((number(&again, name) - number(&judged, name)).abs() < 1e-9, "{again} {judged}");
    }
    fail(alone.path(), ["eval", "--model=prior"], &["prior", "--codes", "run's folder"]);
    fs::remove_file(alone.path().join("prior/unigram.json")).unwrap();
    let counted = record(alone.path(), &["eval", "--model=prior", "--codes=codes-test"]);
    assert_eq!(counted["unigram_from"], "judged codes");
    assert!(number(&counted, "unigram_bits_per_code") <= number(&judged, "unigram_bits_per_code"));
    let said = succeed(alone.path(), ["eval", "--model=prior", "--codes=codes-test"]);
    assert!(said.out.contains("frequencies of these codes themselves"), "{said:?}");
    for flag in ["--split=test", "--out=x", "--data=shapes", "--train-count=3", "--precision=f32"] {
        let name = flag.split_once('=').unwrap().0;
        fail(folder, ["eval", "--model=prior", flag], &["is a prior", name, "leave it out"]);
    }

    fail(folder, ["eval", "--model=run", "--codes=codes-test"], &["--codes", "prior"]);
    fail(folder, ["eval", "--model=prior", "--bits-per-dim"], &["is a prior", "--prior"]);
}

#[test]
fn what_codes_were_made_with_is_recorded() {
    let folder = made();
    let precision = |name: &str, more: &[&str]| {
        let mut args = vec!["encode", "--model=run", "--dataset=test", "--out", name];
        args.extend(more);
        succeed(folder, args);
        let manifest = fs::read(folder.join(name).join("manifest.json")).unwrap();
        serde_json::from_slice::<Value>(&manifest).unwrap()["precision"].clone()
    };
    assert_eq!(precision("codes-bf16", &["--precision=bf16"]), "bf16");
    assert_eq!(precision("codes-f32", &["--precision=f32"]), Value::Null);
    let mixed = ["encode", "--model=run", "--dataset=test", "--out=codes-bf16"];
    fail(folder, mixed, &["codes-bf16", "precision"]);
}
