//! Configurations that are wrong: each file in `bad_configs/` has the report it must give beside it. The
//! report names file and line, quotes the text and says what was expected; those are also asserted one by one,
//! so that a golden file accepted without reading cannot lose them.
//!
//! `UPDATE_GOLDEN=1 cargo test -p tandem --test bad_configs` writes the reports anew; read the diff.

#![allow(clippy::unwrap_used, reason = "a test fails by panicking, its helpers too")]

use std::path::{Path, PathBuf};

use crypto::Secret;
use tandem::config_file::{KeyFileError, LoadError, Options, ProblemRow, Severity, load, parse};

fn folder() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/bad_configs")
}

fn keys(path: &Path) -> Result<Secret, KeyFileError> {
    let name = path.file_name().and_then(|name| name.to_str()).unwrap_or_default();
    match name {
        "pair.key" => Ok(Secret::from_slice(&[b'a'; 64])),
        "short.key" => Ok(Secret::from_slice(b"not sixty-four digits")),
        "open.psk" => Err(KeyFileError::Exposed { path: path.display().to_string(), mode: 0o644 }),
        _ => Ok(Secret::from_slice(b"a long enough pre-shared key")),
    }
}

/// The rows and the text of a bad file's report.
fn report(name: &str) -> (Vec<ProblemRow>, String) {
    let path = folder().join(format!("{name}.toml"));
    let text = std::fs::read_to_string(&path).unwrap();
    let options = Options { instance: Some("left".into()), ..Options::default() };
    let shown = format!("{name}.toml");
    match parse(&shown, &text, &options, &keys) {
        Ok(_) => panic!("{name} was taken"),
        Err(report) => (report.rows(), report.render(false)),
    }
}

/// Name; then for each error: line, offending text, a part of what is said, a part of what was expected.
type Case = (&'static str, &'static [(usize, &'static str, &'static str, &'static str)]);

const CASES: &[Case] = &[
    ("syntax", &[(3, "=", "syntax", "expected")]),
    (
        "unknown_key",
        &[
            (
                11,
                "hoem",
                "unknown key `hoem` in [endpoints.main]",
                "expected one of hold_down_s, home, lan, on_failure, preempt, wan, weight",
            ),
            (
                10,
                "main",
                "`endpoints.main.home` is missing",
                "expected `home`: the name of an instance",
            ),
        ],
    ),
    // An SPI names one of sixteen workers.
    ("workers", &[(24, "17", "workers", "a whole number of workers from 1 to 16")]),
    (
        "wrong_type",
        &[(2, "\"20\"", "`pair.heartbeat_ms` is a string", "whole number of milliseconds")],
    ),
    (
        "fence",
        &[(
            4,
            "90",
            "fence_after_ms 90 + heartbeat_ms 20 is more than dead_after_ms 100",
            "at most 80",
        )],
    ),
    ("equal_indices", &[(9, "0", "both have index 0", "0 for one and 1 for the other")]),
    (
        "names",
        &[
            (11, "\"lft\"", "home `lft` is no instance", "one of left, right"),
            (15, "\"mian\"", "there is no endpoint `mian`", "one of main"),
        ],
    ),
    (
        "same_address",
        &[(
            12,
            "\"203.0.113.10\"",
            "203.0.113.10 is a virtual address of endpoint `aux` already",
            "no other endpoint",
        )],
    ),
    (
        "adopt",
        &[(
            12,
            "interface",
            "`right` has to adopt it on failure, but has no WAN interface",
            "right = \"INTERFACE\"",
        )],
    ),
    (
        "inline_psk",
        &[(17, "psk", "secrets do not stand in this file", "psk_file = \"/etc/tandem/NAME.psk\"")],
    ),
    (
        "key_files",
        &[
            (2, "\"short.key\"", "does not hold a pair secret", "64 hexadecimal digits"),
            (
                17,
                "\"/etc/tandem/open.psk\"",
                "can be read or written by others (mode 0644)",
                "only its owner can read",
            ),
        ],
    ),
    ("certificates", &[(17, "certs", "certificates and EAP are not in this release", "psk_file")]),
    (
        "proposals",
        &[
            (
                18,
                "\"aes256-sha256-modp2048\"",
                "does not take \"aes256-sha256-modp2048\"",
                "aes256gcm16-prfsha384-x25519",
            ),
            (22, "\"aes256gcm16-modp2048\"", "does not take", "aes256gcm16-x25519"),
        ],
    ),
    ("encap", &[(22, "\"maybe\"", "encap", "\"auto\", \"always\" or \"never\"")]),
    (
        "selectors",
        &[
            (20, "\"10.1.0.1/24\"", "did you mean 10.1.0.0/24", "a network such as"),
            (21, "\"10.2.0.0/33\"", "longer than the address", "a network such as"),
        ],
    ),
    (
        "nobody_to_call",
        &[(23, "\"initiate\"", "there is nobody to initiate to", "start = \"respond\"")],
    ),
    (
        "links",
        &[
            (
                5,
                "\"10.1.0.1:4600\"",
                "uses a virtual address of endpoint `main`",
                "stays with its host",
            ),
            (8, "[\"172.31.0.2:4600\"]", "`left` has 2 links and `right` has 1", "the same order"),
        ],
    ),
    (
        "ipv6_outside",
        &[(12, "\"2001:db8::10\"", "IPv6 address 2001:db8::10 on the WAN side", "an IPv4 address")],
    ),
    (
        "many_at_once",
        &[
            (2, "heartbeat_s", "unknown key `heartbeat_s` in [pair]", "expected one of"),
            (1, "pair", "`pair.secret_file` is missing", "/etc/tandem/pair.key"),
            (9, "2", "does not take 2", "expected a whole number from 0 to 1"),
            (12, "\"203.0.113\"", "does not take \"203.0.113\"", "an address of this segment"),
            (
                16,
                "\"gw.example.org\"",
                "names are not resolved",
                "an IPv4 address, a list of them, or \"any\"",
            ),
        ],
    ),
];

#[test]
fn every_error_names_line_text_and_what_was_expected() {
    for (name, expected) in CASES {
        let (rows, shown) = report(name);
        let errors: Vec<&ProblemRow> =
            rows.iter().filter(|r| r.severity == Severity::Error).collect();
        for (line, text, message, hope) in *expected {
            let found = errors.iter().any(|r| {
                r.line == *line
                    && r.text == *text
                    && r.message.contains(message)
                    && r.expected.contains(hope)
            });
            assert!(
                found,
                "{name}: no error on line {line} at {text} saying {message} / {hope}\n{shown}\n{rows:#?}"
            );
            assert!(shown.contains(&format!("{name}.toml:{line}:")), "{name}: {shown}");
        }
    }
}

#[test]
fn reports_are_as_they_were() {
    let update = std::env::var_os("UPDATE_GOLDEN").is_some();
    for (name, _) in CASES {
        let (_, shown) = report(name);
        let path = folder().join(format!("{name}.report"));
        if update {
            std::fs::write(&path, format!("{shown}\n")).unwrap();
        }
        let golden = std::fs::read_to_string(&path).unwrap();
        assert_eq!(shown, golden.trim_end_matches('\n'), "{name}");
    }
}

#[test]
fn every_bad_file_is_a_case() {
    let mut files: Vec<String> = std::fs::read_dir(folder())
        .unwrap()
        .filter_map(|entry| {
            entry
                .unwrap()
                .file_name()
                .into_string()
                .unwrap()
                .strip_suffix(".toml")
                .map(str::to_owned)
        })
        .collect();
    let mut cases: Vec<&str> = CASES.iter().map(|(name, _)| *name).collect();
    files.sort();
    cases.sort_unstable();
    assert_eq!(files, cases);
}

#[test]
fn a_secret_written_inline_is_not_quoted() {
    let (rows, shown) = report("inline_psk");
    assert!(!shown.contains("hunter2"), "{shown}");
    assert!(!format!("{rows:?}").contains("hunter2"));
    // Neither when the line is no TOML at all.
    let text = "[connections.b]\nauth = { psk = \"hunter2 }\n";
    let options = Options::default();
    let report = parse("t.toml", text, &options, &keys).unwrap_err();
    assert!(!report.to_string().contains("hunter2"), "{report}");
}

#[test]
fn a_wrong_instance_name_says_which_there_are() {
    let sample = include_str!("../../../config/tandem.toml");
    let options = Options { host: "venus".into(), ..Options::default() };
    let report = parse("t.toml", sample, &options, &keys).unwrap_err().to_string();
    assert!(report.contains("there is no instance `venus`"), "{report}");
    assert!(report.contains("one of left, right"), "{report}");
    // Commands that only look at a file take its first instance.
    let options = Options { any_instance: true, ..options };
    assert_eq!(parse("t.toml", sample, &options, &keys).unwrap().config.local, 0);
}

#[test]
fn real_key_files_are_checked_on_disk() {
    use std::os::unix::fs::PermissionsExt;
    let folder = std::env::temp_dir().join(format!("tandem-keys-{}", std::process::id()));
    std::fs::create_dir_all(&folder).unwrap();
    let lone = include_str!("../../../config/lone.toml");
    let (config, psk) = (folder.join("tandem.toml"), folder.join("branch.psk"));
    std::fs::write(&config, lone).unwrap();
    let options = Options { host: "alpha".into(), ..Options::default() };
    let attempt =
        || load(&config, &options).map(|loaded| loaded.config.connections[0].ike.psk.duplicate());
    let refusal = || match attempt() {
        Err(LoadError::Invalid(report)) => report.to_string(),
        other => panic!("{other:?}"),
    };
    // Missing, open to others, empty, two lines, then right: with its line end cut.
    assert!(refusal().contains("tandem genkey"), "{}", refusal());
    std::fs::write(&psk, "a long enough pre-shared key\n").unwrap();
    std::fs::set_permissions(&psk, std::fs::Permissions::from_mode(0o640)).unwrap();
    assert!(refusal().contains("mode 0640"), "{}", refusal());
    assert!(refusal().contains("chmod 600"), "{}", refusal());
    std::fs::set_permissions(&psk, std::fs::Permissions::from_mode(0o600)).unwrap();
    assert_eq!(attempt().unwrap().expose(), b"a long enough pre-shared key");
    std::fs::write(&psk, "\n").unwrap();
    assert!(refusal().contains("is empty"), "{}", refusal());
    std::fs::write(&psk, "two\nlines\n").unwrap();
    assert!(refusal().contains("several lines") && !refusal().contains("two"), "{}", refusal());
    std::fs::remove_file(&psk).unwrap();
    std::fs::create_dir(&psk).unwrap();
    assert!(matches!(attempt(), Err(LoadError::Invalid(_))));
    std::fs::remove_dir_all(&folder).unwrap();
}
