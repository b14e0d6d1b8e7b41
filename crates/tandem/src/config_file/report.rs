//! What is wrong with a configuration file, and how it is shown.
//!
//! Every problem has a place in the text, says what was found and what was expected, and often what to
//! do. Problems are collected, so that one run of `tandem check` shows them all. The quoted source is
//! masked first where it could hold a secret that somebody wrote inline (security.md, statement 16).

use std::fmt;
use std::ops::Range;

use annotate_snippets::{AnnotationKind, Level, Renderer, Snippet};
use serde::Serialize;

/// How bad a problem is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Serialize)]
#[serde(rename_all = "lowercase")]
pub enum Severity {
    /// The daemon refuses to start.
    Error,
    /// The daemon starts; something will not work as well as it could.
    Warning,
}

/// One problem.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Problem {
    /// How bad.
    pub severity: Severity,
    /// Byte range in the file's text.
    pub span: Range<usize>,
    /// What is wrong, one line.
    pub message: String,
    /// What was expected at that place.
    pub expected: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// A problem as `tandem check --json` prints it.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct ProblemRow {
    /// `error` or `warning`.
    pub severity: Severity,
    /// Line in the file, from 1.
    pub line: usize,
    /// Character in the line, from 1.
    pub column: usize,
    /// The offending text, masked where it may be a secret, at most its first line.
    pub text: String,
    /// What is wrong.
    pub message: String,
    /// What was expected there.
    pub expected: String,
    /// What to do about it.
    pub help: Option<String>,
}

/// All problems of one file, in the order of their places.
#[derive(Clone, PartialEq, Eq)]
pub struct Report {
    file: String,
    /// Masked: fit to be shown.
    text: String,
    problems: Vec<Problem>,
}

impl Report {
    /// Puts the problems in order. `text` is the file's whole text; it is masked here.
    #[must_use]
    pub fn new(file: &str, text: &str, mut problems: Vec<Problem>) -> Self {
        let text = mask(text);
        for problem in &mut problems {
            problem.span = clamp(&text, &problem.span);
        }
        problems.sort_by_key(|p| (p.severity, p.span.start, p.span.end));
        problems.dedup();
        Self { file: file.to_owned(), text, problems }
    }

    /// Whether there is an error among the problems.
    #[must_use]
    pub fn has_errors(&self) -> bool {
        self.problems.iter().any(|p| p.severity == Severity::Error)
    }

    /// Whether there is nothing to say.
    #[must_use]
    pub fn is_empty(&self) -> bool {
        self.problems.is_empty()
    }

    /// The problems, errors first.
    #[must_use]
    pub fn problems(&self) -> &[Problem] {
        &self.problems
    }

    /// The problems with line numbers instead of byte ranges.
    #[must_use]
    pub fn rows(&self) -> Vec<ProblemRow> {
        self.problems
            .iter()
            .map(|p| {
                let before = self.text.get(..p.span.start).unwrap_or_default();
                let line_start = before.rfind('\n').map_or(0, |at| at + 1);
                let quoted = self.text.get(p.span.clone()).unwrap_or_default();
                ProblemRow {
                    severity: p.severity,
                    line: before.matches('\n').count() + 1,
                    column: before.get(line_start..).unwrap_or_default().chars().count() + 1,
                    text: quoted.lines().next().unwrap_or_default().to_owned(),
                    message: p.message.clone(),
                    expected: p.expected.clone(),
                    help: p.help.clone(),
                }
            })
            .collect()
    }

    /// The report as a person reads it; `colour` for a terminal.
    #[must_use]
    pub fn render(&self, colour: bool) -> String {
        let renderer = if colour { Renderer::styled() } else { Renderer::plain() };
        let blocks = self.problems.iter().map(|problem| {
            let level = match problem.severity {
                Severity::Error => Level::ERROR,
                Severity::Warning => Level::WARNING,
            };
            let annotation = AnnotationKind::Primary.span(problem.span.clone());
            let snippet = Snippet::source(self.text.as_str())
                .path(self.file.as_str())
                .annotation(annotation.label(problem.expected.as_str()));
            let mut group = level.primary_title(problem.message.as_str()).element(snippet);
            if let Some(help) = &problem.help {
                group = group.element(Level::HELP.message(help.as_str()));
            }
            renderer.render(&[group])
        });
        blocks.collect::<Vec<_>>().join("\n\n")
    }
}

impl fmt::Display for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl fmt::Debug for Report {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.render(false))
    }
}

impl std::error::Error for Report {}

/// A range inside the text, on character boundaries, one line end left out, so that it can be shown.
fn clamp(text: &str, span: &Range<usize>) -> Range<usize> {
    let mut start = span.start.min(text.len());
    while !text.is_char_boundary(start) {
        start -= 1;
    }
    let mut end = span.end.clamp(start, text.len());
    while !text.is_char_boundary(end) {
        end += 1;
    }
    start..end
}

/// Keys whose value would be a secret if somebody wrote one, here or in another program's syntax.
const SECRET_KEYS: [&str; 6] = ["psk", "secret", "password", "passphrase", "key", "private_key"];

/// The same text, byte for byte as long, with `*` for everything on a line that follows a secret's key
/// and `=`; and for the lines of a multi-line string that begins there.
fn mask(text: &str) -> String {
    let mut masked = String::with_capacity(text.len());
    let mut until: Option<&str> = None;
    for line in text.split_inclusive('\n') {
        let from = match until {
            Some(quote) => {
                if line.contains(quote) {
                    until = None;
                }
                Some(0)
            }
            None => secret_value(line).inspect(|at| {
                let value = line.get(*at..).unwrap_or_default();
                until = ["\"\"\"", "'''"].into_iter().find(|q| value.matches(q).count() == 1);
            }),
        };
        let (shown, hidden) = line.split_at(from.unwrap_or(line.len()));
        masked.push_str(shown);
        for c in hidden.chars() {
            if c.is_whitespace() && c.is_ascii() {
                masked.push(c);
            } else {
                masked.extend(std::iter::repeat_n('*', c.len_utf8()));
            }
        }
    }
    masked
}

/// Where the value of the first secret key on a line begins.
fn secret_value(line: &str) -> Option<usize> {
    line.match_indices('=').map(|(at, _)| at).find_map(|at| {
        let before = line.get(..at)?.trim_end().trim_end_matches(['"', '\'']);
        let is_word = |c: char| c.is_alphanumeric() || c == '_' || c == '-';
        let key = before.get(before.rfind(|c| !is_word(c)).map_or(0, |p| p + 1)..)?;
        SECRET_KEYS.iter().any(|s| key.eq_ignore_ascii_case(s)).then_some(at + 1)
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn inline_secrets_are_masked_at_equal_length() {
        let text = "auth = { psk = \"hünter2\" }\nauth = { psk_file = \"/etc/x\" }\n";
        let masked = mask(text);
        assert_eq!(masked.len(), text.len());
        assert!(!masked.contains("nter2"), "{masked}");
        assert!(masked.contains("psk_file = \"/etc/x\""), "{masked}");
        let multi = mask("psk = '''\nhunter2\n''' # end\nhome = \"left\"\n");
        assert!(!multi.contains("hunter2") && multi.contains("home = \"left\""), "{multi}");
        assert!(!mask("\"Secret\" = 'hunter2'").contains("hunter2"));
    }

    #[test]
    fn places_are_lines_and_characters() {
        let problem = Problem {
            severity: Severity::Error,
            span: 8..11,
            message: "no".into(),
            expected: "yes".into(),
            help: None,
        };
        let report = Report::new("t.toml", "é = 1\nb = x\n", vec![problem]);
        let row = &report.rows()[0];
        // Byte 7 begins line 2, as é has two bytes.
        assert_eq!((row.line, row.column, row.text.as_str()), (2, 2, " = "));
    }
}
