//! ebb-s3.
