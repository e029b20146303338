//! House rules that a compiler does not check: the edges between crates, file and function budgets, names.

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};

use olive_tests::workspace;

/// Which member may depend on which.
const EDGES: &[(&str, &[&str])] = &[
    ("olive-core", &[]),
    ("olive-quant", &["olive-core"]),
    ("olive-lora", &["olive-core", "olive-quant"]),
    ("olive-onnx", &["olive-core"]),
    ("olive-genai", &["olive-core", "olive-onnx"]),
];

/// Code lines that a file may have, tests not counted.
const FILE_LINES: usize = 800;

fn members() -> BTreeMap<&'static str, &'static [&'static str]> {
    EDGES.iter().copied().collect()
}

#[test]
fn libraries_depend_only_along_the_allowed_edges() {
    for (member, allowed) in members() {
        let manifest = std::fs::read_to_string(workspace().join(member).join("Cargo.toml")).unwrap();
        let dependencies = manifest.split("[dependencies]").nth(1).unwrap_or_default();
        let dependencies = dependencies.split("\n[").next().unwrap_or_default();
        for line in dependencies.lines().filter(|line| line.starts_with("olive-")) {
            let name: String = line
                .chars()
                .take_while(|c| c.is_ascii_lowercase() || *c == '-')
                .collect();
            assert!(
                allowed.contains(&name.as_str()),
                "{member} must not depend on {name}"
            );
        }
    }
}

#[test]
fn only_the_serialisation_module_names_prost() {
    for file in sources("olive-onnx/src") {
        let text = std::fs::read_to_string(&file).unwrap();
        let inside = file.components().any(|part| part.as_os_str() == "serde") || file.ends_with("serde.rs");
        assert!(
            inside || !text.contains("prost::"),
            "{} names prost",
            file.display()
        );
    }
    for crate_name in [
        "olive-core",
        "olive-quant",
        "olive-lora",
        "olive-genai",
        "olive-cli",
    ] {
        let manifest = std::fs::read_to_string(workspace().join(crate_name).join("Cargo.toml")).unwrap();
        assert!(!manifest.contains("prost"), "{crate_name} depends on prost");
    }
}

#[test]
fn files_stay_within_their_budget_and_have_telling_names() {
    const VAGUE: &[&str] = &[
        "utils.rs",
        "util.rs",
        "helpers.rs",
        "common.rs",
        "misc.rs",
        "mod.rs",
    ];
    for file in crate_sources() {
        let name = file.file_name().unwrap().to_str().unwrap();
        assert!(
            !VAGUE.contains(&name),
            "{}: a name that says nothing",
            file.display()
        );
        let text = std::fs::read_to_string(&file).unwrap();
        let lines = code_lines(&text);
        let table = text.lines().next().is_some_and(|line| line.contains("able"));
        assert!(
            lines <= FILE_LINES || table,
            "{}: {lines} lines of code",
            file.display()
        );
    }
}

#[test]
fn every_unsafe_block_is_in_a_kernel_a_memory_map_or_a_call_of_cuda() {
    for file in crate_sources() {
        let text = std::fs::read_to_string(&file).unwrap();
        let has = text
            .lines()
            .any(|l| l.contains("unsafe {") && !l.trim_start().starts_with("//"));
        let path = file.to_string_lossy();
        let allowed = ["kernels", "checkpoint.rs", "mmap.rs", "olive-core/src/cuda/"]
            .iter()
            .any(|part| path.contains(part));
        assert!(
            !has || allowed,
            "{path}: unsafe outside kernels, memory maps and CUDA"
        );
    }
}

#[test]
fn lint_exceptions_give_a_reason() {
    for file in crate_sources() {
        let text = std::fs::read_to_string(&file).unwrap();
        assert!(
            !text.contains("#[allow("),
            "{}: use #[expect(…, reason = …)]",
            file.display()
        );
    }
}

/// The sources of every library and of the binary.
fn crate_sources() -> impl Iterator<Item = PathBuf> {
    let folders = EDGES.iter().map(|(member, _)| *member).chain(["olive-cli"]);
    folders.flat_map(|folder| sources(&format!("{folder}/src")))
}

fn sources(folder: &str) -> Vec<PathBuf> {
    let mut files = Vec::new();
    collect(&workspace().join(folder), &mut files);
    assert!(!files.is_empty(), "{folder} has no sources");
    files
}

fn collect(folder: &Path, files: &mut Vec<PathBuf>) {
    for entry in std::fs::read_dir(folder).unwrap() {
        let path = entry.unwrap().path();
        if path.is_dir() {
            collect(&path, files);
        } else if path.extension().is_some_and(|e| e == "rs") {
            files.push(path);
        }
    }
}

/// Lines that are neither blank nor comments, up to the unit tests.
fn code_lines(text: &str) -> usize {
    let body = text.split("\n#[cfg(test)]").next().unwrap_or_default();
    body.lines()
        .map(str::trim)
        .filter(|line| !line.is_empty() && !line.starts_with("//"))
        .count()
}

#[test]
fn comments_and_tests_do_not_count_as_code() {
    assert_eq!(
        code_lines("//! doc\n\nfn a() {}\n// c\n\n#[cfg(test)]\nmod tests { }\n"),
        1
    );
}
