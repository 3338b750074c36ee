//! What a program that depends on this crate has to compile.
#![allow(clippy::unwrap_used, reason = "a test may panic")]

use std::process::Command;

/// Data sets, HTTP, command lines and pictures are other crates' business.
const FORBIDDEN: [&str; 24] = [
    "candle-datasets",
    "candle-transformers",
    "clap",
    "curl",
    "hf-hub",
    "hyper",
    "image",
    "indicatif",
    "jpeg-decoder",
    "native-tls",
    "openssl",
    "parquet",
    "plotters",
    "png",
    "reqwest",
    "rustls",
    "signal-hook",
    "structopt",
    "tar",
    "tokio",
    "toml",
    "tracing-subscriber",
    "ureq",
    "zune-jpeg",
];

#[test]
fn the_tree_holds_no_other_vq_crate_but_vq_ops_and_no_data_set_http_or_cli_crate() {
    let output = Command::new(env!("CARGO"))
        .args(["tree", "--offline", "--locked", "-p", "vq-model", "-e", "normal"])
        .args(["--prefix", "none", "--format", "{p}"])
        .current_dir(env!("CARGO_MANIFEST_DIR"))
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    let tree = String::from_utf8(output.stdout).unwrap();
    let names: Vec<&str> = tree.lines().filter_map(|line| line.split(' ').next()).collect();
    assert!(names.contains(&"candle-core") && names.contains(&"vq-ops"), "{tree}");
    for name in names {
        assert!(!FORBIDDEN.contains(&name), "{name} is in the tree");
        assert!(!name.starts_with("vq-") || ["vq-model", "vq-ops"].contains(&name), "{name}");
    }
}
