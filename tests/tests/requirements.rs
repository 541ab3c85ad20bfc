//! Names of tests refer to rows of docs/requirements.md. Each of them has to be there, once.

use std::collections::BTreeSet;
use std::path::Path;

fn root() -> &'static Path {
    Path::new(concat!(env!("CARGO_MANIFEST_DIR"), "/.."))
}

/// `S-12` of every line that begins with `| S-12 |`.
fn rows() -> Vec<String> {
    let text = std::fs::read_to_string(root().join("docs/requirements.md")).expect("the catalogue");
    let ids = text.lines().filter_map(|line| {
        let id = line.strip_prefix("| ")?.split(' ').next()?;
        is_row(id).then(|| id.to_owned())
    });
    ids.collect()
}

fn is_row(id: &str) -> bool {
    let bytes = id.as_bytes();
    matches!(bytes, [b'A'..=b'Z', b'-', tens, ones] if tens.is_ascii_digit() && ones.is_ascii_digit())
}

/// The rows that a function's name refers to: `s10_z06_nothing` refers to S-10 and Z-06.
fn referred(name: &str) -> impl Iterator<Item = String> {
    name.split('_').filter_map(|part| match part.as_bytes() {
        [group @ b'a'..=b'z', tens, ones] if tens.is_ascii_digit() && ones.is_ascii_digit() => {
            let group = char::from(group.to_ascii_uppercase());
            Some(format!(
                "{group}-{}{}",
                char::from(*tens),
                char::from(*ones)
            ))
        }
        _ => None,
    })
}

fn functions(folder: &Path, found: &mut Vec<String>) {
    for entry in std::fs::read_dir(folder).expect("a folder") {
        let path = entry.expect("an entry").path();
        let name = path.file_name().unwrap_or_default().to_string_lossy();
        if path.is_dir() && name != "target" && !name.starts_with('.') {
            functions(&path, found);
        } else if path.extension().is_some_and(|it| it == "rs") {
            let text = std::fs::read_to_string(&path).expect("a source");
            let names = text.split("#[test]").skip(1).filter_map(|rest| {
                let name = rest.split("fn ").nth(1)?;
                name.split(['(', '<']).next().map(str::to_owned)
            });
            found.extend(names);
        }
    }
}

#[test]
fn names_of_tests_refer_to_rows_that_exist() {
    let rows = rows();
    let known: BTreeSet<_> = rows.iter().cloned().collect();
    assert_eq!(rows.len(), known.len(), "a row is there twice");
    let mut names = Vec::new();
    functions(root(), &mut names);
    let mut tested = BTreeSet::new();
    for name in &names {
        for row in referred(name) {
            assert!(known.contains(&row), "{name} refers to {row}");
            tested.insert(row);
        }
    }
    println!("{} of {} rows have a test", tested.len(), known.len());
    assert!(tested.len() > 150, "only {} rows were found", tested.len());
}
