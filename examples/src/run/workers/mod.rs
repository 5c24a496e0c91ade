//! A run that several processes share.
//!
//! Every process runs the same program with the same flags, and so the same training loop; only the
//! jobs of its steps are shared. The *first* worker has the artifact folder and the terminal.
//!
//! With `--workers N` the program is a [`starter`]: it has the hub and starts N processes of
//! itself, whose part is in the environment. Elsewhere a process joins a run that a NATS server, or
//! `mpirun`, holds together.
//!
//! | file | content |
//! |---|---|
//! | [`worker`] | this process as a worker: its place, its executor, where it starts from |
//! | [`starter`] | the program that starts workers, and starts again those that are killed |
//! | [`bundle`] | a checkpoint as one piece, for workers that join late |
//! | [`offer`] | puts the checkpoint of each epoch where they find it |
//! | [`guard`] | a worker ends with its starter, and tells it what it did |
//! | [`identity`] | what all workers must have in common |
//! | [`tally`] | what the workers did, in `summary.json` and as a table |

pub mod bundle;
pub mod guard;
pub mod identity;
pub mod offer;
pub mod starter;
pub mod tally;
pub mod worker;
