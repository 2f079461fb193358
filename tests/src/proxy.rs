//! A TCP proxy on loopback that hurts what goes through it.
//!
//! Kafka tells its clients where it listens; the proxy puts its own port in the place of the broker's,
//! so that all of a client's connections stay with it.

use std::io::{Read, Write};
use std::net::{Shutdown, TcpListener, TcpStream};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::{Arc, Condvar, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

/// What the proxy does with what goes through it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Mode {
    Pass,
    /// Connections are closed, and new ones as soon as they are made.
    Cut,
    /// Nothing moves; it goes on later.
    Stall,
    /// Everything comes so much later.
    Delay(Duration),
}

#[derive(Debug)]
struct Shared {
    upstream: String,
    port: u16,
    mode: Mutex<Mode>,
    changed: Condvar,
    open: Mutex<Vec<Arc<Connection>>>,
    made: AtomicU64,
    stopped: AtomicBool,
}

#[derive(Debug)]
struct Connection {
    ends: [TcpStream; 2],
    /// What comes is thrown away: the peer is gone and has not said so.
    dead: AtomicBool,
}

/// Stands between a client and a broker until it is dropped.
#[derive(Debug)]
pub struct Proxy {
    shared: Arc<Shared>,
}

fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

impl Proxy {
    pub fn start(upstream: &str) -> Self {
        let listener = TcpListener::bind("127.0.0.1:0").expect("a free port");
        let port = listener.local_addr().expect("bound").port();
        let shared = Arc::new(Shared {
            upstream: upstream.to_string(),
            port,
            mode: Mutex::new(Mode::Pass),
            changed: Condvar::new(),
            open: Mutex::default(),
            made: AtomicU64::new(0),
            stopped: AtomicBool::new(false),
        });
        let this = Arc::clone(&shared);
        std::thread::spawn(move || {
            for stream in listener.incoming().map_while(Result::ok) {
                if this.stopped.load(Ordering::Relaxed) {
                    return;
                }
                if *lock(&this.mode) != Mode::Cut {
                    this.connect(stream);
                }
            }
        });
        Self { shared }
    }

    pub fn address(&self) -> String {
        format!("127.0.0.1:{}", self.shared.port)
    }

    /// Connections made so far.
    pub fn connections(&self) -> u64 {
        self.shared.made.load(Ordering::Relaxed)
    }

    pub fn set(&self, mode: Mode) {
        *lock(&self.shared.mode) = mode;
        self.shared.changed.notify_all();
        if mode == Mode::Cut {
            self.shared.close_all();
        }
    }

    /// The connections there are lead nowhere from now on, and nobody is told; new ones are well.
    pub fn leave_half_open(&self) {
        for connection in lock(&self.shared.open).iter() {
            connection.dead.store(true, Ordering::Relaxed);
        }
    }
}

impl Drop for Proxy {
    fn drop(&mut self) {
        self.shared.stopped.store(true, Ordering::Relaxed);
        self.set(Mode::Cut);
        // The listener wakes and ends.
        let _ = TcpStream::connect(self.address());
    }
}

impl Shared {
    fn connect(self: &Arc<Self>, client: TcpStream) {
        let Ok(broker) = TcpStream::connect(&self.upstream) else {
            return;
        };
        let (Ok(a), Ok(b)) = (client.try_clone(), broker.try_clone()) else {
            return;
        };
        let connection = Arc::new(Connection {
            ends: [a, b],
            dead: AtomicBool::new(false),
        });
        self.made.fetch_add(1, Ordering::Relaxed);
        lock(&self.open).push(Arc::clone(&connection));
        let (Ok(from_client), Ok(from_broker)) = (client.try_clone(), broker.try_clone()) else {
            return;
        };
        let (this, that) = (Arc::clone(self), Arc::clone(self));
        let other = Arc::clone(&connection);
        std::thread::spawn(move || this.pump(from_client, broker, &connection, false));
        std::thread::spawn(move || that.pump(from_broker, client, &other, true));
    }

    fn close_all(&self) {
        for connection in lock(&self.open).drain(..) {
            for end in &connection.ends {
                let _ = end.shutdown(Shutdown::Both);
            }
        }
    }

    /// Waits as long as the mode says.
    fn hold(&self) {
        let mut mode = lock(&self.mode);
        while *mode == Mode::Stall {
            mode = self
                .changed
                .wait(mode)
                .unwrap_or_else(PoisonError::into_inner);
        }
        if let Mode::Delay(time) = *mode {
            drop(mode);
            std::thread::sleep(time);
        }
    }

    fn pump(&self, mut from: TcpStream, mut to: TcpStream, connection: &Connection, answer: bool) {
        let mut places = answer.then(|| Places::new(&self.upstream, self.port));
        let mut buffer = vec![0; 64 << 10];
        while let Ok(length @ 1..) = from.read(&mut buffer) {
            self.hold();
            if connection.dead.load(Ordering::Relaxed) {
                continue;
            }
            let passed = match &mut places {
                Some(places) => to.write_all(&places.replace(&buffer[..length])),
                None => to.write_all(&buffer[..length]),
            };
            if passed.is_err() {
                break;
            }
        }
        for end in &connection.ends {
            let _ = end.shutdown(Shutdown::Both);
        }
    }
}

/// Puts one port in the place of another where a host goes before it.
struct Places {
    wanted: Vec<u8>,
    put: Vec<u8>,
    /// The end of what came, if the place may go on behind it.
    kept: Vec<u8>,
}

impl Places {
    fn new(upstream: &str, port: u16) -> Self {
        let (host, upstream) = upstream.rsplit_once(':').expect("host and port");
        let place = |port: u32| [host.as_bytes(), &port.to_be_bytes()].concat();
        Self {
            wanted: place(upstream.parse().expect("a port")),
            put: place(u32::from(port)),
            kept: Vec::new(),
        }
    }

    fn replace(&mut self, bytes: &[u8]) -> Vec<u8> {
        let mut all = std::mem::take(&mut self.kept);
        all.extend_from_slice(bytes);
        let length = self.wanted.len();
        let mut at = 0;
        while at + length <= all.len() {
            if all[at..at + length] == self.wanted {
                all[at..at + length].copy_from_slice(&self.put);
                at += length;
            } else {
                at += 1;
            }
        }
        let most = (length - 1).min(all.len());
        let open = (1..=most).rev().find(|n| all.ends_with(&self.wanted[..*n]));
        self.kept = all.split_off(all.len() - open.unwrap_or(0));
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_port_is_replaced_wherever_the_stream_is_cut() {
        let place = |port: u32| [b"127.0.0.1".as_slice(), &port.to_be_bytes()].concat();
        let stream = |port| [b"127.0".to_vec(), place(port), b"..".to_vec(), place(port)].concat();
        let (from, to) = (stream(9_092), [stream(7).as_slice(), b"."].concat());
        for cut in 0..from.len() {
            let mut places = Places::new("127.0.0.1:9092", 7);
            let mut out = places.replace(&from[..cut]);
            out.extend(places.replace(&from[cut..]));
            out.extend(places.replace(b"."));
            assert_eq!(out, to, "cut at {cut}");
        }
    }
}
