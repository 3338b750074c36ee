//! Tasks around the project: one module per subcommand of `cargo xtask`.

pub mod download_cifar;
