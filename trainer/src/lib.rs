//! stub
pub mod architecture;
