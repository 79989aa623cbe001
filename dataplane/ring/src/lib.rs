//! ebb-ring.
