//! The CUDA kernels, checked without a GPU.

use std::path::Path;
use std::process::Command;

/// Their arithmetic and their indices, on the CPU: see `kernels/on_the_cpu.cpp`.
#[test]
#[cfg(target_os = "linux")]
fn the_kernels_give_what_loops_give() {
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "c++".to_owned());
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/kernels/on_the_cpu.cpp");
    let program = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels_on_the_cpu");
    let mut build = Command::new(&compiler);
    build.args(["-std=c++17", "-O1", "-o"]).arg(&program).arg(&source);
    match build.output() {
        Ok(output) => {
            assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
        }
        // A machine that only has Rust.
        Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
        Err(error) => panic!("{compiler}: {error}"),
    }
    let output = Command::new(&program).output().unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stdout));
}

/// Whether NVIDIA's compiler takes them, where there is one on the path (`cargo xtask cuda-env`).
#[test]
fn the_kernels_compile() {
    let folder = Path::new(env!("CARGO_MANIFEST_DIR")).join("src/cuda/kernels");
    let source = Path::new(env!("CARGO_TARGET_TMPDIR")).join("kernels.cu");
    let parts = ["common.cu", "layers.cu", "codebook.cu", "training.cu", "pixels.cu"];
    let text: String =
        parts.iter().map(|part| std::fs::read_to_string(folder.join(part)).unwrap()).collect();
    std::fs::write(&source, text).unwrap();
    for arch in ["compute_80", "compute_90"] {
        let mut nvcc = Command::new("nvcc");
        nvcc.arg("-ptx").arg(format!("-arch={arch}")).arg(&source).arg("-o");
        nvcc.arg(source.with_extension("ptx"));
        match nvcc.output() {
            Ok(output) => {
                assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
            }
            Err(error) if error.kind() == std::io::ErrorKind::NotFound => return,
            Err(error) => panic!("nvcc: {error}"),
        }
        check_groups(&std::fs::read_to_string(source.with_extension("ptx")).unwrap());
    }
}

/// What writes maps in groups must write each at once, and not element by element, as nvcc does where it cannot see
/// that it may.
fn check_groups(ptx: &str) {
    let mut checked = 0;
    for entry in ptx.split(".entry ").skip(1) {
        let name = entry.split('(').next().unwrap_or_default();
        let writes_maps = ["join_map", "map_part", "finish"].iter().any(|k| name.starts_with(k));
        if !writes_maps || !name.ends_with("_grouped") {
            continue;
        }
        let stores: Vec<&str> = entry
            .lines()
            .map(str::trim)
            .filter(|line| line.contains("st.global"))
            .filter(|line| !line.contains("st.global.v4"))
            .collect();
        assert!(stores.is_empty(), "{name}: {stores:?}");
        checked += 1;
    }
    assert_eq!(checked, 10);
}
