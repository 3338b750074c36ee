//! That there is a test of the binary here makes `cargo test --workspace` build it, for the end-to-end
//! tests in the package vq-tests.

use std::process::Command;

#[test]
fn help_names_every_command_and_flag() {
    let help = |args: &[&str]| {
        let output = Command::new(env!("CARGO_BIN_EXE_vq")).args(args).output().unwrap();
        assert!(output.status.success());
        String::from_utf8(output.stdout).unwrap()
    };
    let all = help(&["--help"]);
    for command in [
        "train",
        "compare",
        "eval",
        "reconstruct",
        "encode",
        "decode",
        "train-prior",
        "sample",
        "compress",
        "decompress",
        "inspect",
        "configs",
        "data",
    ] {
        assert!(all.contains(command), "{all}");
        assert!(help(&[command, "--help"]).contains("Usage"), "{command}");
    }
    let train = help(&["train", "--help"]);
    for flag in [
        "--config",
        "--set",
        "--epochs",
        "--batch-size",
        "--lr",
        "--seed",
        "--out",
        "--resume",
        "--overwrite",
        "--data",
        "--data-dir",
        "--on-broken",
        "--device",
        "--threads",
        "--log-format",
    ] {
        assert!(
            train.contains(&format!("{flag} ")) || train.contains(&format!("{flag}\n")),
            "{flag}"
        );
    }
}
