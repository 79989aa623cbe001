//! ebb-controller.
