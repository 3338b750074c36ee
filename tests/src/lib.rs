//! End-to-end tests of the `vq` binary; see `tests/e2e`.
