//! Servers that the tests start.

use std::env;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use flops_distributed::{NatsLog, NatsOptions};

use crate::steps::skip;

/// A server with a store of its own.
pub struct Server {
    child: Option<Child>,
    pub folder: tempfile::TempDir,
    pub port: u16,
    config: String,
}

impl Server {
    /// Starts a server. None where there is no nats-server.
    pub fn start(config: &str) -> Option<Self> {
        let folder = tempfile::tempdir().unwrap();
        let port = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap().port();
        let mut server = Self { child: None, folder, port, config: config.into() };
        server.up().then_some(server)
    }

    pub fn with_jetstream() -> Option<Self> {
        Self::start("jetstream {}")
    }

    /// Starts it, or starts it again on its store.
    pub fn up(&mut self) -> bool {
        let folder = self.folder.path().display().to_string();
        let config = self.config.replace("jetstream {}", &format!("jetstream {{ store_dir: \"{folder}/store\" }}"));
        let path = self.folder.path().join("server.conf");
        fs::write(&path, config.replace("FOLDER", &folder)).unwrap();
        let mut command = Command::new("nats-server");
        command.args(["-a", "127.0.0.1", "-p", &self.port.to_string(), "-c"]).arg(path);
        let quiet = if env::var_os("FLOPS_TEST_LOUD").is_some() { Stdio::inherit() } else { Stdio::null() };
        match command.stdin(Stdio::null()).stdout(Stdio::null()).stderr(quiet).spawn() {
            Ok(child) => self.child = Some(child),
            Err(_) => {
                skip("nats-server");
                return false;
            }
        }
        let start = Instant::now();
        while TcpStream::connect(("127.0.0.1", self.port)).is_err() {
            assert!(start.elapsed() < Duration::from_secs(10), "nats-server does not start");
            thread::sleep(Duration::from_millis(10));
        }
        true
    }

    pub fn kill(&mut self) {
        if let Some(mut child) = self.child.take() {
            child.kill().unwrap();
            child.wait().unwrap();
        }
    }

    pub fn url(&self) -> String {
        format!("nats://127.0.0.1:{}", self.port)
    }

    pub fn options(&self) -> NatsOptions {
        NatsOptions { limit: Duration::from_secs(15), ..NatsOptions::new([self.url()], "run-1") }
    }

    pub fn log(&self) -> NatsLog {
        NatsLog::connect(&self.options(), "worker").unwrap()
    }

    /// Publishes as a stranger would, in the plain protocol.
    pub fn publish(&self, messages: &[(&str, &[u8])]) {
        let mut stream = TcpStream::connect(("127.0.0.1", self.port)).unwrap();
        stream.write_all(b"CONNECT {\"verbose\":false}\r\n").unwrap();
        for (subject, payload) in messages {
            stream.write_all(format!("PUB {subject} {}\r\n", payload.len()).as_bytes()).unwrap();
            stream.write_all(payload).unwrap();
            stream.write_all(b"\r\n").unwrap();
        }
        stream.write_all(b"PING\r\n").unwrap();
        let mut seen = vec![];
        while !seen.windows(4).any(|part| part == b"PONG") {
            let mut bytes = [0; 512];
            let read = stream.read(&mut bytes).unwrap();
            assert!(read > 0, "{}", String::from_utf8_lossy(&seen));
            seen.extend(&bytes[..read]);
        }
    }

    /// Bytes that the server stores.
    pub fn stored(&self) -> u64 {
        fn size(path: &Path) -> u64 {
            let Ok(all) = fs::read_dir(path) else { return 0 };
            all.flatten()
                .map(|file| {
                    if file.path().is_dir() { size(&file.path()) } else { file.metadata().map_or(0, |data| data.len()) }
                })
                .sum()
        }
        size(&self.folder.path().join("store"))
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        self.kill();
    }
}
