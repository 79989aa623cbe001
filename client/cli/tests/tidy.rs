//! Lints the repository itself: what rustfmt and clippy don't see. Every check lists all offenders.
//!
//! Looks at the files git tracks (or, without git, at all but build output). Words that must not
//! occur are put together with `concat!`, so that this file passes its own checks.

use std::collections::BTreeSet;
use std::path::{Component, Path, PathBuf};
use std::process::Command;

/// Past this a file holds two ideas.
const LINES_MAX: usize = 800;
/// The only crate with `unsafe`.
const UNSAFE_HOME: &str = "dataplane/ring/";
/// Folders of the layout in ARCHITECTURE.md.
const FOLDERS: &[&str] = &[
    "dataplane/protocol",
    "dataplane/ring",
    "dataplane/store",
    "dataplane/s3",
    "metaplane/protocol",
    "metaplane/namespace",
    "controller",
    "client/rpc",
    "client/fuse",
    "client/cli",
    "bench/model",
    "bench/history",
    "scripts",
    "docs/adr",
    "tests/e2e",
];
/// What every record of a decision answers, in this order.
const ADR_HEADINGS: &[&str] =
    &["## Context", "## Choice", "## Alternatives", "## Consequences", "## When to revisit"];
/// Where Cargo.lock may point.
const CRATES_IO: &str = "registry+https://github.com/rust-lang/crates.io-index";
/// Files whose text is not ours.
const FOREIGN: &[&str] = &["Cargo.lock", "fuzz/Cargo.lock", "LICENSE-APACHE", "LICENSE-MIT"];
/// Inputs of fuzz targets, some of which happen to be text.
const BYTES: &str = "fuzz/seeds/";

/// A tracked text file.
struct Source {
    /// Path from the root, with `/`.
    path: String,
    text: String,
}

impl Source {
    fn is_rust(&self) -> bool {
        self.path.ends_with(".rs")
    }
    fn is_markdown(&self) -> bool {
        self.path.ends_with(".md")
    }
    fn is_foreign(&self) -> bool {
        FOREIGN.contains(&self.path.as_str()) || self.path.starts_with(BYTES)
    }
}

fn root() -> PathBuf {
    let cli = Path::new(env!("CARGO_MANIFEST_DIR"));
    cli.ancestors().nth(2).expect("client/cli is two levels down").to_path_buf()
}

/// What git tracks below `root`; `None` if git is missing, refuses, or tracks nothing here.
fn tracked(root: &Path) -> Option<Vec<String>> {
    let out = Command::new("git").arg("-C").arg(root).args(["ls-files", "-z"]).output().ok()?;
    let names = String::from_utf8(out.stdout).ok()?;
    let names: Vec<_> = names.split_terminator('\0').map(str::to_owned).collect();
    (out.status.success() && !names.is_empty()).then_some(names)
}

/// All files below `dir` but build output and hidden folders.
fn walk(root: &Path, dir: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(dir).expect("a folder of the repository").flatten() {
        let name = entry.file_name();
        if [".git", ".ebb", "target", "__pycache__"].iter().any(|n| name == *n) {
            continue;
        }
        let path = entry.path();
        if path.is_dir() {
            walk(root, &path, found);
        } else if let Ok(below) = path.strip_prefix(root) {
            found.push(below.to_string_lossy().into_owned());
        }
    }
}

/// The repository's text files, in order of their paths.
fn sources() -> Vec<Source> {
    let root = root();
    let mut paths = tracked(&root).unwrap_or_else(|| {
        let mut found = Vec::new();
        walk(&root, &root, &mut found);
        found
    });
    paths.sort();
    let read = |path: String| {
        // A file that was deleted but not yet committed, or one that is no text, has no text.
        let text = std::fs::read_to_string(root.join(&path)).ok()?;
        Some(Source { path, text })
    };
    let sources: Vec<_> = paths.into_iter().filter_map(read).collect();
    assert!(sources.iter().any(|s| s.path == "Cargo.toml"), "not a checkout: {}", root.display());
    sources
}

/// Fails with every offender.
fn none(rule: &str, offenders: &[String]) {
    assert!(
        offenders.is_empty(),
        "{rule}: {} found\n  {}",
        offenders.len(),
        offenders.join("\n  ")
    );
}

/// `path:line: text` of every line of `text` that `hit` names.
fn lines(path: &str, text: &str, hit: impl Fn(&str) -> bool) -> Vec<String> {
    let numbered = text.lines().enumerate().filter(|(_, line)| hit(line));
    numbered.map(|(n, line)| format!("{path}:{}: {}", n + 1, line.trim())).collect()
}

/// Whether `word` occurs in `line` as a word of its own.
fn has_word(line: &str, word: &str) -> bool {
    let part_of_word = |c: char| c.is_alphanumeric() || c == '_';
    line.match_indices(word).any(|(at, _)| {
        !line[..at].ends_with(part_of_word) && !line[at + word.len()..].starts_with(part_of_word)
    })
}

/// Rust source with comments and the insides of literals blanked; lines stay where they were.
fn code_only(text: &str) -> String {
    let chars: Vec<char> = text.chars().collect();
    let at = |i: usize| chars.get(i).copied().unwrap_or('\0');
    let mut out = String::with_capacity(text.len());
    let mut i = 0;
    let mut in_word = false;
    while i < chars.len() {
        let start = i;
        let c = chars[i];
        let raw_hashes = (0..).take_while(|n| at(i + 1 + n) == '#').count();
        if c == '/' && at(i + 1) == '/' {
            while i < chars.len() && chars[i] != '\n' {
                i += 1;
            }
        } else if c == '/' && at(i + 1) == '*' {
            let mut depth = 0;
            while i < chars.len() {
                match (chars[i], at(i + 1)) {
                    ('/', '*') => (depth, i) = (depth + 1, i + 2),
                    ('*', '/') => (depth, i) = (depth - 1, i + 2),
                    _ => i += 1,
                }
                if depth == 0 {
                    break;
                }
            }
        } else if c == 'r' && at(i + 1 + raw_hashes) == '"' && !in_word {
            i += raw_hashes + 2;
            let closes = |i: usize| at(i) == '"' && (1..=raw_hashes).all(|n| at(i + n) == '#');
            while i < chars.len() && !closes(i) {
                i += 1;
            }
            i += raw_hashes + 1;
        } else if c == '"' {
            i += 1;
            while i < chars.len() && chars[i] != '"' {
                i += if chars[i] == '\\' { 2 } else { 1 };
            }
            i += 1;
        } else if c == '\'' && at(i + 1) == '\\' {
            i += 3;
            while i < chars.len() && chars[i] != '\'' {
                i += 1;
            }
            i += 1;
        } else if c == '\'' && at(i + 2) == '\'' {
            i += 3;
        } else {
            // Code. A prefix as in br"…" ends a word that began right before it.
            in_word = (in_word || c != 'b') && (c == '_' || c.is_alphanumeric());
            out.push(c);
            i += 1;
            continue;
        }
        in_word = false;
        let blanked = &chars[start..i.min(chars.len())];
        out.extend(blanked.iter().map(|c| if *c == '\n' { '\n' } else { ' ' }));
    }
    out
}

/// `a/./b/../c` as `a/c`; `None` if it leaves the repository.
fn normal(path: &Path) -> Option<PathBuf> {
    let mut out = PathBuf::new();
    for part in path.components() {
        match part {
            Component::Normal(name) => out.push(name),
            Component::ParentDir => out.pop().then_some(())?,
            Component::CurDir => {}
            Component::RootDir | Component::Prefix(_) => return None,
        }
    }
    Some(out)
}

/// The value of `key = "value"` in an attribute line.
fn quoted_after<'a>(line: &'a str, key: &str) -> Option<&'a str> {
    line.trim_start().strip_prefix(key)?.split('"').nth(1)
}

#[test]
fn every_module_says_what_it_is_for() {
    let sources = sources();
    let mut included = BTreeSet::new();
    for s in sources.iter().filter(|s| s.is_rust()) {
        let folder = Path::new(&s.path).parent().expect("a file has a folder");
        for file in s.text.lines().filter_map(|l| quoted_after(l, "#[path")) {
            included.extend(normal(&folder.join(file)));
        }
    }
    let offenders: Vec<_> = sources
        .iter()
        .filter(|s| s.is_rust() && format!("/{}", s.path).contains("/src/"))
        .filter(|s| !included.contains(Path::new(&s.path)) && !s.text.starts_with("//!"))
        .map(|s| s.path.clone())
        .collect();
    none(
        "a module starts with //! (what it is for, its invariants, what it does not do)",
        &offenders,
    );
}

#[test]
fn no_file_is_too_long() {
    let long = |s: &Source| (s.text.lines().count(), s.path.clone());
    let offenders: Vec<_> = sources()
        .iter()
        .filter(|s| !s.is_foreign())
        .map(long)
        .filter(|(count, _)| *count > LINES_MAX)
        .map(|(count, path)| format!("{path}: {count} lines"))
        .collect();
    none(&format!("a file has at most {LINES_MAX} lines"), &offenders);
}

#[test]
fn unsafe_code_is_in_the_ring_only() {
    let keyword = concat!("un", "safe");
    let lint = concat!("un", "safe_code");
    let mut offenders = Vec::new();
    for s in sources().iter().filter(|s| s.is_rust() && !s.path.starts_with(UNSAFE_HOME)) {
        let hit = |line: &str| has_word(line, keyword) || has_word(line, lint);
        offenders.extend(lines(&s.path, &code_only(&s.text), hit));
    }
    none(&format!("{keyword} code is in {UNSAFE_HOME} only"), &offenders);
}

#[test]
fn nothing_is_left_for_later() {
    let words = [concat!("TO", "DO"), concat!("FIX", "ME"), concat!("XX", "X")];
    let macros = [concat!("to", "do!"), concat!("unimple", "mented!")];
    let mut offenders = Vec::new();
    for s in sources().iter().filter(|s| !s.is_foreign()) {
        offenders.extend(lines(&s.path, &s.text, |l| words.iter().any(|w| has_word(l, w))));
        if s.is_rust() {
            let hit = |l: &str| macros.iter().any(|m| l.contains(m));
            offenders.extend(lines(&s.path, &code_only(&s.text), hit));
        }
    }
    none("nothing is left for later", &offenders);
}

#[test]
fn no_test_is_switched_off() {
    let attribute = concat!("#[ign", "ore");
    let mut offenders = Vec::new();
    for s in sources().iter().filter(|s| s.is_rust()) {
        offenders.extend(lines(&s.path, &code_only(&s.text), |l| l.contains(attribute)));
    }
    none("every test runs", &offenders);
}

#[test]
fn no_line_ends_in_white_space() {
    let mut offenders = Vec::new();
    for s in sources().iter().filter(|s| !s.is_foreign()) {
        offenders.extend(lines(&s.path, &s.text, |l| l.ends_with([' ', '\t', '\r'])));
        if !s.text.is_empty() && (!s.text.ends_with('\n') || s.text.ends_with("\n\n")) {
            offenders.push(format!("{}: ends in no or in several line ends", s.path));
        }
    }
    none("no line ends in white space", &offenders);
}

#[test]
fn no_file_names_somebodys_machine() {
    let here = root().to_string_lossy().into_owned();
    // Where people and build machines keep their checkouts.
    let places = [concat!("/wo", "rk/"), concat!("/work", "space/"), concat!("/ho", "me/")];
    let places = places.map(str::to_owned);
    let users = concat!("/Us", "ers/").to_owned();
    let mut offenders = Vec::new();
    for s in sources().iter().filter(|s| !s.is_foreign()) {
        let hit = |line: &str| {
            let absolute = |place: &String| {
                line.match_indices(place.as_str()).any(|(at, _)| {
                    let before = line[..at].chars().next_back();
                    !before.is_some_and(|c| c.is_alphanumeric() || "_-.*}/$".contains(c))
                })
            };
            // A checkout in `/src` or the like is no name worth looking for.
            (here.len() > 8 && line.contains(&here)) || places.iter().chain([&users]).any(absolute)
        };
        offenders.extend(lines(&s.path, &s.text, hit));
    }
    none("no file names a path of somebody's machine", &offenders);
}

#[test]
fn packages_come_from_the_public_registries() {
    let mut offenders = Vec::new();
    for s in sources() {
        if s.path.ends_with("Cargo.lock") {
            let foreign = |l: &str| quoted_after(l, "source").is_some_and(|v| v != CRATES_IO);
            offenders.extend(lines(&s.path, &s.text, foreign));
            continue;
        }
        // Settings that name a mirror.
        let marks = [
            concat!("index", "-url"),
            concat!("replace", "-with"),
            concat!("arti", "factory"),
            concat!("/sim", "ple/"),
            concat!("PIP_", "INDEX"),
        ];
        offenders.extend(lines(&s.path, &s.text, |l| marks.iter().any(|m| l.contains(m))));
    }
    none("no file names a mirror of a package registry", &offenders);
}

#[test]
fn decisions_are_numbered_without_gaps_and_complete() {
    let mut offenders = Vec::new();
    let mut numbers = Vec::new();
    let sources = sources();
    let index = sources.iter().find(|s| s.path == "docs/adr/README.md");
    for s in sources.iter().filter(|s| s.path.starts_with("docs/adr/") && s.is_markdown()) {
        let name = s.path.rsplit('/').next().unwrap_or_default();
        if name == "README.md" {
            continue;
        }
        match name.split_once('-').and_then(|(n, _)| Some((n, n.parse::<usize>().ok()?))) {
            Some((digits, n)) if digits.len() == 4 => numbers.push(n),
            _ => offenders.push(format!("{}: is not NNNN-title.md", s.path)),
        }
        let mut rest = s.text.lines();
        for heading in ADR_HEADINGS {
            if !rest.any(|l| l.trim_end() == *heading) {
                offenders.push(format!("{}: {heading} is missing or out of order", s.path));
                break;
            }
        }
        if !index.is_some_and(|i| i.text.contains(name)) {
            offenders.push(format!("docs/adr/README.md does not list {name}"));
        }
    }
    for (want, n) in (1..).zip(&numbers) {
        if *n != want {
            offenders.push(format!("docs/adr: {n:04} where {want:04} is next"));
            break;
        }
    }
    none("decisions are numbered 0001, 0002, … and have all headings", &offenders);
}

#[test]
fn the_folders_are_where_the_architecture_says() {
    let root = root();
    let missing: Vec<_> =
        FOLDERS.iter().filter(|f| !root.join(f).is_dir()).map(|f| (*f).to_owned()).collect();
    none("folders of ARCHITECTURE.md's layout", &missing);
}

#[test]
fn links_between_pages_lead_somewhere() {
    let root = root();
    let mut offenders = Vec::new();
    for s in sources().iter().filter(|s| s.is_markdown()) {
        let folder = Path::new(&s.path).parent().expect("a file has a folder");
        for (n, line) in s.text.lines().enumerate() {
            for link in line.split("](").skip(1).filter_map(|l| l.split(')').next()) {
                let file = link.split('#').next().unwrap_or_default();
                if file.is_empty() || file.contains("://") || file.starts_with("mailto:") {
                    continue;
                }
                let there = normal(&folder.join(file)).is_some_and(|p| root.join(p).exists());
                if !there {
                    offenders.push(format!("{}:{}: {link}", s.path, n + 1));
                }
            }
        }
    }
    none("links lead to files that exist", &offenders);
}

#[test]
fn tests_that_the_pages_name_exist() {
    let sources = sources();
    let code = |s: &&Source| s.is_rust() || s.path.ends_with(".py");
    let part_of_name = |c: char| c.is_ascii_alphanumeric() || c == '_';
    let known: BTreeSet<&str> =
        sources.iter().filter(code).flat_map(|s| s.text.split(|c| !part_of_name(c))).collect();
    let mut offenders = Vec::new();
    for s in sources.iter().filter(|s| s.is_markdown()) {
        for (n, line) in s.text.lines().enumerate() {
            // Inside backquotes; names this long are those of tests.
            for name in line.split('`').skip(1).step_by(2) {
                let lower = name.chars().all(|c| part_of_name(c) && !c.is_ascii_uppercase());
                let long = name.matches('_').count() >= 3 && lower;
                if long && !known.contains(name) {
                    offenders.push(format!("{}:{}: {name}", s.path, n + 1));
                }
            }
        }
    }
    none("tests that the pages name exist", &offenders);
}

#[test]
fn comments_and_literals_are_told_from_code() {
    let text =
        "a /* x /* y */ z */ b // c\nlet s = \"d \\\" e\"; 'f' '\\n' 'g: r#\"h\"i\"# br\"j\" xr k";
    let code = code_only(text);
    assert_eq!(code.lines().count(), 2);
    let words: Vec<_> =
        code.split(|c: char| !c.is_alphanumeric()).filter(|w| !w.is_empty()).collect();
    assert_eq!(words, ["a", "b", "let", "s", "g", "b", "xr", "k"]);
    assert!(has_word("x = foo();", "foo") && !has_word("food", "foo"));
}
