//! Fault switches of the embedded server: what to do wrong, on which operation, how often.
