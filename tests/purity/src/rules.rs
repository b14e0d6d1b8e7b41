//! The rules: who may import whom, which libraries a sans-IO crate may name, which words it may not.

use std::collections::{BTreeMap, BTreeSet};

use serde_json::Value;

use crate::source::{Token, tokens, without_tests};

/// One row of architecture.md's table of crates.
pub struct Crate {
    /// Name of the package.
    pub name: &'static str,
    /// Crates of ours that it may import.
    pub uses: &'static [&'static str],
    /// For a sans-IO crate: other people's crates that it may name. `None`: it may name any.
    pub libraries: Option<&'static [&'static str]>,
}

/// architecture.md, "Crates". `gateway` is given the vocabulary of its parts (`wire`, `crypto`) too: ids and
/// secret types appear in their faces.
pub const CRATES: [Crate; 8] = [
    Crate { name: "wire", uses: &[], libraries: Some(&["thiserror"]) },
    Crate {
        name: "crypto",
        uses: &[],
        libraries: Some(&[
            "aes-gcm",
            "aws-lc-rs",
            "p256",
            "p384",
            "rand_core",
            "ring",
            "subtle",
            "thiserror",
            "x25519-dalek",
            "zeroize",
        ]),
    },
    Crate {
        name: "ike",
        uses: &["crypto", "wire"],
        libraries: Some(&["minicbor", "thiserror", "tracing", "zeroize"]),
    },
    Crate {
        name: "esp",
        uses: &["crypto", "wire"],
        libraries: Some(&["smallvec", "thiserror", "tracing", "zeroize"]),
    },
    Crate {
        name: "ha",
        uses: &[],
        libraries: Some(&["minicbor", "thiserror", "tracing", "zeroize"]),
    },
    Crate {
        name: "gateway",
        uses: &["crypto", "esp", "ha", "ike", "wire"],
        libraries: Some(&["minicbor", "serde", "thiserror", "tracing", "zeroize"]),
    },
    Crate { name: "netio", uses: &["wire"], libraries: None },
    Crate {
        name: "tandem",
        uses: &["crypto", "esp", "gateway", "ha", "ike", "netio", "wire"],
        libraries: None,
    },
];

/// The lab may use no product crate but netio: it must not share a bug with what it judges.
pub const LAB_USES: &[&str] = &["netio"];

/// Paths that every sans-IO crate's clippy.toml must disallow.
pub const DISALLOWED: [&str; 14] = [
    "std::time::Instant::now",
    "std::time::SystemTime::now",
    "std::thread::spawn",
    "std::thread::sleep",
    "std::env::var",
    "std::collections::HashMap",
    "std::collections::HashSet",
    "std::net::UdpSocket",
    "std::net::TcpStream",
    "std::net::TcpListener",
    "std::fs::File",
    "std::sync::Mutex",
    "rand_core::OsRng",
    "disallowed-methods",
];

/// Identifiers that a sans-IO crate may not mention outside its tests.
const BANNED_WORDS: [&str; 24] = [
    "Instant",
    "SystemTime",
    "UdpSocket",
    "TcpStream",
    "TcpListener",
    "UnixStream",
    "UnixListener",
    "UnixDatagram",
    "OsRng",
    "ThreadRng",
    "thread_rng",
    "getrandom",
    "SystemRandom",
    "HashMap",
    "HashSet",
    "RandomState",
    "Mutex",
    "RwLock",
    "thread_local",
    "tokio",
    "libc",
    "println",
    "eprintln",
    "disallowed_methods",
];

/// Modules of std that a sans-IO crate may not name.
const BANNED_STD: [&str; 5] = ["thread", "fs", "process", "env", "os"];

/// Exceptions, each with its reason: crate, word, why.
pub const EXCEPTIONS: [(&str, &str, &str); 0] = [];

/// What `cargo metadata` says about one workspace package.
pub struct Package {
    /// Its name.
    pub name: String,
    /// Path of its Cargo.toml.
    pub manifest: String,
    /// Names of what it depends on for building and running.
    pub normal: BTreeSet<String>,
    /// Names of what only its tests depend on.
    pub dev: BTreeSet<String>,
}

/// Reads the packages from the JSON of `cargo metadata --no-deps --format-version 1`.
///
/// # Errors
/// What is missing from the document.
pub fn packages(metadata: &str) -> Result<Vec<Package>, String> {
    let value: Value = serde_json::from_str(metadata).map_err(|e| e.to_string())?;
    let list = value.get("packages").and_then(Value::as_array).ok_or("no packages")?;
    list.iter().map(package).collect()
}

fn package(value: &Value) -> Result<Package, String> {
    let text = |value: &Value, key: &str| {
        value.get(key).and_then(Value::as_str).map(str::to_owned).ok_or(format!("no {key}"))
    };
    let (mut normal, mut dev) = (BTreeSet::new(), BTreeSet::new());
    let dependencies =
        value.get("dependencies").and_then(Value::as_array).ok_or("no dependencies")?;
    for dependency in dependencies {
        // `name` is the package's own name: a renamed dependency cannot hide.
        let name = text(dependency, "name")?;
        match dependency.get("kind").and_then(Value::as_str) {
            Some("dev") => dev.insert(name),
            _ => normal.insert(name),
        };
    }
    Ok(Package { name: text(value, "name")?, manifest: text(value, "manifest_path")?, normal, dev })
}

/// Edges between our crates, and to libraries, that the table does not have; crates that are missing.
#[must_use]
pub fn wrong_edges(packages: &[Package]) -> Vec<String> {
    let ours: BTreeSet<&str> = CRATES.iter().map(|c| c.name).collect();
    let mut wrong = Vec::new();
    for row in &CRATES {
        let Some(package) = packages.iter().find(|p| p.name == row.name) else {
            wrong.push(format!("crate {} is missing", row.name));
            continue;
        };
        let internal = |set: &BTreeSet<String>| -> BTreeSet<String> {
            set.iter().filter(|name| ours.contains(name.as_str())).cloned().collect()
        };
        let expected: BTreeSet<String> = row.uses.iter().map(|s| (*s).to_owned()).collect();
        let actual = internal(&package.normal);
        for extra in actual.difference(&expected) {
            wrong.push(format!("{} may not use {extra}", row.name));
        }
        for extra in internal(&package.dev).difference(&expected) {
            wrong.push(format!("{} may not use {extra}, not even in tests", row.name));
        }
        if let Some(allowed) = row.libraries {
            let foreign = package.normal.iter().filter(|name| !ours.contains(name.as_str()));
            for library in foreign.filter(|name| !allowed.contains(&name.as_str())) {
                wrong.push(format!("{} may not name the library {library}", row.name));
            }
        }
    }
    if let Some(lab) = packages.iter().find(|p| p.name == "lab") {
        let all = lab.normal.union(&lab.dev).map(String::as_str);
        let product = all.filter(|name| ours.contains(name) && !LAB_USES.contains(name));
        wrong.extend(product.map(|name| format!("the lab may not use {name}")));
    }
    wrong
}

/// The disallowed paths that a clippy.toml lacks.
#[must_use]
pub fn missing_from_clippy(text: &str) -> Vec<&'static str> {
    let code: Vec<&str> = text.lines().map(str::trim).filter(|l| !l.starts_with('#')).collect();
    let has = |path: &str| {
        let quoted = format!("\"{path}\"");
        code.iter().any(|line| line.contains(&quoted) || line.starts_with(path))
    };
    DISALLOWED.into_iter().filter(|path| !has(path)).collect()
}

/// What a sans-IO crate's source file mentions that it may not, outside of its tests.
#[must_use]
pub fn impurities(name: &str, text: &str) -> Vec<String> {
    let all = tokens(text);
    let code = without_tests(&all);
    let excused = |word: &str| EXCEPTIONS.iter().any(|(c, w, _)| *c == name && *w == word);
    let mut found = Vec::new();
    let mut note = |word: &str, line: usize| {
        if !excused(word) {
            found.push(format!("line {line}: {word}"));
        }
    };
    for (i, token) in code.iter().enumerate() {
        if BANNED_WORDS.contains(&token.text) {
            note(token.text, token.line);
        }
        if token.text == "std" && follows(&code, i + 1, "::") {
            for module in named_modules(&code, i + 2) {
                if BANNED_STD.contains(&module.text) {
                    note(&format!("std::{}", module.text), module.line);
                }
            }
        }
    }
    found
}

fn follows(code: &[Token<'_>], at: usize, text: &str) -> bool {
    code.get(at).is_some_and(|token| token.text == text)
}

/// `std::X` names X; `std::{X, Y::Z}` names X and Y.
fn named_modules<'c, 't>(code: &'c [Token<'t>], at: usize) -> Vec<&'c Token<'t>> {
    if !follows(code, at, "{") {
        return code.get(at).into_iter().collect();
    }
    let mut named = Vec::new();
    let mut depth = 0;
    let mut fresh = false;
    for token in code.iter().skip(at) {
        match token.text {
            "{" => {
                depth += 1;
                fresh = depth == 1;
            }
            "}" => {
                depth -= 1;
                if depth == 0 {
                    break;
                }
            }
            "," => fresh = depth == 1,
            _ => {
                if fresh {
                    named.push(token);
                }
                fresh = false;
            }
        }
    }
    named
}

/// Lines of a source file where code says `unsafe` (comments and strings may).
#[must_use]
pub fn unsafe_lines(text: &str) -> Vec<usize> {
    tokens(text).iter().filter(|token| token.text == "unsafe").map(|token| token.line).collect()
}

/// What is wrong with the lints of a package: everybody takes the workspace's, which forbid `unsafe`.
#[must_use]
pub fn lint_faults(name: &str, manifest: &str) -> Vec<String> {
    let sections = sections(manifest);
    let inherits = sections.get("lints").is_some_and(|lines| lines.contains("workspace = true"));
    match (name, inherits) {
        ("netio", true) => vec!["netio cannot forbid unsafe and use it".to_owned()],
        ("netio", false) => {
            let rust = sections.get("lints.rust").cloned().unwrap_or_default();
            let clippy = sections.get("lints.clippy").cloned().unwrap_or_default();
            let mut faults = Vec::new();
            if !rust.contains("unsafe_op_in_unsafe_fn") {
                faults.push("netio: every unsafe operation must stand in a block".to_owned());
            }
            if !clippy.contains("undocumented_unsafe_blocks") {
                faults.push("netio: every unsafe block must say why it is sound".to_owned());
            }
            faults
        }
        (_, true) => Vec::new(),
        (name, false) => vec![format!("{name} does not take the workspace's lints")],
    }
}

/// What is wrong with the lints of the workspace.
#[must_use]
pub fn workspace_lint_faults(manifest: &str) -> Vec<String> {
    let sections = sections(manifest);
    let rust = sections.get("workspace.lints.rust").cloned().unwrap_or_default();
    let forbids = rust.lines().any(|line| line == "unsafe_code = \"forbid\"");
    if forbids { Vec::new() } else { vec!["the workspace does not forbid unsafe_code".to_owned()] }
}

/// A manifest's tables with their lines, comments left out.
fn sections(manifest: &str) -> BTreeMap<String, String> {
    let mut sections: BTreeMap<String, String> = BTreeMap::new();
    let mut current = String::new();
    for line in manifest.lines().map(str::trim).filter(|line| !line.starts_with('#')) {
        match line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            Some(name) => current = name.to_owned(),
            None => {
                let lines = sections.entry(current.clone()).or_default();
                lines.push_str(line);
                lines.push('\n');
            }
        }
    }
    sections
}
