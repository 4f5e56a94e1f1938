//! The translator: guest code becomes host code for the same instruction set.

pub mod code_memory;
