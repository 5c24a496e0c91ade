//! A classifier as a black box: another process, asked over HTTP.

pub mod budget;
mod charge_log;
pub mod classes;
mod scorer;
pub mod server;
pub mod server_process;
