//! ebb-metaplane.
