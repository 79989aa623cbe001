//! ebb-bench.
