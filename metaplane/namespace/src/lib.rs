//! ebb-namespace.
