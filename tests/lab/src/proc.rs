//! Processes of the lab: commands that are waited for, and children that live as long as their handle.

use crate::error::{Error, IoContext, Result};
use crate::{clock, run};
use nix::sys::signal::{Signal, kill};
use nix::unistd::Pid;
use std::ffi::{OsStr, OsString};
use std::fs::File;
use std::io::Read;
use std::path::{Path, PathBuf};
use std::process::{Child, ChildStdin, ChildStdout, Command, ExitStatus, Stdio};
use std::time::Duration;

/// A command to be run, perhaps in a namespace. The helpers in front of it (`ip netns exec`, `chrt`,
/// `setpriv`, `sh`) all replace themselves, so that the child's process id is the program's own.
#[derive(Clone, Debug)]
pub struct Cmd {
    program: OsString,
    args: Vec<OsString>,
    envs: Vec<(OsString, OsString)>,
    ns: Option<String>,
    private_run: Option<PathBuf>,
    fifo: Option<u8>,
    nice: Option<i8>,
    registered: bool,
}

/// What a finished command left.
#[derive(Clone, Debug)]
pub struct Finished {
    /// Its exit status.
    pub status: ExitStatus,
    /// Standard output.
    pub stdout: String,
    /// Standard error.
    pub stderr: String,
}

impl Cmd {
    /// A command that runs `program`.
    pub fn new(program: impl AsRef<OsStr>) -> Self {
        Cmd {
            program: program.as_ref().to_owned(),
            args: Vec::new(),
            envs: Vec::new(),
            ns: None,
            private_run: None,
            fifo: None,
            nice: None,
            registered: true,
        }
    }

    /// Adds one argument.
    pub fn arg(mut self, arg: impl AsRef<OsStr>) -> Self {
        self.args.push(arg.as_ref().to_owned());
        self
    }

    /// Adds arguments.
    pub fn args<S: AsRef<OsStr>>(mut self, args: impl IntoIterator<Item = S>) -> Self {
        self.args.extend(args.into_iter().map(|arg| arg.as_ref().to_owned()));
        self
    }

    /// Sets an environment variable.
    pub fn env(mut self, key: &str, value: impl AsRef<OsStr>) -> Self {
        self.envs.push((key.into(), value.as_ref().to_owned()));
        self
    }

    /// Runs inside the namespace of this full name.
    pub fn in_ns(mut self, name: &str) -> Self {
        self.ns = Some(name.to_owned());
        self
    }

    /// Gives the program `dir` as its `/run`. Needs a namespace (which brings a mount namespace along).
    pub fn private_run(mut self, dir: &Path) -> Self {
        self.private_run = Some(dir.to_owned());
        self
    }

    /// Runs under SCHED_FIFO at this priority: for probes, whose clocks must tick on a loaded machine.
    pub fn fifo(mut self, priority: u8) -> Self {
        self.fifo = Some(priority);
        self
    }

    /// Runs with this niceness.
    pub fn nice(mut self, nice: i8) -> Self {
        self.nice = Some(nice);
        self
    }

    /// Not ended with the run: for the commands that end it.
    pub(crate) fn unregistered(mut self) -> Self {
        self.registered = false;
        self
    }

    /// The command line, for messages.
    pub fn line(&self) -> String {
        let mut line = self.program.to_string_lossy().into_owned();
        for arg in &self.args {
            line.push(' ');
            line.push_str(&arg.to_string_lossy());
        }
        match &self.ns {
            Some(ns) => format!("[{ns}] {line}"),
            None => line,
        }
    }

    fn command(&self) -> Command {
        let mut words: Vec<OsString> = Vec::new();
        let mut push = |list: &[&str]| words.extend(list.iter().map(OsString::from));
        if let Some(ns) = &self.ns {
            push(&["ip", "netns", "exec", ns]);
        }
        if let Some(priority) = self.fifo {
            push(&["chrt", "-f", &priority.to_string()]);
        }
        if let Some(nice) = self.nice {
            push(&["nice", "-n", &nice.to_string()]);
        }
        // Should the lab be killed, its children go with it.
        push(&["setpriv", "--pdeathsig", "KILL"]);
        if let Some(dir) = &self.private_run {
            push(&["sh", "-c", "mount --bind \"$0\" /run && exec \"$@\"", &dir.to_string_lossy()]);
        }
        words.push(self.program.clone());
        words.extend(self.args.iter().cloned());
        let mut words = words.into_iter();
        let mut command = Command::new(words.next().unwrap_or_default());
        command.args(words);
        command.envs(self.envs.iter().map(|(key, value)| (key, value)));
        command
    }

    fn start(&self, command: &mut Command) -> Result<Child> {
        let what = format!("start `{}`", self.line());
        if self.registered {
            run::spawn_registered(|| command.spawn()).doing(what)
        } else {
            command.spawn().doing(what)
        }
    }

    /// Runs to the end and returns what it left, whatever its exit status. Killed after `within`.
    pub fn finish(&self, within: Duration) -> Result<Finished> {
        self.finish_with(None, within)
    }

    /// Like [`Cmd::finish`], with `input` on standard input.
    pub fn finish_with(&self, input: Option<&str>, within: Duration) -> Result<Finished> {
        let mut command = self.command();
        command.stdin(if input.is_some() { Stdio::piped() } else { Stdio::null() });
        command.stdout(Stdio::piped()).stderr(Stdio::piped());
        let mut child = self.start(&mut command)?;
        let pid = child.id();
        let stdout = child.stdout.take().map(read_in_thread);
        let stderr = child.stderr.take().map(read_in_thread);
        if let (Some(mut stdin), Some(text)) = (child.stdin.take(), input) {
            use std::io::Write;
            // A program that exits early closes the pipe; its exit status tells why.
            let _ = stdin.write_all(text.as_bytes());
        }
        let status = wait_for(&mut child, within);
        if status.is_none() {
            let _ = child.kill();
            let _ = child.wait();
        }
        if self.registered {
            run::forget(pid);
        }
        let Some(status) = status else {
            return Err(Error::Timeout {
                what: format!("`{}` to end", self.line()),
                seconds: within.as_secs_f64(),
                hint: String::new(),
            });
        };
        Ok(Finished { status, stdout: text_of(stdout), stderr: text_of(stderr) })
    }

    /// Runs to the end; fails unless it succeeds. Returns standard output.
    pub fn run(&self, within: Duration) -> Result<String> {
        self.run_with(None, within)
    }

    /// Like [`Cmd::run`], with `input` on standard input.
    pub fn run_with(&self, input: Option<&str>, within: Duration) -> Result<String> {
        let finished = self.finish_with(input, within)?;
        if finished.status.success() {
            return Ok(finished.stdout);
        }
        let said =
            if finished.stderr.trim().is_empty() { &finished.stdout } else { &finished.stderr };
        Err(Error::Command {
            command: self.line(),
            status: finished.status.to_string(),
            stderr: last_lines(said, 6),
        })
    }

    /// Starts it with standard output and error appended to `log`.
    pub fn spawn(&self, log: &Path) -> Result<Proc> {
        let mut command = self.command();
        let file = append_to(log)?;
        let copy = file.try_clone().doing("duplicate a log's descriptor")?;
        command.stdin(Stdio::null()).stdout(file).stderr(copy);
        Ok(self.proc(self.start(&mut command)?, log))
    }

    /// Starts it with both ends of a conversation in our hands: its standard input and output. Standard error
    /// goes to `log`.
    pub fn converse(&self, log: &Path) -> Result<(Proc, ChildStdin, ChildStdout)> {
        let mut command = self.command();
        command.stdin(Stdio::piped()).stdout(Stdio::piped()).stderr(append_to(log)?);
        let mut child = self.start(&mut command)?;
        let pipes = (child.stdin.take(), child.stdout.take());
        let proc = self.proc(child, log);
        match pipes {
            (Some(stdin), Some(stdout)) => Ok((proc, stdin, stdout)),
            _ => Err(Error::Machine("no pipe to a child".into())),
        }
    }

    fn proc(&self, child: Child, log: &Path) -> Proc {
        Proc { child, line: self.line(), log: log.to_owned(), status: None }
    }
}

fn append_to(log: &Path) -> Result<File> {
    File::options().create(true).append(true).open(log).doing(format!("open {}", log.display()))
}

fn read_in_thread(mut from: impl Read + Send + 'static) -> std::thread::JoinHandle<Vec<u8>> {
    std::thread::spawn(move || {
        let mut bytes = Vec::new();
        let _ = from.read_to_end(&mut bytes);
        bytes
    })
}

fn text_of(reader: Option<std::thread::JoinHandle<Vec<u8>>>) -> String {
    let bytes = reader.and_then(|thread| thread.join().ok()).unwrap_or_default();
    String::from_utf8_lossy(&bytes).into_owned()
}

fn wait_for(child: &mut Child, within: Duration) -> Option<ExitStatus> {
    let start = clock::now();
    let mut nap = Duration::from_micros(200);
    loop {
        if let Ok(Some(status)) = child.try_wait() {
            return Some(status);
        }
        if clock::now() - start > within {
            return None;
        }
        std::thread::sleep(nap);
        nap = (nap * 2).min(Duration::from_millis(5));
    }
}

/// The last `count` lines of `text` on one line.
pub fn last_lines(text: &str, count: usize) -> String {
    let lines: Vec<&str> = text.lines().filter(|line| !line.trim().is_empty()).collect();
    lines.iter().skip(lines.len().saturating_sub(count)).copied().collect::<Vec<_>>().join(" / ")
}

/// A child that lives as long as this handle.
#[derive(Debug)]
pub struct Proc {
    child: Child,
    line: String,
    log: PathBuf,
    status: Option<ExitStatus>,
}

impl Proc {
    /// Its process id.
    pub fn pid(&self) -> u32 {
        self.child.id()
    }

    /// Its log's path.
    pub fn log(&self) -> &Path {
        &self.log
    }

    /// The end of its log, on one line, for messages.
    pub fn log_tail(&self) -> String {
        let bytes = std::fs::read(&self.log).unwrap_or_default();
        last_lines(&String::from_utf8_lossy(&bytes), 5)
    }

    /// Whether it has ended, and how.
    pub fn ended(&mut self) -> Option<ExitStatus> {
        if self.status.is_none()
            && let Ok(Some(status)) = self.child.try_wait()
        {
            run::forget(self.child.id());
            self.status = Some(status);
        }
        self.status
    }

    /// Fails, with the log's end, if it has ended.
    pub fn check_alive(&mut self) -> Result<()> {
        match self.ended() {
            None => Ok(()),
            Some(status) => Err(Error::Command {
                command: self.line.clone(),
                status: status.to_string(),
                stderr: self.log_tail(),
            }),
        }
    }

    /// Sends a signal, if it still runs.
    pub fn signal(&mut self, signal: Signal) -> Result<()> {
        if self.ended().is_some() {
            return Err(Error::check(format!("`{}` has ended: {}", self.line, self.log_tail())));
        }
        let pid = i32::try_from(self.child.id()).map_err(|_| Error::Machine("odd pid".into()))?;
        kill(Pid::from_raw(pid), signal).doing(format!("send {signal} to `{}`", self.line))
    }

    /// Kills it at once, without waiting for the kernel to bury it (see [`Proc::bury`]).
    pub fn kill9(&mut self) -> Result<()> {
        self.signal(Signal::SIGKILL)
    }

    /// Waits until a killed process is gone.
    pub fn bury(&mut self, within: Duration) -> Result<ExitStatus> {
        if let Some(status) = self.ended() {
            return Ok(status);
        }
        match wait_for(&mut self.child, within) {
            Some(status) => {
                run::forget(self.child.id());
                self.status = Some(status);
                Ok(status)
            }
            None => Err(Error::Timeout {
                what: format!("`{}` to end", self.line),
                seconds: within.as_secs_f64(),
                hint: format!(": {}", self.log_tail()),
            }),
        }
    }

    /// Asks it to end with `signal`, and kills it if it has not after `within`.
    pub fn stop(&mut self, signal: Signal, within: Duration) -> Result<ExitStatus> {
        if self.ended().is_none() {
            let _ = self.signal(Signal::SIGCONT);
            let _ = self.signal(signal);
            if self.bury(within).is_err() {
                let _ = self.signal(Signal::SIGKILL);
            }
        }
        self.bury(Duration::from_secs(5))
    }
}

impl Drop for Proc {
    fn drop(&mut self) {
        if self.ended().is_none() {
            let _ = self.child.kill();
            let _ = self.child.wait();
            run::forget(self.child.id());
        }
    }
}
