//! The compiler of kernels ("libnvrtc"): nvcc, which gives the same PTX.

use std::collections::hash_map::DefaultHasher;
use std::ffi::{CStr, c_char, c_int};
use std::hash::{Hash, Hasher};
use std::path::PathBuf;
use std::process::Command;

use crate::driver::{create, destroy};
use crate::queue::say;

/// A source, what became of it, and what was said.
struct Program {
    source: String,
    ptx: Vec<u8>,
    log: Vec<u8>,
}

const COMPILATION: u32 = 6;

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCreateProgram(
    program: *mut *mut Program,
    source: *const c_char,
    _name: *const c_char,
    _headers: c_int,
    _header_texts: *const *const c_char,
    _header_names: *const *const c_char,
) -> u32 {
    // SAFETY: a text that ends.
    let source = unsafe { CStr::from_ptr(source) }.to_string_lossy().into_owned();
    unsafe { create(program, Program { source, ptx: Vec::new(), log: vec![0] }) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcDestroyProgram(program: *mut *mut Program) -> u32 {
    unsafe { destroy(*program) }
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcCompileProgram(
    program: *mut Program,
    count: c_int,
    options: *const *const c_char,
) -> u32 {
    let program = unsafe { &mut *program };
    // SAFETY: as many texts that end.
    let option = |i| unsafe { CStr::from_ptr(*options.add(i)) }.to_string_lossy().into_owned();
    let options: Vec<String> = (0..count as usize).map(option).collect();
    match compile(&program.source, &options) {
        Ok(ptx) => {
            program.ptx = ptx;
            program.ptx.push(0);
            0
        }
        Err(why) => {
            say(&why);
            program.log = why.into_bytes();
            program.log.push(0);
            COMPILATION
        }
    }
}

/// What nvcc makes of it, or made of it before.
fn compile(source: &str, options: &[String]) -> Result<Vec<u8>, String> {
    let mut hasher = DefaultHasher::new();
    (source, options).hash(&mut hasher);
    let folder: PathBuf = std::env::temp_dir().join("cuda-simulator");
    std::fs::create_dir_all(&folder).map_err(|error| format!("{}: {error}", folder.display()))?;
    let ready = folder.join(format!("{:016x}.ptx", hasher.finish()));
    if let Ok(ptx) = std::fs::read(&ready) {
        return Ok(ptx);
    }
    let name = format!("{:016x}-{}", hasher.finish(), std::process::id());
    let (from, to) =
        (folder.join(&name).with_extension("cu"), folder.join(&name).with_extension("ptx"));
    std::fs::write(&from, source).map_err(|error| format!("{}: {error}", from.display()))?;
    let compiled =
        Command::new("nvcc").arg("-ptx").args(options).arg(&from).arg("-o").arg(&to).output();
    let _ = std::fs::remove_file(&from);
    let output =
        compiled.map_err(|error| format!("nvcc: {error} (the kernels are compiled by it)"))?;
    if !output.status.success() {
        return Err(String::from_utf8_lossy(&output.stderr).into_owned());
    }
    // At once, for whoever else looks for it.
    std::fs::rename(&to, &ready).map_err(|error| format!("{}: {error}", to.display()))?;
    std::fs::read(&ready).map_err(|error| format!("{}: {error}", ready.display()))
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetPTXSize(program: *const Program, size: *mut usize) -> u32 {
    unsafe { size.write((*program).ptx.len()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetPTX(program: *const Program, to: *mut c_char) -> u32 {
    let ptx = unsafe { &(*program).ptx };
    // SAFETY: the caller has asked for the size.
    unsafe { to.copy_from_nonoverlapping(ptx.as_ptr().cast(), ptx.len()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLogSize(program: *const Program, size: *mut usize) -> u32 {
    unsafe { size.write((*program).log.len()) };
    0
}

#[unsafe(no_mangle)]
unsafe extern "C" fn nvrtcGetProgramLog(program: *const Program, to: *mut c_char) -> u32 {
    let log = unsafe { &(*program).log };
    // SAFETY: the caller has asked for the size.
    unsafe { to.copy_from_nonoverlapping(log.as_ptr().cast(), log.len()) };
    0
}
