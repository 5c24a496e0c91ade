//! What lies between a worker and its server: outages, users, credentials, TLS, slow links.

use std::collections::HashSet;
use std::fs;
use std::io::{Read, Write};
use std::net::{TcpListener, TcpStream};
use std::path::Path;
use std::process::{Command, Stdio};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use flops_distributed::{Key, Log, NatsAuth, NatsLog, NatsOptions, SumMode};
use flops_executor::Threads;

use crate::runs::{elastic, work};
use crate::server::Server;
use crate::steps::skip;
use crate::{claim, entries, fake, noise, nothing, result};

#[test]
fn a_server_that_is_killed_and_comes_back_changes_nothing() {
    let Some(mut server) = Server::with_jetstream() else { return };
    let logs = [server.log(), server.log()];
    let ended = AtomicBool::new(false);
    let (wins, downs) = thread::scope(|scope| {
        let write = |log| {
            move || {
                let size = |job| if job % 10 == 0 { 1_500_000 } else { 100 };
                let mut wins = vec![];
                for job in 0..300 {
                    thread::sleep(Duration::from_millis(5));
                    if NatsLog::put(log, &result(1, job), &noise(size(job), job as u64)).unwrap() {
                        wins.push(job);
                    }
                }
                wins
            }
        };
        let writers: Vec<_> = logs.iter().map(|log| scope.spawn(write(log))).collect();
        let ended = &ended;
        let server = &mut server;
        let killer = scope.spawn(move || {
            let mut downs = 0;
            while !ended.load(Ordering::Relaxed) && downs < 3 {
                thread::sleep(Duration::from_millis(400));
                server.kill();
                thread::sleep(Duration::from_millis(300));
                server.up();
                downs += 1;
            }
            downs
        });
        let wins: Vec<Vec<usize>> = writers.into_iter().map(|writer| writer.join().unwrap()).collect();
        ended.store(true, Ordering::Relaxed);
        (wins, killer.join().unwrap())
    });
    assert!(downs > 0);
    let mut all = wins.concat();
    all.sort_unstable();
    assert_eq!(all, (0..300).collect::<Vec<_>>(), "each entry has one writer");
    let seen = entries(&logs[0], 300);
    assert_eq!(seen.iter().map(|entry| &entry.key).collect::<HashSet<_>>().len(), 300);
    assert!(entries(&logs[1], 300) == seen && entries(&server.log(), 300) == seen);
    assert!(logs.iter().all(|log| nothing(log)));
}

#[test]
fn a_server_that_stays_away_is_lost_within_the_limit() {
    let Some(mut server) = Server::with_jetstream() else { return };
    let options = NatsOptions { limit: Duration::from_secs(2), ..server.options() };
    let log = NatsLog::connect(&options, "worker").unwrap();
    log.put(&Key::Identity, b"run").unwrap();
    entries(&log, 1);
    server.kill();
    let start = Instant::now();
    assert_eq!(log.next(Duration::from_millis(200)).unwrap(), None);
    let message = log.put(&claim(0, 0), b"").unwrap_err().to_string();
    assert!(message.contains("has not taken an entry within 2s") && message.contains(&server.url()), "{message}");
    let message = log.next(Duration::from_secs(60)).unwrap_err().to_string();
    assert!(message.contains("has been lost for 2s") && message.contains("last checkpoint"), "{message}");
    for message in [
        log.trim(5).unwrap_err().to_string(),
        log.checkpoint().unwrap_err().to_string(),
        log.put_checkpoint(1, b"").unwrap_err().to_string(),
    ] {
        assert!(message.contains("within 2s"), "{message}");
    }
    let message = NatsLog::connect(&options, "worker").unwrap_err().to_string();
    assert!(message.contains("see that it runs"), "{message}");
    assert!(start.elapsed() < Duration::from_secs(20), "{:?}", start.elapsed());
    drop(log);
}

#[test]
fn a_server_that_lost_its_store_is_told() {
    let Some(mut server) = Server::with_jetstream() else { return };
    let log = server.log();
    log.put(&Key::Identity, b"run").unwrap();
    entries(&log, 1);
    server.kill();
    fs::remove_dir_all(server.folder.path().join("store")).unwrap();
    server.up();
    let start = Instant::now();
    let message = loop {
        match log.next(Duration::from_secs(10)) {
            Ok(Some(entry)) => panic!("{entry:?}"),
            Ok(None) => assert!(start.elapsed() < Duration::from_secs(20)),
            Err(why) => break why.to_string(),
        }
    };
    assert!(message.contains("has no log of the run run-1 any more"), "{message}");
}

#[test]
fn a_user_is_let_in_and_others_are_not() {
    let config = "jetstream {}\nauthorization { users: [{ user: ann, password: open }] }";
    let Some(server) = Server::start(config) else { return };
    let user = |password: &str| NatsAuth::User { name: "ann".into(), password: password.into() };
    let options = |auth| NatsOptions { auth, ..server.options() };
    let log = NatsLog::connect(&options(user("open")), "worker").unwrap();
    assert!(log.put(&Key::Identity, b"run").unwrap());
    let start = Instant::now();
    for auth in [user("shut"), NatsAuth::None, NatsAuth::Token("open".into())] {
        let message = NatsLog::connect(&options(auth), "worker").unwrap_err().to_string();
        assert!(message.contains("authorization violation; give the token"), "{message}");
    }
    assert!(start.elapsed() < Duration::from_secs(5));
    let config = "jetstream {}\nauthorization { token: open }";
    let server = Server::start(config).unwrap();
    let options = |token: &str| NatsOptions { auth: NatsAuth::Token(token.into()), ..server.options() };
    assert!(NatsLog::connect(&options("open"), "worker").unwrap().put(&Key::Identity, b"run").unwrap());
    assert!(NatsLog::connect(&options("shut"), "worker").is_err());
}

#[test]
fn an_address_that_does_not_answer_is_passed_over() {
    let Some(server) = Server::with_jetstream() else { return };
    // one that says nothing, and one where nobody listens
    let mute = TcpListener::bind("127.0.0.1:0").unwrap();
    let absent = TcpListener::bind("127.0.0.1:0").unwrap().local_addr().unwrap();
    let addresses = [format!("nats://{}", mute.local_addr().unwrap()), format!("nats://{absent}"), server.url()];
    let options = NatsOptions { limit: Duration::from_secs(1), ..NatsOptions::new(addresses, "run-1") };
    // they are tried in any order
    let logs = [(); 5].map(|()| NatsLog::connect(&options, "worker").unwrap());
    assert!(logs[0].put(&Key::Identity, b"run").unwrap());
    assert_eq!(entries(&logs[4], 1).len(), 1);
    // alone, they are waited for up to the limit
    let alone = NatsOptions { servers: options.servers[..1].to_vec(), ..options };
    let start = Instant::now();
    let message = NatsLog::connect(&alone, "worker").unwrap_err().to_string();
    assert!(message.contains("see that it runs") && start.elapsed() < Duration::from_secs(5), "{message}");
}

#[test]
fn what_is_wrong_with_a_server_is_named() {
    let Some(server) = Server::start("max_connections: 100") else { return };
    let options = NatsOptions { limit: Duration::from_secs(1), ..server.options() };
    let message = NatsLog::connect(&options, "worker").unwrap_err().to_string();
    assert!(message.contains("nats-server -js"), "{message}");
    for (options, part) in [
        (NatsOptions { run: "a.b".into(), ..options.clone() }, "\"a.b\""),
        (NatsOptions { servers: vec!["nats://a b".into()], ..options.clone() }, "\"nats://a b\""),
    ] {
        let message = NatsLog::connect(&options, "worker").unwrap_err().to_string();
        assert!(message.contains(part), "{message}");
    }
    assert!(NatsLog::connect(&options, "a worker").unwrap_err().to_string().contains("name of the worker"));
}

/// A link that takes 5 ms in each direction, and loses one part of a hundred: as TCP then waits for its
/// retransmission, such a part comes 200 ms late, and what follows it waits. Returns its port.
fn slow_link(to: u16) -> u16 {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let port = listener.local_addr().unwrap().port();
    let carry = |mut from: TcpStream, mut to: TcpStream, seed: u64| {
        let (sender, receiver) = mpsc::channel::<(Instant, Vec<u8>)>();
        thread::spawn(move || {
            for (due, bytes) in receiver {
                thread::sleep(due.saturating_duration_since(Instant::now()));
                if to.write_all(&bytes).is_err() {
                    return;
                }
            }
        });
        thread::spawn(move || {
            let (mut buffer, mut part) = ([0; 1400], seed);
            while let Ok(read @ 1..) = from.read(&mut buffer) {
                part += 1;
                let is_lost = fake::mix(part) & 0xffff < 655;
                let delay = if is_lost { 205 } else { 5 };
                if sender.send((Instant::now() + Duration::from_millis(delay), buffer[..read].to_vec())).is_err() {
                    return;
                }
            }
        });
    };
    thread::spawn(move || {
        for (number, client) in listener.incoming().flatten().enumerate() {
            let server = TcpStream::connect(("127.0.0.1", to)).unwrap();
            client.set_nodelay(true).unwrap();
            server.set_nodelay(true).unwrap();
            carry(client.try_clone().unwrap(), server.try_clone().unwrap(), 1000 * number as u64);
            carry(server, client, 1000 * number as u64 + 500);
        }
    });
    port
}

/// One worker beside the server, two behind a slow link: the bits of one process, in every mode.
#[test]
fn workers_behind_a_slow_link_change_nothing() {
    for sum_mode in [SumMode::Gradients, SumMode::Scalars] {
        let Some(server) = Server::with_jetstream() else { return };
        let url = format!("nats://127.0.0.1:{}", slow_link(server.port));
        let far = NatsOptions { servers: vec![url], ..server.options() };
        let alone = work(&Threads, 6, 1000, None).unwrap();
        let logs = [server.log(), NatsLog::connect(&far, "far").unwrap(), NatsLog::connect(&far, "far").unwrap()];
        let hashes: Vec<u64> = thread::scope(|scope| {
            let run = |log| move || work(&elastic(log, 3, sum_mode), 6, 1000, None).unwrap();
            let running = logs.map(|log| scope.spawn(run(log)));
            running.into_iter().map(|worker| worker.join().unwrap()).collect()
        });
        assert_eq!(hashes, [alone; 3], "{sum_mode}");
    }
}

/// Base64 of URLs.
fn base64(bytes: &[u8]) -> String {
    let letters = b"ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_";
    let group = |part: &[u8]| {
        let all = part.iter().fold(0u32, |all, &byte| all << 8 | u32::from(byte)) << (8 * (3 - part.len()));
        (0..=part.len()).map(move |at| letters[(all >> (18 - 6 * at)) as usize & 63] as char).collect::<String>()
    };
    bytes.chunks(3).map(group).collect()
}

/// A claim of an issuer about a key.
fn claim_of(issuer: &nkeys::KeyPair, key: &nkeys::KeyPair, claims: &str) -> String {
    let (iss, sub) = (issuer.public_key(), key.public_key());
    let body = format!(r#"{{"jti":"x","iat":1700000000,"iss":"{iss}","sub":"{sub}","name":"x","nats":{claims}}}"#);
    let text = format!("{}.{}", base64(br#"{"typ":"JWT","alg":"ed25519-nkey"}"#), base64(body.as_bytes()));
    let signature = issuer.sign(text.as_bytes()).unwrap();
    format!("{text}.{}", base64(&signature))
}

#[test]
fn a_file_of_credentials_lets_a_user_in() {
    use nkeys::KeyPair;
    let (operator, account, system) = (KeyPair::new_operator(), KeyPair::new_account(), KeyPair::new_account());
    let (user, stranger) = (KeyPair::new_user(), KeyPair::new_user());
    let limits = "\"subs\":-1,\"data\":-1,\"payload\":-1";
    let of_account = |store: i32| {
        let more = "\"imports\":-1,\"exports\":-1,\"wildcards\":true,\"conn\":-1,\"leaf\":-1";
        let store =
            format!("\"mem_storage\":{store},\"disk_storage\":{store},\"streams\":{store},\"consumer\":{store}");
        format!(r#"{{"limits":{{{limits},{more},{store}}},"type":"account","version":2}}"#)
    };
    let of_user = format!(r#"{{{limits},"type":"user","version":2}}"#);
    let config = format!(
        "jetstream {{}}\noperator: {}\nsystem_account: {}\nresolver: MEMORY\nresolver_preload: {{ {}: {}, {}: {} }}",
        claim_of(&operator, &operator, r#"{"type":"operator","version":2}"#),
        system.public_key(),
        account.public_key(),
        claim_of(&operator, &account, &of_account(-1)),
        system.public_key(),
        claim_of(&operator, &system, &of_account(0)),
    );
    let Some(server) = Server::start(&config) else { return };
    let options = |claim: String, seed: String| {
        let path = server.folder.path().join("user.creds");
        let jwt = format!("-----BEGIN NATS USER JWT-----\n{claim}\n------END NATS USER JWT------\n");
        let seed = format!("-----BEGIN USER NKEY SEED-----\n{seed}\n------END USER NKEY SEED------\n");
        fs::write(&path, format!("{jwt}\n{seed}")).unwrap();
        NatsOptions { auth: NatsAuth::Credentials(path), ..server.options() }
    };
    let known = options(claim_of(&account, &user, &of_user), user.seed().unwrap());
    let log = NatsLog::connect(&known, "worker").unwrap();
    assert!(log.put(&Key::Identity, b"run").unwrap());
    // signed by another, and no credentials at all
    let message = |options| NatsLog::connect(&options, "worker").unwrap_err().to_string();
    let foreign = message(options(claim_of(&KeyPair::new_account(), &stranger, &of_user), stranger.seed().unwrap()));
    assert!(foreign.contains("authorization violation; give the token"), "{foreign}");
    let path = server.folder.path().join("user.creds");
    fs::write(&path, "nothing").unwrap();
    let wrong = message(NatsOptions { auth: NatsAuth::Credentials(path), ..server.options() });
    assert!(wrong.contains("user.creds") && wrong.contains("nsc generate creds"), "{wrong}");
}

/// Runs openssl in a folder. False where there is none.
fn openssl(folder: &Path, line: &str) -> bool {
    let status = Command::new("openssl").args(line.split(' ')).current_dir(folder).stderr(Stdio::null()).status();
    status.is_ok_and(|status| status.success())
}

#[test]
fn connections_are_encrypted_and_clients_show_a_certificate() {
    let files = r#"cert_file: "FOLDER/server.pem", key_file: "FOLDER/server.key", ca_file: "FOLDER/ca.pem""#;
    let config = format!("jetstream {{}}\ntls {{ {files}, verify: true }}");
    let folder = tempfile::tempdir().unwrap();
    let path = folder.path();
    fs::write(path.join("names"), "subjectAltName=IP:127.0.0.1,DNS:localhost\n").unwrap();
    let key = "-newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes";
    let authority = format!("req -x509 {key} -keyout ca.key -out ca.pem -days 2 -subj /CN=test-ca");
    let mut made = openssl(path, &authority);
    for name in ["server", "client"] {
        let request = format!("req {key} -keyout {name}.key -out {name}.csr -subj /CN={name}");
        let sign = format!(
            "x509 -req -in {name}.csr -CA ca.pem -CAkey ca.key -CAcreateserial -out {name}.pem -days 2 -extfile names"
        );
        made = made && openssl(path, &request) && openssl(path, &sign);
    }
    if !made {
        return skip("openssl");
    }
    let place = path.display().to_string();
    let Some(server) = Server::start(&config.replace("FOLDER", &place)) else { return };
    let full = NatsOptions {
        ca: Some(path.join("ca.pem")),
        client_certificate: Some((path.join("client.pem"), path.join("client.key"))),
        limit: Duration::from_secs(5),
        ..server.options()
    };
    let log = NatsLog::connect(&full, "worker").unwrap();
    let bytes = noise(2_000_000, 4);
    assert!(log.put(&result(0, 0), &bytes).unwrap());
    let late = NatsLog::connect(&full, "worker").unwrap();
    assert!(entries(&late, 1)[0].bytes == bytes);
    // without a certificate of its own, and with a server that nobody vouches for
    for options in [
        NatsOptions { client_certificate: None, ..full.clone() },
        NatsOptions { ca: Some(path.join("client.pem")), ..full.clone() },
        NatsOptions { ca: None, ..full.clone() },
    ] {
        let start = Instant::now();
        let why = NatsLog::connect(&options, "worker").unwrap_err().to_string();
        assert!(start.elapsed() < Duration::from_secs(4) && why.contains("give the file of certificates"), "{why}");
    }
}
