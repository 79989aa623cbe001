//! ebb-store.
