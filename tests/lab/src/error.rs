//! What can go wrong in the lab, by what the reader should do about it.

use std::path::Path;

/// Shorthand for the lab's results.
pub type Result<T, E = Error> = std::result::Result<T, E>;

/// Why a lab step did not happen.
#[derive(Debug, thiserror::Error)]
pub enum Error {
    /// The machine lacks something: a package, a right, a kernel feature.
    #[error("the machine lacks something: {0}")]
    Machine(String),
    /// A program that the lab ran said no.
    #[error("`{command}` failed ({status}): {stderr}")]
    Command {
        /// The command line.
        command: String,
        /// Its exit status, in words.
        status: String,
        /// The last lines of its standard error (or output).
        stderr: String,
    },
    /// A condition did not come true in time.
    #[error("waited {seconds:.1} s in vain for {what}{hint}")]
    Timeout {
        /// The condition.
        what: String,
        /// How long, in seconds.
        seconds: f64,
        /// The last thing seen, as `: …`, or nothing.
        hint: String,
    },
    /// A file or an answer was not of the expected shape.
    #[error("cannot read {what}: {why}")]
    Parse {
        /// What was read.
        what: String,
        /// What was wrong with it.
        why: String,
    },
    /// The system said no.
    #[error("{what}: {source}")]
    Io {
        /// What was tried.
        what: String,
        /// The system's reason.
        source: std::io::Error,
    },
    /// The thing under test is wrong: this is what a test looks for.
    #[error("{0}")]
    Check(String),
}

impl Error {
    /// An [`Error::Check`] from text.
    pub fn check(text: impl Into<String>) -> Self {
        Error::Check(text.into())
    }

    /// An [`Error::Parse`] from its parts.
    pub fn parse(what: impl Into<String>, why: impl Into<String>) -> Self {
        Error::Parse { what: what.into(), why: why.into() }
    }
}

/// Names what was tried when the system says no.
pub trait IoContext<T> {
    /// Wraps the error as [`Error::Io`] with `what`.
    fn doing(self, what: impl Into<String>) -> Result<T>;
}

impl<T> IoContext<T> for std::io::Result<T> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|source| Error::Io { what: what.into(), source })
    }
}

impl<T> IoContext<T> for nix::Result<T> {
    fn doing(self, what: impl Into<String>) -> Result<T> {
        self.map_err(|errno| Error::Io { what: what.into(), source: errno.into() })
    }
}

/// Fails with [`Error::Check`] unless `condition` holds.
pub fn ensure(condition: bool, text: impl FnOnce() -> String) -> Result<()> {
    if condition { Ok(()) } else { Err(Error::Check(text())) }
}

/// Fails unless every count of a trial is zero.
pub fn ensure_zero(trial: &str, counts: &[(&str, u64)]) -> Result<()> {
    for (what, count) in counts {
        ensure(*count == 0, || format!("{trial}: {count} {what}"))?;
    }
    Ok(())
}

/// Writes a whole file, naming it if that fails.
pub fn write_file(path: &Path, text: impl AsRef<[u8]>) -> Result<()> {
    std::fs::write(path, text).doing(format!("write {}", path.display()))
}
