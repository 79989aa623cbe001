//! ebb-metaplane-protocol.
