//! Rust source as a list of words: comments, strings and characters left out, test code cut away.
//!
//! Enough of the language for word checks, no parser: a construct it misreads would show as a false alarm,
//! because it never drops code except behind `#[cfg(test)]`.

/// A word or a sign of the source.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Token<'t> {
    /// Its text: an identifier, a number, `::`, or one character.
    pub text: &'t str,
    /// Its line, from 1.
    pub line: usize,
}

/// Splits source into tokens.
#[must_use]
pub fn tokens(text: &str) -> Vec<Token<'_>> {
    let mut found = Vec::new();
    let mut rest = text;
    let mut line = 1;
    while let Some(c) = rest.chars().next() {
        let len = if rest.starts_with("//") {
            rest.find('\n').unwrap_or(rest.len())
        } else if rest.starts_with("/*") {
            block_comment(rest)
        } else if let Some(len) = raw_string(rest) {
            len
        } else if c == '"' || rest.starts_with("b\"") || rest.starts_with("c\"") {
            quoted(rest, '"')
        } else if c == '\'' || rest.starts_with("b'") {
            character_or_lifetime(rest)
        } else if c.is_alphanumeric() || c == '_' {
            let len = rest.find(|c: char| !c.is_alphanumeric() && c != '_').unwrap_or(rest.len());
            push(&mut found, rest, len, line);
            len
        } else if rest.starts_with("::") {
            push(&mut found, rest, 2, line);
            2
        } else {
            if !c.is_whitespace() {
                push(&mut found, rest, c.len_utf8(), line);
            }
            c.len_utf8()
        };
        let (done, left) = rest.split_at(len.max(1).min(rest.len()));
        line += done.matches('\n').count();
        rest = left;
    }
    found
}

fn push<'t>(found: &mut Vec<Token<'t>>, rest: &'t str, len: usize, line: usize) {
    if let Some(text) = rest.get(..len) {
        found.push(Token { text, line });
    }
}

/// Length of a block comment; they nest.
fn block_comment(rest: &str) -> usize {
    let (mut depth, mut at) = (0, 0);
    loop {
        let left = rest.get(at..).unwrap_or_default();
        match (left.find("/*"), left.find("*/")) {
            (Some(open), Some(close)) if open < close => {
                depth += 1;
                at += open + 2;
            }
            (_, Some(close)) => {
                depth -= 1;
                at += close + 2;
                if depth == 0 {
                    return at;
                }
            }
            (_, None) => return rest.len(),
        }
    }
}

/// Length of `r"…"`, `r#"…"#`, `br"…"` and the like, if one begins here.
fn raw_string(rest: &str) -> Option<usize> {
    let prefix = ["r", "br", "cr"].into_iter().find(|p| {
        let after = rest.strip_prefix(p).map(|after| after.trim_start_matches('#'));
        after.is_some_and(|after| after.starts_with('"'))
    })?;
    let hashes = rest.get(prefix.len()..)?.chars().take_while(|c| *c == '#').count();
    let start = prefix.len() + hashes + 1;
    let end = format!("\"{}", "#".repeat(hashes));
    let body = rest.get(start..)?;
    Some(body.find(&end).map_or(rest.len(), |at| start + at + end.len()))
}

/// Length of a literal up to its closing quote, which a backslash before it keeps from closing.
fn quoted(rest: &str, quote: char) -> usize {
    let mut escaped = false;
    let open = rest.find(quote).unwrap_or(0) + 1;
    for (at, c) in rest.char_indices().skip_while(|(at, _)| *at < open) {
        match c {
            _ if escaped => escaped = false,
            '\\' => escaped = true,
            c if c == quote => return at + 1,
            _ => {}
        }
    }
    rest.len()
}

/// `'a'`, `'\n'`, `b'x'` are literals; `'a` alone is a lifetime.
fn character_or_lifetime(rest: &str) -> usize {
    let quote = rest.find('\'').unwrap_or(0);
    let mut after = rest.char_indices().skip_while(|(at, _)| *at <= quote);
    match (after.next(), after.next()) {
        (Some((_, '\\')), _) => quoted(rest, '\''),
        (Some(_), Some((at, '\''))) => at + 1,
        _ => quote + 1,
    }
}

/// The tokens without items under `#[cfg(test)]`.
#[must_use]
pub fn without_tests<'t>(all: &[Token<'t>]) -> Vec<Token<'t>> {
    const MARK: [&str; 7] = ["#", "[", "cfg", "(", "test", ")", "]"];
    let mut kept = Vec::new();
    let mut at = 0;
    while let Some(token) = all.get(at) {
        let marked =
            MARK.iter().enumerate().all(|(i, m)| all.get(at + i).is_some_and(|t| t.text == *m));
        if marked {
            at = end_of_item(all, at + MARK.len());
        } else {
            kept.push(*token);
            at += 1;
        }
    }
    kept
}

/// Where an item ends: after its `;`, or its outermost braces.
fn end_of_item(all: &[Token<'_>], from: usize) -> usize {
    let mut depth = 0usize;
    for (at, token) in all.iter().enumerate().skip(from) {
        match token.text {
            "{" | "(" | "[" => depth += 1,
            "}" | ")" | "]" => {
                depth = depth.saturating_sub(1);
                if depth == 0 && token.text == "}" {
                    return at + 1;
                }
            }
            ";" if depth == 0 => return at + 1,
            _ => {}
        }
    }
    all.len()
}

/// Modules that a file declares for its tests alone (`#[cfg(test)] mod NAME;`): their files are test code.
#[must_use]
pub fn test_modules(text: &str) -> Vec<&str> {
    let all = tokens(text);
    let kept = without_tests(&all);
    let declared = |list: &[Token<'_>]| -> Vec<String> {
        let triples = list.windows(3).filter(|w| w.first().is_some_and(|t| t.text == "mod"));
        let open = triples.filter(|w| w.last().is_some_and(|t| t.text == ";"));
        open.filter_map(|w| w.get(1)).map(|t| t.text.to_owned()).collect()
    };
    let product = declared(&kept);
    let mut only_tests = Vec::new();
    for window in all.windows(3) {
        if let [keyword, name, end] = window
            && keyword.text == "mod"
            && end.text == ";"
            && !product.iter().any(|p| p == name.text)
        {
            only_tests.push(name.text);
        }
    }
    only_tests
}
