//! Writes entries to the log, one after another, while the worker goes on.

use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::sync::mpsc::Sender;

use bytes::Bytes;
use flops_executor::ExecutorError;
use tokio::sync::mpsc::UnboundedReceiver;

use super::reader::Queue;
use super::server::Server;

/// An entry to be written.
pub(super) struct Outgoing {
    pub subject: String,
    /// How the subjects of its parts begin.
    pub parts: String,
    pub bytes: Bytes,
    /// Who waits to learn whether it was the first.
    pub answer: Option<Sender<Result<bool, ExecutorError>>>,
}

/// Writes entries in their order until nobody can send more. An error that nobody waits for ends what
/// is read, and all that would come after it.
pub(super) async fn write(server: Arc<Server>, queue: Arc<Queue>, mut outgoing: UnboundedReceiver<Outgoing>) {
    let mut lost = None::<ExecutorError>;
    while let Some(Outgoing { subject, parts, bytes, answer }) = outgoing.recv().await {
        let written = match &lost {
            Some(why) => Err(why.clone()),
            None => server.write_and_keep(&subject, &parts, bytes).await,
        };
        server.unwritten.fetch_sub(1, Ordering::Relaxed);
        match (answer, written) {
            // it may have given up waiting
            (Some(answer), written) => drop(answer.send(written)),
            (None, Err(why)) => {
                queue.end(why.clone());
                lost = Some(why);
            }
            (None, Ok(_)) => {}
        }
    }
}
