//! ebb-rpc.
