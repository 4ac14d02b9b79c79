//! What the tests of the RPS share. Each test file uses a part of it.
#![allow(dead_code)]

pub mod daemon;
pub mod fake;
pub mod sim;
