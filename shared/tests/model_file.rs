//! `docs/model-file.md` is held to the code: its example is a manifest, and its table names every field of one, and no other.
#![cfg(feature = "std")]
#![allow(
    clippy::unwrap_used,
    reason = "a test stops at the first fault; its helpers too"
)]

use std::collections::BTreeSet;

use serde_json::Value;
use shared::manifest::{FORMAT_VERSION, Manifest, Validation};

const DOCUMENT: &str = include_str!("../../docs/model-file.md");

fn example() -> &'static str {
    let (_, rest) = DOCUMENT.split_once("```json\n").unwrap();
    rest.split_once("```").unwrap().0
}

/// Dotted names of the fields in the first column of the table under `pe.manifest`.
fn documented() -> BTreeSet<String> {
    let (_, section) = DOCUMENT.split_once("## `pe.manifest`").unwrap();
    let rows = section.lines().filter_map(|line| line.strip_prefix("| `"));
    rows.map(|row| row.split_once('`').unwrap().0.to_owned())
        .collect()
}

/// The same of a JSON value; `tools` has keys of its own.
fn fields(name: &str, value: &Value, found: &mut BTreeSet<String>) {
    match value {
        Value::Object(object) if name != "tools" => {
            for (key, value) in object {
                let name = if name.is_empty() {
                    key.clone()
                } else {
                    format!("{name}.{key}")
                };
                fields(&name, value, found);
            }
        }
        Value::Array(values) => {
            for value in values {
                fields(&format!("{name}[]"), value, found);
            }
        }
        _ => _ = found.insert(name.to_owned()),
    }
}

#[test]
fn the_document_s_example_and_table_are_what_the_code_reads() {
    let manifest = Manifest::from_json(example()).unwrap();
    assert_eq!(manifest.format_version, FORMAT_VERSION);
    assert_eq!(manifest.validation, Validation::Validated);
    // Written again, every field is there, in whatever way the example left one out.
    let written: Value = serde_json::from_str(&manifest.to_json()).unwrap();
    assert_eq!(written, serde_json::from_str::<Value>(example()).unwrap());
    let mut found = BTreeSet::new();
    fields("", &written, &mut found);
    assert_eq!(documented(), found);
}
