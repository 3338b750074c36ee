//! End-to-end tests of the `vq` binary live under `tests/`.
