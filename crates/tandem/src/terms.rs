//! The term file: the highest term of each endpoint that this instance has reserved.
//!
//! Terms fence IVs (ha.md), so a term that was ever usable must survive a crash of the host: the file is replaced
//! atomically and synced, folder included, before [`TermFile::reserve`] returns, and `ha` asks for blocks ahead of use so that
//! no takeover waits for the disk. One line an endpoint: `NAME TERM`. A missing file is legal (the instance then
//! starts far above everything it hears); a damaged one is refused, because guessing could repeat a term.

use std::collections::BTreeMap;
use std::fs;
use std::io::{self, Write};
use std::os::unix::fs::DirBuilderExt;
use std::path::{Path, PathBuf};

/// Why the term file could not be used.
#[derive(Debug, thiserror::Error)]
pub enum TermFileError {
    /// Reading or writing failed.
    #[error("{path}: {source}; the state folder must exist and be writable for this user")]
    Io {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: io::Error,
    },
    /// A line is not `NAME TERM`.
    #[error(
        "{path}:{line}: expected `ENDPOINT TERM`, found {text:?}; remove the file only if this instance has never run since the other was last in contact"
    )]
    Damaged {
        /// The file.
        path: PathBuf,
        /// 1-based.
        line: usize,
        /// The line.
        text: String,
    },
}

/// The file and what it holds.
#[derive(Debug, Clone)]
pub struct TermFile {
    path: PathBuf,
    terms: BTreeMap<String, u64>,
}

impl TermFile {
    /// Reads `FOLDER/terms`; a missing file is an empty one.
    pub fn open(folder: &Path) -> Result<Self, TermFileError> {
        let path = folder.join("terms");
        // systemd makes it (StateDirectory=); whoever starts the daemon by hand would otherwise have an instance that
        // runs and can own nothing.
        if let Err(source) = fs::DirBuilder::new().recursive(true).mode(0o700).create(folder) {
            return Err(TermFileError::Io { path: folder.to_owned(), source });
        }
        let text = match fs::read_to_string(&path) {
            Ok(text) => text,
            Err(error) if error.kind() == io::ErrorKind::NotFound => String::new(),
            Err(source) => return Err(TermFileError::Io { path, source }),
        };
        let mut terms = BTreeMap::new();
        for (index, line) in text.lines().enumerate() {
            let parsed = line
                .split_once(' ')
                .and_then(|(name, term)| Some((name.to_owned(), term.parse().ok()?)));
            let Some((name, term)) = parsed else {
                return Err(TermFileError::Damaged {
                    path,
                    line: index + 1,
                    text: line.to_owned(),
                });
            };
            terms.insert(name, term);
        }
        Ok(Self { path, terms })
    }

    /// The highest reserved term of an endpoint, if it ever had one.
    pub fn reserved(&self, endpoint: &str) -> Option<u64> {
        self.terms.get(endpoint).copied()
    }

    /// Makes a reservation durable. Never lowers a term.
    pub fn reserve(&mut self, endpoint: &str, up_to: u64) -> Result<(), TermFileError> {
        let entry = self.terms.entry(endpoint.to_owned()).or_default();
        *entry = (*entry).max(up_to);
        self.write().map_err(|source| TermFileError::Io { path: self.path.clone(), source })
    }

    fn write(&self) -> io::Result<()> {
        let temporary = self.path.with_extension("new");
        let mut file = fs::File::create(&temporary)?;
        for (name, term) in &self.terms {
            writeln!(file, "{name} {term}")?;
        }
        file.sync_all()?;
        fs::rename(&temporary, &self.path)?;
        match self.path.parent() {
            Some(folder) => fs::File::open(folder)?.sync_all(),
            None => Ok(()),
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn folder(name: &str) -> PathBuf {
        let folder =
            std::env::temp_dir().join(format!("tandem-terms-{name}-{}", std::process::id()));
        let _ = fs::remove_dir_all(&folder);
        fs::create_dir_all(&folder).unwrap();
        folder
    }

    #[test]
    fn survives_a_reopen_and_never_goes_back() {
        let folder = folder("reopen");
        let mut file = TermFile::open(&folder).unwrap();
        assert_eq!(file.reserved("main"), None);
        file.reserve("main", 32).unwrap();
        file.reserve("main", 16).unwrap();
        file.reserve("other", 17).unwrap();
        let again = TermFile::open(&folder).unwrap();
        assert_eq!((again.reserved("main"), again.reserved("other")), (Some(32), Some(17)));
        fs::remove_dir_all(folder).unwrap();
    }

    #[test]
    fn the_folder_is_made_where_it_is_missing_and_for_nobody_else() {
        use std::os::unix::fs::PermissionsExt;
        let folder = folder("made").join("a/b");
        TermFile::open(&folder).unwrap().reserve("main", 16).unwrap();
        assert_eq!(fs::metadata(&folder).unwrap().permissions().mode() & 0o777, 0o700);
        fs::remove_dir_all(folder.ancestors().nth(2).unwrap()).unwrap();
    }

    #[test]
    fn a_damaged_file_is_refused_with_its_line() {
        let folder = folder("damaged");
        fs::write(folder.join("terms"), "main 32\nmain thirty\n").unwrap();
        let error = TermFile::open(&folder).unwrap_err().to_string();
        assert!(error.contains("terms:2:") && error.contains("main thirty"), "{error}");
        fs::remove_dir_all(folder).unwrap();
    }
}
