//! ebb-dataplane.
