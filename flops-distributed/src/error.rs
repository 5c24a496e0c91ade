//! Why a worker cannot be set up.

/// Why a worker, a hub or a connection cannot be set up.
///
/// What goes wrong later, in a round, is a [`flops_executor::ExecutorError`].
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum DistributedError {
    /// A setting with a value that it cannot have.
    #[error("{what} is {value:?}; {remedy}")]
    Setting {
        /// The setting.
        what: &'static str,
        /// Its value.
        value: String,
        /// What to give instead.
        remedy: String,
    },
    /// A server that cannot be reached, or that does not want this worker.
    #[error("{server} cannot be used: {why}; {remedy}")]
    Server {
        /// The server and its address.
        server: String,
        /// What went wrong.
        why: String,
        /// What to do about it.
        remedy: String,
    },
    /// A worker program that cannot be started, or a file that cannot be read or written.
    #[error("{what}: {why}")]
    Io {
        /// What was tried, with the path.
        what: String,
        /// What the system said.
        why: std::io::Error,
    },
}
