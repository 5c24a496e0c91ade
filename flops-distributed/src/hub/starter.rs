//! Workers on this machine, as processes of the program that has the hub.

use std::process::{Child, Command, ExitStatus};

use super::Hub;
use crate::DistributedError;

/// A hub and the processes of its workers. Those that still run are killed when it is dropped.
#[derive(Debug)]
pub struct Starter {
    hub: Hub,
    workers: Vec<Child>,
}

impl Starter {
    /// Starts workers: `command` gives the program of each, and the environment of the hub is added.
    ///
    /// # Errors
    /// Where one of them cannot be started; none runs then.
    pub fn start(
        hub: Hub,
        workers: usize,
        mut command: impl FnMut(usize) -> Command,
    ) -> Result<Self, DistributedError> {
        let mut all = Self { hub, workers: vec![] };
        for index in 0..workers {
            let mut command = command(index);
            let child = command.envs(all.hub.environment()).spawn();
            all.workers.push(child.map_err(|why| {
                let what = format!("worker {index}, {}, cannot be started", command.get_program().display());
                DistributedError::Io { what, why }
            })?);
        }
        Ok(all)
    }

    /// The hub.
    pub fn hub(&self) -> &Hub {
        &self.hub
    }

    /// Waits until all workers have ended, and returns how each did. A run goes on as long as one of
    /// them does.
    ///
    /// # Errors
    /// Where the system does not tell.
    pub fn wait(&mut self) -> Result<Vec<ExitStatus>, DistributedError> {
        let failed = |why| DistributedError::Io { what: "a worker cannot be waited for".into(), why };
        self.workers.iter_mut().map(|worker| worker.wait().map_err(failed)).collect()
    }
}

impl Drop for Starter {
    fn drop(&mut self) {
        for worker in &mut self.workers {
            let _ = worker.kill();
            let _ = worker.wait();
        }
    }
}
