//! A guide in the README as a list of commands: the lab types what the README says, so that neither can drift from
//! the other.

use crate::error::{Error, Result};

/// Where a command is typed.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Place {
    /// On left, then on right.
    Both,
    /// On left.
    Left,
    /// On right.
    Right,
    /// On whichever instance owns the endpoint.
    Owner,
    /// On the remote gateway.
    Peer,
    /// On a host of the LAN.
    LanHost,
}

const WORDS: [(&str, Place); 6] = [
    ("on both", Place::Both),
    ("on left", Place::Left),
    ("on right", Place::Right),
    ("on the owner", Place::Owner),
    ("on the peer", Place::Peer),
    ("from a lan host", Place::LanHost),
];

/// One command.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Command {
    /// Where it is typed.
    pub place: Place,
    /// The line.
    pub line: String,
}

/// The commands of every block of shell in `section` (the text of its heading). Where a block is typed stands in the
/// text between it and the block before: the last of the known words there.
pub fn commands(text: &str, section: &str) -> Result<Vec<Command>> {
    let heading = format!("## {section}");
    let mut lines = text.lines().skip_while(|line| *line != heading).skip(1);
    let mut found = Vec::new();
    let mut prose = String::new();
    while let Some(line) = lines.next() {
        if line.starts_with("## ") {
            break;
        }
        if !line.starts_with("```") {
            prose.push_str(line);
            prose.push(' ');
            continue;
        }
        let place = place_in(&prose).ok_or_else(|| {
            Error::parse(format!("\"{section}\""), format!("where is this typed? {prose}"))
        })?;
        prose.clear();
        for line in lines.by_ref().take_while(|line| !line.starts_with("```")) {
            if !line.trim().is_empty() {
                found.push(Command { place, line: line.trim().to_owned() });
            }
        }
    }
    if found.is_empty() {
        return Err(Error::parse(format!("\"{section}\""), "it holds no command"));
    }
    Ok(found)
}

fn place_in(prose: &str) -> Option<Place> {
    let prose = prose.split_whitespace().collect::<Vec<_>>().join(" ").to_lowercase();
    WORDS
        .iter()
        .filter_map(|(words, place)| Some((prose.rfind(words)?, *place)))
        .max_by_key(|(at, _)| *at)
        .map(|(_, place)| place)
}

#[cfg(test)]
mod tests {
    use super::*;

    const TEXT: &str = "# Name\n\n```sh\nnot this\n```\n## Guide\nOn both, do this, then on\nleft:\n\n```sh\none\ntwo\n```\n\
        Then on the peer:\n```sh\n  three\n```\n## After\n\n```sh\nnor this\n```\n";

    #[test]
    fn blocks_of_the_section_are_read() {
        let command = |place, line: &str| Command { place, line: line.into() };
        assert_eq!(
            commands(TEXT, "Guide").unwrap(),
            [
                command(Place::Left, "one"),
                command(Place::Left, "two"),
                command(Place::Peer, "three")
            ]
        );
    }

    #[test]
    fn a_block_without_a_place_is_an_error() {
        assert!(commands("## Guide\nDo:\n```sh\none\n```\n", "Guide").is_err());
        assert!(commands(TEXT, "Missing").is_err());
    }
}
