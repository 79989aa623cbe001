//! ebb-fuse.
