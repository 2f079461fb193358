//! `millrace serve` as a child process, with the means to hurt it.

use std::fs::File;
use std::io::{BufRead, BufReader};
use std::path::{Path, PathBuf};
use std::process::{Child, Command, ExitStatus, Stdio};
use std::sync::mpsc;
use std::time::{Duration, Instant};

use serde_json::{Value, json};
use tempfile::TempDir;

use crate::http::{self, Response};
use crate::wait;

/// A start includes the restore of everything.
const START: Duration = Duration::from_secs(120);
const STOP: Duration = Duration::from_secs(120);

/// A server, stopped (by force) when dropped.
#[derive(Debug)]
pub struct Server {
    /// `127.0.0.1:port`; changes with [`Server::start_again`].
    pub address: String,
    dir: Place,
    process: Option<Child>,
    flags: Vec<String>,
}

/// Where a server keeps what it keeps.
#[derive(Debug)]
enum Place {
    /// Gone when dropped.
    Own(TempDir),
    Given(PathBuf),
}

impl Place {
    fn path(&self) -> &Path {
        match self {
            Self::Own(dir) => dir.path(),
            Self::Given(path) => path,
        }
    }
}

/// The binary beside the test binaries of this build; `MILLRACE_TEST_BINARY` names another.
pub fn binary() -> PathBuf {
    if let Some(path) = std::env::var_os("MILLRACE_TEST_BINARY") {
        return PathBuf::from(path);
    }
    let this = std::env::current_exe().expect("a test knows its own path");
    // target/debug/deps/<test> -> target/debug/millrace
    let path = this
        .ancestors()
        .nth(2)
        .expect("two folders up")
        .join("millrace");
    assert!(
        path.exists(),
        "{} is missing: run `cargo build --workspace` first",
        path.display()
    );
    path
}

impl Server {
    /// A server with an empty data directory.
    pub fn start(flags: &[&str]) -> Self {
        let mut server = Self::prepare(flags);
        server.start_again(&[]);
        server
    }

    /// A data directory for a server that is started later.
    pub fn prepare(flags: &[&str]) -> Self {
        let dir = tempfile::Builder::new()
            .prefix("millrace-")
            .tempdir()
            .expect("a temporary folder");
        Self {
            address: String::new(),
            dir: Place::Own(dir),
            process: None,
            flags: flags.iter().map(|flag| (*flag).to_string()).collect(),
        }
    }

    /// A server whose data lies below a given folder, which stays.
    pub fn prepare_at(place: &Path, flags: &[&str]) -> Self {
        Self {
            address: String::new(),
            dir: Place::Given(place.to_path_buf()),
            process: None,
            flags: flags.iter().map(|flag| (*flag).to_string()).collect(),
        }
    }

    /// Starts the process on the same data directory and waits until everything is restored.
    pub fn start_again(&mut self, env: &[(&str, &str)]) {
        self.try_start(env).unwrap_or_else(|status| {
            panic!(
                "the server ended with {status} while starting\n{}",
                self.log_tail()
            )
        });
    }

    /// As [`Server::start_again`]; an `Err` holds the status of a process that ended instead.
    pub fn try_start(&mut self, env: &[(&str, &str)]) -> Result<(), ExitStatus> {
        let lines = self.begin(env);
        self.wait_ready(&lines)
    }

    /// Waits until a server that was begun is ready.
    pub fn ready(&mut self, lines: &mpsc::Receiver<String>) {
        self.wait_ready(lines)
            .unwrap_or_else(|status| panic!("ended with {status}\n{}", self.log_tail()));
    }

    fn wait_ready(&mut self, lines: &mpsc::Receiver<String>) -> Result<(), ExitStatus> {
        let started = Instant::now();
        loop {
            match lines.recv_timeout(Duration::from_millis(50)) {
                Ok(line) => {
                    if let Some(at) = line.find("http://") {
                        self.address = line[at + 7..].trim().to_string();
                        return Ok(());
                    }
                }
                Err(mpsc::RecvTimeoutError::Timeout | mpsc::RecvTimeoutError::Disconnected) => {
                    if let Some(status) = self.exited() {
                        self.process = None;
                        return Err(status);
                    }
                    assert!(
                        started.elapsed() < START,
                        "the server is not ready after {START:?}\n{}",
                        self.log_tail()
                    );
                }
            }
        }
    }

    /// Starts the process on the same data directory; gives the lines it prints.
    pub fn begin(&mut self, env: &[(&str, &str)]) -> mpsc::Receiver<String> {
        assert!(self.process.is_none(), "the server is running");
        let log = File::options()
            .create(true)
            .append(true)
            .open(self.log())
            .expect("a log file");
        let mut child = Command::new(binary())
            .arg("serve")
            .args(["--http", "127.0.0.1:0", "--data-dir"])
            .arg(self.data_dir())
            .args(&self.flags)
            .envs(env.iter().copied())
            .stdin(Stdio::null())
            .stdout(Stdio::piped())
            .stderr(log)
            .spawn()
            .expect("the binary starts");
        let lines = lines_of(&mut child);
        self.process = Some(child);
        lines
    }

    /// The status of a process that has ended by itself.
    pub fn exited(&mut self) -> Option<ExitStatus> {
        self.process
            .as_mut()?
            .try_wait()
            .expect("a child can be asked")
    }

    pub fn data_dir(&self) -> PathBuf {
        self.dir.path().join("data")
    }

    /// A folder of the test's own that lives as long as the server.
    pub fn scratch(&self) -> &Path {
        self.dir.path()
    }

    fn log(&self) -> PathBuf {
        self.dir.path().join("server.log")
    }

    /// Everything logged since the data directory was made.
    pub fn log_text(&self) -> String {
        std::fs::read_to_string(self.log()).unwrap_or_default()
    }

    /// The last lines of the log.
    pub fn log_tail(&self) -> String {
        let text = self.log_text();
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(40)..].join("\n")
    }

    // ---- processes ----

    /// Process id of the parent that holds the socket.
    pub fn parent_pid(&self) -> i32 {
        self.process.as_ref().map_or(0, |child| child.id() as i32)
    }

    /// Process id of the service, if it lives at this moment.
    pub fn child_pid(&self) -> Option<i32> {
        let parent = self.parent_pid();
        let path = format!("/proc/{parent}/task/{parent}/children");
        let children = std::fs::read_to_string(path).ok()?;
        children.split_whitespace().next()?.parse().ok()
    }

    /// Process ids of the worker processes that live at this moment.
    pub fn worker_pids(&self) -> Vec<i32> {
        let Some(child) = self.child_pid() else {
            return Vec::new();
        };
        let tasks = std::fs::read_dir(format!("/proc/{child}/task")).into_iter();
        // Each is a child of the thread that watches it.
        let children = tasks
            .flatten()
            .flatten()
            .filter_map(|task| std::fs::read_to_string(task.path().join("children")).ok());
        let mut pids: Vec<i32> = children
            .flat_map(|text| {
                let pids = text.split_whitespace().filter_map(|pid| pid.parse().ok());
                pids.collect::<Vec<_>>()
            })
            .collect();
        pids.sort_unstable();
        pids
    }

    /// SIGKILL to a worker process: the service ends with it and is started again.
    pub fn kill_worker(&self) {
        self.hurt_worker(libc::SIGKILL);
    }

    /// SIGSTOP to a worker process: its silence is noticed, and the same happens.
    pub fn stop_worker(&self) {
        self.hurt_worker(libc::SIGSTOP);
    }

    fn hurt_worker(&self, how: libc::c_int) {
        let (child, worker) = wait::until("a worker process to hurt", START, || {
            match (self.child_pid(), self.worker_pids().pop()) {
                (Some(child), Some(worker)) => Ok((child, worker)),
                other => Err(format!("{other:?}")),
            }
        });
        signal(worker, how);
        wait::until("the end of the incarnation", STOP, || {
            if self.child_pid() == Some(child) || alive(worker) {
                Err(format!("{child} or {worker} lives"))
            } else {
                Ok(())
            }
        });
    }

    /// SIGKILL to the service only; the parent starts it again.
    pub fn kill_child(&self) {
        let pid = wait::until("a child to kill", START, || {
            self.child_pid().ok_or("none".into())
        });
        signal(pid, libc::SIGKILL);
        wait::until("the child's end", STOP, || {
            if self.child_pid() == Some(pid) {
                Err(format!("{pid} lives"))
            } else {
                Ok(())
            }
        });
    }

    /// SIGKILL to the parent; the service dies with it.
    pub fn kill(&mut self) {
        let pids: Vec<i32> = self
            .child_pid()
            .into_iter()
            .chain(self.worker_pids())
            .collect();
        if let Some(mut process) = self.process.take() {
            signal(process.id() as i32, libc::SIGKILL);
            process.wait().expect("a child can be waited for");
        }
        for pid in pids {
            wait::until("the service to die with its parent", STOP, || {
                if alive(pid) {
                    Err(format!("{pid} lives"))
                } else {
                    Ok(())
                }
            });
        }
    }

    /// SIGSTOP to the running server, another one takes over its data, and the first one wakes again:
    /// it must find itself fenced and end.
    pub fn outlive_by_another(&mut self, asleep: Duration) {
        // A service that is only being started would take over in its turn.
        let child = wait::until("a service that is ready", START, || {
            match (self.get("/readyz").status, self.child_pid()) {
                (200, Some(pid)) => Ok(Some(pid)),
                other => Err(format!("{other:?}")),
            }
        });
        let mut old = self.process.take().expect("the server is running");
        let pids = [Some(old.id() as i32), child];
        let all = |what| pids.iter().flatten().for_each(|pid| signal(*pid, what));
        all(libc::SIGSTOP);
        self.start_again(&[]);
        // Time in which the new one commits; nothing waits for this.
        std::thread::sleep(asleep);
        all(libc::SIGCONT);
        wait::until("the fenced server to end", START, || {
            match old.try_wait().expect("a child can be asked") {
                Some(_) => Ok(()),
                None => Err("it goes on".to_string()),
            }
        });
    }

    /// SIGTERM, and how it ended.
    pub fn terminate(&mut self) -> ExitStatus {
        let mut process = self.process.take().expect("the server is running");
        signal(process.id() as i32, libc::SIGTERM);
        let started = Instant::now();
        loop {
            if let Some(status) = process.try_wait().expect("a child can be asked") {
                return status;
            }
            if started.elapsed() > STOP {
                let tail = self.log_tail();
                self.process = Some(process);
                panic!("the server did not stop within {STOP:?}\n{tail}");
            }
            std::thread::sleep(Duration::from_millis(10));
        }
    }

    // ---- requests ----

    /// A connection that the service had accepted when it ended gets no answer.
    pub fn try_get(&self, path: &str) -> std::io::Result<Response> {
        http::request(&self.address, "GET", path, &[], b"")
    }

    pub fn get(&self, path: &str) -> Response {
        self.try_get(path)
            .unwrap_or_else(|e| panic!("GET {path}: {e}\n{}", self.log_tail()))
    }

    pub fn post_sql(&self, body: &Value, headers: &[(&str, &str)]) -> Response {
        let mut all = vec![("Content-Type", "application/json")];
        all.extend_from_slice(headers);
        http::request(
            &self.address,
            "POST",
            "/api/v1/sql",
            &all,
            body.to_string().as_bytes(),
        )
        .unwrap_or_else(|e| panic!("POST {body}: {e}\n{}", self.log_tail()))
    }

    /// Runs a script; its answer, whatever it is.
    pub fn sql(&self, script: &str) -> Value {
        self.post_sql(&json!({ "sql": script }), &[]).json()
    }

    /// Runs a script that must succeed.
    pub fn run(&self, script: &str) -> Value {
        let answer = self.sql(script);
        assert!(
            answer["error"].is_null(),
            "{script}\nfailed: {}",
            answer["error"]
        );
        answer
    }

    /// Rows of the last statement of a script that must succeed.
    pub fn rows(&self, script: &str) -> Vec<Value> {
        let answer = self.run(script);
        let last = answer["results"]
            .as_array()
            .and_then(|results| results.last());
        last.and_then(|result| result["rows"].as_array())
            .cloned()
            .unwrap_or_default()
    }

    /// The error of a script that must fail.
    pub fn error(&self, script: &str) -> Value {
        let answer = self.sql(script);
        assert!(
            !answer["error"].is_null(),
            "{script}\nshould fail, but gave {answer}"
        );
        answer["error"].clone()
    }

    /// What runs: `views`, `sources`, `sinks` or `jobs`.
    pub fn list(&self, resource: &str) -> Vec<Value> {
        self.try_list(resource)
            .unwrap_or_else(|seen| panic!("GET {resource}: {seen}"))
    }

    /// As [`Server::list`]; an `Err` is what a service says that is still starting.
    pub fn try_list(&self, resource: &str) -> Result<Vec<Value>, String> {
        let answer = self
            .try_get(&format!("/api/v1/{resource}"))
            .map_err(|e| e.to_string())?;
        if answer.status != 200 {
            return Err(answer.text());
        }
        Ok(answer.json()[resource]
            .as_array()
            .cloned()
            .unwrap_or_default())
    }

    /// One of them.
    pub fn one(&self, resource: &str, name: &str) -> Option<Value> {
        self.list(resource)
            .into_iter()
            .find(|row| row["name"] == name)
    }

    // ---- conditions ----

    /// Waits until the sources have delivered everything and all views have applied it.
    pub fn caught_up(&self, sources: &[Fed<'_>], limit: Duration) {
        let target = wait::until("the sources to be read", limit, || {
            let rows = self.try_list("sources")?;
            let mut frontier = 0;
            for fed in sources {
                let row = rows.iter().find(|row| row["name"] == fed.name());
                let row = row.ok_or_else(|| format!("no source {}", fed.name()))?;
                if !fed.is_read(row) {
                    return Err(format!(
                        "{} in state {} at {}",
                        row["name"], row["state"], row["offsets"]
                    ));
                }
                frontier = frontier.max(row["frontier"].as_u64().unwrap_or(u64::MAX));
            }
            Ok(frontier)
        });
        self.views_at(target, limit);
    }

    /// Waits until all materialized views have completed everything below a tick.
    pub fn views_at(&self, target: u64, limit: Duration) {
        wait::until("the views to catch up", limit, || {
            for row in self.try_list("views")? {
                let frontier = row["frontier"].as_u64();
                if row["kind"] == "view" || (row["state"] == "running" && frontier >= Some(target))
                {
                    continue;
                }
                return Err(format!(
                    "{} {} at {frontier:?}, wanted {target}",
                    row["name"], row["state"]
                ));
            }
            Ok(())
        });
    }

    /// Waits until a sink has committed everything below a tick.
    pub fn committed(&self, sink: &str, target: u64, limit: Duration) {
        wait::until("a commit", limit, || {
            let rows = self.try_list("sinks")?;
            let row = rows
                .iter()
                .find(|row| row["name"] == sink)
                .ok_or("no such sink")?;
            match row["committed"].as_u64() {
                Some(tick) if tick >= target => Ok(()),
                _ => Err(format!(
                    "{sink} {} at {}: {}",
                    row["state"], row["committed"], row["last_error"]
                )),
            }
        });
    }
}

impl Drop for Server {
    fn drop(&mut self) {
        if std::thread::panicking() {
            eprintln!("---- server log ----\n{}", self.log_tail());
        }
        if let Some(mut process) = self.process.take() {
            // The service dies with its parent.
            signal(process.id() as i32, libc::SIGKILL);
            let _ = process.wait();
        }
    }
}

/// How far a source must have been read.
#[derive(Debug, Clone, Copy)]
pub enum Fed<'a> {
    /// A bounded source, to its end.
    Ended(&'a str),
    /// Records over all splits.
    Records(&'a str, u64),
}

impl Fed<'_> {
    fn name(&self) -> &str {
        match self {
            Self::Ended(name) | Self::Records(name, _) => name,
        }
    }

    fn is_read(&self, row: &Value) -> bool {
        match self {
            Self::Ended(_) => row["state"] == "finished",
            Self::Records(_, count) => offsets(row) >= *count,
        }
    }
}

/// Offsets of a source, added up over its splits.
pub fn offsets(row: &Value) -> u64 {
    let splits = row["offsets"].as_object();
    splits.map_or(0, |splits| splits.values().filter_map(Value::as_u64).sum())
}

fn lines_of(child: &mut Child) -> mpsc::Receiver<String> {
    let stdout = child.stdout.take().expect("stdout is piped");
    let (send, receive) = mpsc::channel();
    // Reads to the end, so that the server never blocks on a full pipe.
    std::thread::spawn(move || {
        for line in BufReader::new(stdout).lines().map_while(Result::ok) {
            if send.send(line).is_err() {
                continue;
            }
        }
    });
    receive
}

fn signal(pid: i32, signal: libc::c_int) {
    if pid > 0 {
        // SAFETY: a plain system call on a process that this test started.
        unsafe { libc::kill(pid, signal) };
    }
}

/// The process exists and is not only waiting to be reaped.
fn alive(pid: i32) -> bool {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    stat.rsplit_once(')')
        .is_some_and(|(_, rest)| !rest.trim_start().starts_with(['Z', 'X']))
}
