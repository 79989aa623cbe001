//! ebb-model.
