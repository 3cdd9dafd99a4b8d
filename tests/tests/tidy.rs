//! The rules of ARCHITECTURE.md that a machine can check.

use std::path::{Path, PathBuf};

use lockstep_tests::cluster::repository;

/// Longest file of code, tests aside. Flat tables would be named here as exceptions; there are none.
const MAX_LINES: usize = 800;

/// Modules that must be functions of their arguments: no IO, no clock, nothing spawned.
/// (`gateway/src/router/discovery.rs` is the router's one door to the network.)
const PURE: [&str; 13] = [
    "worker/src/scheduler.rs",
    "worker/src/scheduler/",
    "worker/src/kv.rs",
    "worker/src/kv/",
    "worker/src/sampler.rs",
    "worker/src/sampler/",
    "worker/src/group/membership.rs",
    "worker/src/group/failure_detector.rs",
    "gateway/src/router.rs",
    "gateway/src/router/affinity.rs",
    "gateway/src/router/breaker.rs",
    "gateway/src/router/load.rs",
    "gateway/src/router/retry_budget.rs",
];

/// A source file: its path from the root, and its text up to its tests.
struct Source {
    path: String,
    code: String,
}

fn sources() -> Vec<Source> {
    let root = repository();
    let mut files = Vec::new();
    for room in ["proto", "gateway", "tokenizer-svc", "worker", "cli"] {
        collect(&root.join(room), &mut files);
    }
    assert!(files.len() > 100, "the sources were not found");
    files
        .into_iter()
        .map(|file| {
            let text = std::fs::read_to_string(&file).expect("a source file is text");
            let code = text.split("#[cfg(test)]\nmod tests {").next().unwrap_or_default().to_owned();
            let path = file.strip_prefix(&root).expect("it is below the root").display().to_string();
            Source { path, code }
        })
        .collect()
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).expect("a folder of the repository") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            let name = path.file_name().unwrap_or_default().to_string_lossy().into_owned();
            if name != "tests" && name != "benches" && name != "target" {
                collect(&path, files);
            }
        } else if path.extension().is_some_and(|extension| extension == "rs") && !is_test(&path) {
            files.push(path);
        }
    }
}

/// Tests that stand in files of their own.
fn is_test(path: &Path) -> bool {
    path.ends_with("tests.rs") || path.ends_with("simulation.rs")
}

/// Every source that `wrong` finds fault with.
fn check(rule: &str, wrong: impl Fn(&Source) -> bool) {
    let faults: Vec<String> = sources().into_iter().filter(|source| wrong(source)).map(|source| source.path).collect();
    assert!(faults.is_empty(), "{rule}: {faults:?}");
}

#[test]
fn pure_modules_read_no_clock_and_do_no_io() {
    let impure = ["Instant::now", "SystemTime::now", "std::fs", "std::net", "tokio::", "thread::spawn"];
    check("a pure module reaches outside", |source| {
        PURE.iter().any(|pure| source.path.starts_with(pure)) && impure.iter().any(|word| source.code.contains(word))
    });
}

#[test]
fn statuses_are_made_in_status_rs_alone() {
    let constructors = ["Status::new(", "Status::internal(", "Status::invalid_argument(", "Status::unavailable("];
    check("a tonic::Status is made outside status.rs", |source| {
        let is_service = ["gateway/", "tokenizer-svc/", "worker/"].iter().any(|room| source.path.starts_with(room));
        is_service
            && !source.path.ends_with("status.rs")
            && constructors.iter().any(|constructor| source.code.contains(constructor))
    });
}

#[test]
fn no_module_is_a_drawer() {
    check("a name that says nothing, or a mod.rs", |source| {
        ["utils", "common", "helpers", "misc", "mod"].iter().any(|name| source.path.ends_with(&format!("/{name}.rs")))
    });
    check("a file that is too long", |source| source.code.lines().count() > MAX_LINES);
}

#[test]
fn unsafe_code_lives_in_three_crates() {
    check("unsafe outside checkpoint, collectives and kernels", |source| {
        let nested = ["worker/checkpoint/", "worker/collectives/", "worker/kernels/"];
        let is_root = source.path.ends_with("src/lib.rs") || source.path == "cli/src/main.rs";
        is_root
            && !nested.iter().any(|crate_path| source.path.starts_with(crate_path))
            && !source.code.contains("#![forbid(unsafe_code)]")
    });
}

#[test]
fn every_module_says_what_it_is() {
    check("a file does not begin with //!", |source| !source.code.starts_with("//!"));
}
