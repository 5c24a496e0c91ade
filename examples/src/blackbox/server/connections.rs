//! The connections of a server: bounded in number and in memory, and closed when they are idle.

use std::convert::Infallible;
use std::sync::Arc;
use std::time::Duration;

use axum::Router;
use hyper::server::conn::http1;
use hyper_util::rt::{TokioIo, TokioTimer};
use hyper_util::service::TowerToHyperService;
use tokio::net::TcpListener;
use tokio::sync::Semaphore;

/// The most bytes of a connection's buffer; the head of a request must fit into it.
const BUFFER: usize = 64 << 10;
/// The wait after a connection that could not be accepted, as where no file is left to open.
const PAUSE: Duration = Duration::from_millis(50);

/// Serves `router` for ever, over at most `most` connections at once; others wait until one ends.
///
/// A connection is closed when no complete head of a request arrives within `idle`, neither at its
/// start nor after an answer.
pub(super) async fn accept(listener: TcpListener, router: Router, most: usize, idle: Duration) -> Infallible {
    let slots = Arc::new(Semaphore::new(most));
    loop {
        // the semaphore is never closed
        let slot = slots.clone().acquire_owned().await;
        let Ok((stream, _)) = listener.accept().await else {
            tokio::time::sleep(PAUSE).await;
            continue;
        };
        let service = TowerToHyperService::new(router.clone());
        tokio::spawn(async move {
            let mut http = http1::Builder::new();
            http.timer(TokioTimer::new()).header_read_timeout(idle).max_buf_size(BUFFER);
            // a connection that breaks off is its client's affair
            let _ = http.serve_connection(TokioIo::new(stream), service).await;
            drop(slot);
        });
    }
}
