//! Tasks around the project: one module per subcommand of `cargo xtask`.

pub mod bench;
pub mod ci;
pub mod download_cifar;
pub mod gpu_check;
