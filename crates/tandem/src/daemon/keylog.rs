//! The key log: tshark's tables, to which each key is appended as it is made.
//!
//! Several daemons may log to one folder (the lab's do), and tshark takes none of a table in which one line is broken: so
//! a line is one write.

use std::fs::OpenOptions;
use std::io::{self, Write};
use std::path::Path;

use zeroize::Zeroizing;

/// Appends a line to its table in `folder`.
pub(super) fn append(folder: &Path, line: &ike::KeyLogLine) -> io::Result<()> {
    let name = match line.table {
        ike::KeyLogTable::Ike => "ikev2_decryption_table",
        ike::KeyLogTable::Esp => "esp_sa",
    };
    let key = line.line.as_str();
    // Reserved at once: growing would leave unwiped copies behind.
    let mut whole = Zeroizing::new(String::with_capacity(key.len() + 1));
    whole.push_str(key);
    whole.push('\n');
    let mut file = OpenOptions::new().create(true).append(true).open(folder.join(name))?;
    file.write_all(whole.as_bytes())
}

#[cfg(test)]
mod tests {
    #![allow(clippy::unwrap_used, reason = "a test fails by panicking")]

    use super::*;

    #[test]
    fn lines_of_two_writers_stay_whole() {
        let folder = std::env::temp_dir().join(format!("tandem-keylog-{}", std::process::id()));
        std::fs::create_dir_all(&folder).unwrap();
        let write = |letter: &str| {
            let text = letter.repeat(100);
            let table = ike::KeyLogTable::Esp;
            let line = ike::KeyLogLine { table, line: Zeroizing::new(text) };
            for _ in 0..2000 {
                append(&folder, &line).unwrap();
            }
        };
        std::thread::scope(|scope| {
            scope.spawn(|| write("a"));
            scope.spawn(|| write("b"));
        });
        let text = std::fs::read_to_string(folder.join("esp_sa")).unwrap();
        std::fs::remove_dir_all(&folder).unwrap();
        let whole = |line: &str| [b'a', b'b'].iter().any(|c| line.bytes().all(|b| b == *c));
        assert_eq!(text.lines().count(), 4000);
        assert!(text.lines().all(|line| line.len() == 100 && whole(line)));
    }
}
