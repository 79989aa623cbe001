//! ebb-client.
