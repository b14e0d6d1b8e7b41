//! The checks, on this workspace and on planted offenders.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::{Path, PathBuf};
use std::process::Command;

use purity::rules::{
    CRATES, Package, impurities, lint_faults, missing_from_clippy, packages, unsafe_lines,
    workspace_lint_faults, wrong_edges,
};
use purity::source::{test_modules, tokens, without_tests};

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("../..").canonicalize().unwrap()
}

fn metadata() -> Vec<Package> {
    let cargo = std::env::var("CARGO").unwrap_or_else(|_| "cargo".into());
    let output = Command::new(cargo)
        .args(["metadata", "--no-deps", "--offline", "--format-version", "1"])
        .current_dir(root())
        .output()
        .unwrap();
    assert!(output.status.success(), "{}", String::from_utf8_lossy(&output.stderr));
    packages(&String::from_utf8(output.stdout).unwrap()).unwrap()
}

fn read(path: &Path) -> String {
    std::fs::read_to_string(path).unwrap_or_else(|e| panic!("{}: {e}", path.display()))
}

/// Every .rs file below a folder, `target` left out.
fn sources(folder: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut folders = vec![folder.to_owned()];
    while let Some(folder) = folders.pop() {
        let Ok(entries) = std::fs::read_dir(&folder) else { continue };
        for entry in entries {
            let path = entry.unwrap().path();
            if path.is_dir() {
                if path.file_name().is_none_or(|name| name != "target") {
                    folders.push(path);
                }
            } else if path.extension().is_some_and(|e| e == "rs") {
                found.push(path);
            }
        }
    }
    found.sort();
    found
}

fn is_sans_io(name: &str) -> bool {
    CRATES.iter().any(|c| c.name == name && c.libraries.is_some())
}

fn sans_io() -> impl Iterator<Item = &'static str> {
    CRATES.iter().filter(|c| c.libraries.is_some()).map(|c| c.name)
}

#[test]
fn crates_import_each_other_exactly_as_architecture_says() {
    let wrong = wrong_edges(&metadata());
    assert!(wrong.is_empty(), "{wrong:#?}");
}

#[test]
fn an_edge_too_many_a_library_too_many_and_a_missing_crate_are_found() {
    let mut all = metadata();
    let change = |all: &mut Vec<Package>, name: &str, edit: fn(&mut Package)| {
        edit(all.iter_mut().find(|p| p.name == name).unwrap());
    };
    change(&mut all, "ike", |p| {
        p.normal.insert("esp".into());
    });
    change(&mut all, "ha", |p| {
        p.dev.insert("wire".into());
    });
    change(&mut all, "wire", |p| p.name = "wires".into());
    change(&mut all, "gateway", |p| {
        p.normal.insert("tokio".into());
    });
    change(&mut all, "lab", |p| {
        p.normal.insert("ike".into());
    });
    let wrong = wrong_edges(&all);
    for expected in [
        "ike may not use esp",
        "ha may not use wire, not even in tests",
        "crate wire is missing",
        "gateway may not name the library tokio",
        "the lab may not use ike",
    ] {
        assert!(wrong.iter().any(|w| w == expected), "{expected}: {wrong:#?}");
    }
    assert_eq!(wrong.len(), 5, "{wrong:#?}");
}

#[test]
fn every_sans_io_crate_disallows_clock_sockets_threads_and_random_maps() {
    for name in sans_io() {
        let missing =
            missing_from_clippy(&read(&root().join("crates").join(name).join("clippy.toml")));
        assert!(missing.is_empty(), "crates/{name}/clippy.toml lacks {missing:?}");
    }
    let whole = read(&root().join("crates/ike/clippy.toml"));
    let planted = whole.replace(
        "    { path = \"std::time::Instant::now\"",
        "    # { path = \"std::time::Instant::now\"",
    );
    assert_eq!(missing_from_clippy(&planted), ["std::time::Instant::now"]);
}

#[test]
fn no_sans_io_source_mentions_the_clock_threads_sockets_or_randomness() {
    let mut read_files = 0;
    let mut found = Vec::new();
    for name in sans_io() {
        let folder = root().join("crates").join(name).join("src");
        let files: Vec<(PathBuf, String)> =
            sources(&folder).into_iter().map(|path| (path.clone(), read(&path))).collect();
        let for_tests: Vec<String> =
            files.iter().flat_map(|(_, text)| test_modules(text)).map(str::to_owned).collect();
        for (path, text) in &files {
            let is_test = path.strip_prefix(&folder).unwrap().components().any(|c| {
                for_tests
                    .iter()
                    .any(|m| Path::new(c.as_os_str()).file_stem().is_some_and(|s| s == m.as_str()))
            });
            if is_test {
                continue;
            }
            read_files += 1;
            found.extend(
                impurities(name, text).into_iter().map(|f| format!("{}: {f}", path.display())),
            );
        }
    }
    assert!(read_files >= sans_io().count(), "only {read_files} files were read");
    assert!(found.is_empty(), "{found:#?}");
}

#[test]
fn planted_impurities_are_found_wherever_they_hide() {
    for (text, word) in [
        ("fn f() { let t = std::time::Instant::now(); }", "Instant"),
        ("use std::{fs, net::IpAddr};", "std::fs"),
        ("use std::{collections::{BTreeMap, HashMap}, fmt};", "HashMap"),
        ("use std::{fmt, thread::{self, sleep}};", "std::thread"),
        ("fn f() { std::thread::sleep(d) }", "std::thread"),
        ("#[allow(clippy::disallowed_methods)] fn f() {}", "disallowed_methods"),
        ("#[cfg(test)] mod tests { } fn f() { OsRng.next_u64(); }", "OsRng"),
        ("fn f<'a>(x: &'a str) { let q = '\"'; let s = UdpSocket::bind(x); }", "UdpSocket"),
        ("const S: &str = r#\"a\"b\"#; static M: Mutex<u8> = Mutex::new(0);", "Mutex"),
    ] {
        let found = impurities("ike", text);
        assert!(found.iter().any(|f| f.ends_with(&format!(": {word}"))), "{text}: {found:?}");
    }
    for clean in [
        "// Instant::now() is not for us\n/* std::thread /* nested */ HashMap */ fn f() {}",
        "const S: &str = \"std::fs \\\" HashMap\"; const C: char = '\\'';",
        "#[cfg(test)]\nmod tests { use super::*; fn f() { let x = [Instant::now()]; } }\nfn g() {}",
        "use std::{net::IpAddr, fmt, time::Duration};",
        "fn environment(thread: u8) { let fs = thread; }",
    ] {
        assert_eq!(impurities("ike", clean), Vec::<String>::new(), "{clean}");
    }
}

#[test]
fn test_code_is_what_is_marked_and_no_more() {
    let text = "mod a; #[cfg(test)] mod testutil; #[cfg(test)] use x::{y}; fn f() {} #[cfg(test)] mod tests { fn g() { if a {} } } fn h() {}";
    assert_eq!(test_modules(text), ["testutil"]);
    let all = tokens(text);
    let kept: Vec<&str> = without_tests(&all).iter().map(|t| t.text).collect();
    for (word, stays) in [("a", true), ("testutil", false), ("f", true), ("g", false), ("h", true)]
    {
        assert_eq!(kept.contains(&word), stays, "{word} in {kept:?}");
    }
}

#[test]
fn unsafe_lives_in_netio_alone() {
    let root = root();
    assert_eq!(workspace_lint_faults(&read(&root.join("Cargo.toml"))), Vec::<String>::new());
    for package in metadata() {
        let faults = lint_faults(&package.name, &read(Path::new(&package.manifest)));
        assert!(faults.is_empty(), "{faults:?}");
        if package.name == "netio" {
            continue;
        }
        let folder = Path::new(&package.manifest).parent().unwrap();
        for path in sources(folder) {
            let lines = unsafe_lines(&read(&path));
            assert!(lines.is_empty(), "{}: unsafe on lines {lines:?}", path.display());
        }
    }
    let netio = sources(&root.join("crates/netio/src"));
    let uses = netio.iter().filter(|path| !unsafe_lines(&read(path)).is_empty()).count();
    assert!(uses > 0, "netio without unsafe: this test reads the wrong files");
}

#[test]
fn planted_unsafe_and_loosened_lints_are_found() {
    let text = "// unsafe in a comment\nconst S: &str = \"unsafe\";\nfn f() { unsafe { g() } }\n#![allow(unsafe_code)]\n";
    assert_eq!(unsafe_lines(text), [3]);
    assert!(
        lint_faults("ike", "[package]\nname = \"ike\"\n[lints]\nworkspace = true\n").is_empty()
    );
    assert_eq!(lint_faults("ike", "[package]\n[lints]\n# workspace = true\n").len(), 1);
    assert_eq!(lint_faults("netio", "[lints]\nworkspace = true\n").len(), 1);
    assert_eq!(lint_faults("netio", "[lints.rust]\n[lints.clippy]\n").len(), 2);
    let root = read(&root().join("Cargo.toml"));
    assert!(
        !workspace_lint_faults(
            &root.replace("unsafe_code = \"forbid\"", "unsafe_code = \"allow\"")
        )
        .is_empty()
    );
    assert!(is_sans_io("gateway") && !is_sans_io("netio") && !is_sans_io("tandem"));
}
