//! What a prior promises, from outside.
#![allow(
    clippy::unwrap_used,
    clippy::panic,
    clippy::print_stdout,
    reason = "a test may panic, and shows its figures"
)]

mod cached;
mod causality;
mod common;
mod conditioning;
mod config;
mod golden;
mod gradients;
mod learning;
mod likelihood;
mod sampling;
mod store;
