//! Reads TOML tables key by key, collecting every problem instead of stopping at the first.
//!
//! A [`Table`] remembers which keys were asked for; [`Table::done`] calls the rest unknown. The place of
//! every key and value is kept under its dotted path, so that a check made later, on resolved values, can
//! still point at the text.

use std::cell::RefCell;
use std::collections::{BTreeMap, BTreeSet};
use std::ops::{Range, RangeInclusive};

use toml::de::{DeTable, DeValue};

use super::report::{Problem, Severity};

type Span = Range<usize>;

/// One file being read: its problems, and where everything stands.
#[derive(Debug, Default)]
pub(super) struct Reader {
    problems: RefCell<Vec<Problem>>,
    places: RefCell<BTreeMap<String, Span>>,
}

impl Reader {
    /// Notes an error at a place in the text.
    pub(super) fn error(
        &self,
        span: &Span,
        message: impl Into<String>,
        expected: impl Into<String>,
    ) {
        self.note(Severity::Error, span, message.into(), expected.into(), None);
    }

    /// Notes a problem of either kind, with advice.
    pub(super) fn note(
        &self,
        severity: Severity,
        span: &Span,
        message: String,
        expected: String,
        help: Option<String>,
    ) {
        let problem = Problem { severity, span: span.clone(), message, expected, help };
        self.problems.borrow_mut().push(problem);
    }

    /// Where a dotted path stands, or else the nearest table around it, or else the file's start.
    pub(super) fn place(&self, path: &str) -> Span {
        let places = self.places.borrow();
        let mut path = path;
        loop {
            if let Some(span) = places.get(path) {
                return span.clone();
            }
            match path.rfind(['.', '[']) {
                Some(at) => path = path.get(..at).unwrap_or_default(),
                None => return 0..0,
            }
        }
    }

    /// Whether an error was noted.
    pub(super) fn failed(&self) -> bool {
        self.problems.borrow().iter().any(|p| p.severity == Severity::Error)
    }

    /// All that was noted.
    pub(super) fn into_problems(self) -> Vec<Problem> {
        self.problems.into_inner()
    }

    /// The whole document as a table.
    pub(super) fn root<'r>(&'r self, table: &'r DeTable<'r>) -> Table<'r> {
        Table::new(self, String::new(), 0..0, table)
    }
}

/// A value together with its place.
#[derive(Clone, Debug)]
pub(super) struct Placed<T> {
    pub(super) value: T,
    pub(super) span: Span,
}

/// A table being read.
pub(super) struct Table<'r> {
    reader: &'r Reader,
    path: String,
    span: Span,
    table: &'r DeTable<'r>,
    asked: RefCell<BTreeSet<String>>,
    refused: RefCell<BTreeSet<String>>,
}

impl<'r> Table<'r> {
    fn new(reader: &'r Reader, path: String, span: Span, table: &'r DeTable<'r>) -> Self {
        let (asked, refused) = (RefCell::default(), RefCell::default());
        Self { reader, path, span, table, asked, refused }
    }

    /// Where problems are noted.
    pub(super) fn reader(&self) -> &'r Reader {
        self.reader
    }

    /// Whether a key is there, without asking for it.
    pub(super) fn contains(&self, key: &str) -> bool {
        self.table.contains_key(key)
    }

    /// The dotted path of one of its keys.
    pub(super) fn path(&self, key: &str) -> String {
        if self.path.is_empty() { key.to_owned() } else { format!("{}.{key}", self.path) }
    }

    fn raw(&self, key: &str) -> Option<(&'r DeValue<'r>, Span)> {
        self.asked.borrow_mut().insert(key.to_owned());
        let (name, value) = self.table.get_key_value(key)?;
        // A table's place is its name: its text may be many lines.
        let span = match value.get_ref() {
            DeValue::Table(_) => name.span(),
            _ => value.span(),
        };
        self.reader.places.borrow_mut().insert(self.path(key), span.clone());
        Some((value.get_ref(), span))
    }

    fn wrong_type(&self, key: &str, value: &DeValue<'_>, span: &Span, expected: &str) {
        let message = format!("`{}` is {}", self.path(key), kind(value));
        self.reader.error(span, message, format!("expected {expected}"));
    }

    /// Whether the key is there at all (asking makes it known).
    pub(super) fn has(&self, key: &str) -> Option<Span> {
        self.raw(key).map(|(_, span)| span)
    }

    /// Notes that a key is missing.
    pub(super) fn missing(&self, key: &str, expected: &str) {
        let message = format!("`{}` is missing", self.path(key));
        self.reader.error(&self.span, message, format!("expected `{key}`: {expected}"));
    }

    /// A string that `parse` understands; its error, if any, says why not.
    pub(super) fn text<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Placed<T>> {
        let (value, span) = self.raw(key)?;
        let DeValue::String(text) = value else {
            self.wrong_type(key, value, &span, expected);
            return None;
        };
        self.parsed(key, text, span, expected, parse)
    }

    fn parsed<T>(
        &self,
        key: &str,
        text: &str,
        span: Span,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Placed<T>> {
        match parse(text) {
            Ok(value) => Some(Placed { value, span }),
            Err(why) => {
                let why = if why.is_empty() { String::new() } else { format!(": {why}") };
                let message = format!("`{}` does not take {text:?}{why}", self.path(key));
                self.reader.error(&span, message, format!("expected {expected}"));
                None
            }
        }
    }

    /// [`Self::text`], and a note if the key is missing.
    pub(super) fn need<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Placed<T>> {
        if !self.table.contains_key(key) {
            self.missing(key, expected);
        }
        self.text(key, expected, parse)
    }

    /// Whether the value under a key is a list.
    pub(super) fn is_list(&self, key: &str) -> bool {
        self.table.get(key).is_some_and(|value| matches!(value.get_ref(), DeValue::Array(_)))
    }

    /// `true` or `false`; `default` when the key is missing or something else.
    pub(super) fn switch(&self, key: &str, default: bool) -> bool {
        match self.raw(key) {
            None => default,
            Some((DeValue::Boolean(value), _)) => *value,
            Some((other, span)) => {
                self.wrong_type(key, other, &span, "true or false");
                default
            }
        }
    }

    /// A list of strings. `None` when the key is missing or not a list; bad elements are noted and left out.
    pub(super) fn list<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl Fn(&str) -> Result<T, String>,
    ) -> Option<Vec<Placed<T>>> {
        let (value, span) = self.raw(key)?;
        let DeValue::Array(array) = value else {
            self.wrong_type(key, value, &span, &format!("a list of {expected}"));
            return None;
        };
        let mut parsed = Vec::new();
        for (index, element) in array.iter().enumerate() {
            let place = format!("{}[{index}]", self.path(key));
            self.reader.places.borrow_mut().insert(place, element.span());
            match element.get_ref() {
                DeValue::String(text) => {
                    parsed.extend(self.parsed(key, text, element.span(), expected, &parse));
                }
                other => self.wrong_type(key, other, &element.span(), expected),
            }
        }
        Some(parsed)
    }

    /// A whole number within a range, of a unit (for the message; may be empty).
    pub(super) fn number(
        &self,
        key: &str,
        unit: &str,
        range: RangeInclusive<u64>,
    ) -> Option<Placed<u64>> {
        let (value, span) = self.raw(key)?;
        let unit = if unit.is_empty() { String::new() } else { format!(" of {unit}") };
        let expected = format!("a whole number{unit} from {} to {}", range.start(), range.end());
        let DeValue::Integer(digits) = value else {
            self.wrong_type(key, value, &span, &expected);
            return None;
        };
        match u64::from_str_radix(digits.as_str(), digits.radix()) {
            Ok(value) if range.contains(&value) => Some(Placed { value, span }),
            _ => {
                let message = format!("`{}` does not take {digits}", self.path(key));
                self.reader.error(&span, message, format!("expected {expected}"));
                None
            }
        }
    }

    /// A string or a whole number, as swanctl writes durations; `parse` gets the text of either.
    pub(super) fn text_or_number<T>(
        &self,
        key: &str,
        expected: &str,
        parse: impl FnOnce(&str) -> Result<T, String>,
    ) -> Option<Placed<T>> {
        let (value, span) = self.raw(key)?;
        match value {
            DeValue::String(text) => self.parsed(key, text, span, expected, parse),
            DeValue::Integer(n) if n.radix() == 10 => {
                self.parsed(key, n.as_str(), span, expected, parse)
            }
            other => {
                self.wrong_type(key, other, &span, expected);
                None
            }
        }
    }

    /// A table under a key.
    pub(super) fn table(&self, key: &str) -> Option<Table<'r>> {
        let (value, span) = self.raw(key)?;
        if let DeValue::Table(table) = value {
            Some(Table::new(self.reader, self.path(key), span, table))
        } else {
            self.wrong_type(key, value, &span, "a table");
            None
        }
    }

    /// Whether the value under a key is a table (`interface = { left = … }`) rather than a scalar.
    pub(super) fn is_table(&self, key: &str) -> bool {
        self.table.get(key).is_some_and(|value| matches!(value.get_ref(), DeValue::Table(_)))
    }

    /// The tables under a key, by name: `[connections.NAME]`. Empty when there are none.
    pub(super) fn tables(&self, key: &str) -> Vec<(String, Table<'r>)> {
        let Some(outer) = self.table(key) else { return Vec::new() };
        let mut tables = Vec::new();
        for name in outer.table.keys() {
            let text = name.get_ref();
            // Names reach logs, the notify hook's arguments and other gateways' configurations.
            let fits = (1..=64).contains(&text.len())
                && text.bytes().all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_');
            if !fits {
                let message = format!("{text:?} is no name");
                let expected = "expected 1 to 64 letters, digits, `-` and `_`";
                self.reader.error(&name.span(), message, expected);
            }
            tables.extend(outer.table(text).map(|table| (text.to_string(), table)));
        }
        tables
    }

    /// The names of all keys, each marked as known.
    pub(super) fn names(&self) -> Vec<String> {
        let names: Vec<String> = self.table.keys().map(|k| k.get_ref().to_string()).collect();
        self.asked.borrow_mut().extend(names.iter().cloned());
        names
    }

    /// Where a key stands that is refused by a note of its own; it is never offered as a known one.
    pub(super) fn refused(&self, key: &str) -> Option<Span> {
        let (name, _) = self.table.get_key_value(key)?;
        self.refused.borrow_mut().insert(key.to_owned());
        Some(name.span())
    }

    /// Whether [`Self::refused`] found anything.
    pub(super) fn found_refused(&self) -> bool {
        !self.refused.borrow().is_empty()
    }

    /// The end of a table: see [`Self::unknown_keys`].
    pub(super) fn done(self) {
        self.unknown_keys();
    }

    /// Notes every key that nobody asked for, with the nearest known one.
    pub(super) fn unknown_keys(&self) {
        let (asked, refused) = (self.asked.borrow(), self.refused.borrow());
        let known = |name: &str| asked.contains(name) || refused.contains(name);
        for name in self.table.keys().filter(|k| !known(k.get_ref())) {
            let text = name.get_ref();
            let near = asked
                .iter()
                .map(|known| (distance(text, known), known))
                .filter(|(d, known)| *d <= 2.max(known.len() / 3))
                .min();
            let here = if self.path.is_empty() {
                "at the top level".to_owned()
            } else {
                format!("in [{}]", self.path)
            };
            let known: Vec<&str> = asked.iter().map(String::as_str).collect();
            self.reader.note(
                Severity::Error,
                &name.span(),
                format!("unknown key `{text}` {here}"),
                format!("expected one of {}", known.join(", ")),
                near.map(|(_, known)| format!("did you mean `{known}`?")),
            );
        }
    }
}

/// What a value is, for a sentence.
fn kind(value: &DeValue<'_>) -> &'static str {
    match value {
        DeValue::String(_) => "a string",
        DeValue::Integer(_) => "a whole number",
        DeValue::Float(_) => "a floating-point number",
        DeValue::Boolean(_) => "true or false",
        DeValue::Datetime(_) => "a date",
        DeValue::Array(_) => "a list",
        DeValue::Table(_) => "a table",
    }
}

/// Edits between two short words (Levenshtein), for "did you mean".
pub(super) fn distance(a: &str, b: &str) -> usize {
    let b: Vec<char> = b.chars().collect();
    let mut row: Vec<usize> = (0..=b.len()).collect();
    for (i, ca) in a.chars().enumerate() {
        let mut diagonal = i;
        let mut left = i + 1;
        for (cell, cb) in row.iter_mut().skip(1).zip(&b) {
            let up = *cell;
            let cost = diagonal + usize::from(ca != *cb);
            left = cost.min(up + 1).min(left + 1);
            diagonal = up;
            *cell = left;
        }
        if let Some(first) = row.first_mut() {
            *first = i + 1;
        }
    }
    row.last().copied().unwrap_or(a.chars().count())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn distances() {
        for (a, b, d) in [("", "", 0), ("", "ab", 2), ("home", "hoem", 2), ("lan", "wan", 1)] {
            assert_eq!((distance(a, b), distance(b, a)), (d, d), "{a} {b}");
        }
        assert_eq!(distance("kitten", "sitting"), 3);
    }
}
