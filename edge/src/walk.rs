//! Walks the paths of a command line to single files, in an order that depends on names alone.
//!
//! In: paths. Out, through a callback: each regular file, or a path with the reason why it is none. A folder's entries come
//! sorted by the bytes of their names, folders in their place among the files. Paths on the command line may be symbolic links;
//! inside folders a link to a file is followed and a link to a folder is not, so no loop can be walked. Pipes, sockets and devices
//! are never opened. What is in a file is left to others.

use std::fs;
use std::io;
use std::ops::ControlFlow;
use std::path::{Path, PathBuf};

use crate::wire::Reason;

/// Folders are walked to this depth.
pub(crate) const MAX_DEPTH: usize = 32;
/// Entries of one folder that are looked at; more are refused by one reason for the folder.
pub(crate) const MAX_FOLDER_ENTRIES: usize = 1_000_000;

/// Receives a file, or a path and why it is not read.
pub(crate) type Visit<'a> = dyn FnMut(&Path, Result<(), Reason>) -> ControlFlow<()> + 'a;

/// Walks `paths` in their order.
pub(crate) fn walk(paths: &[PathBuf], visit: &mut Visit<'_>) -> ControlFlow<()> {
    paths.iter().try_for_each(|path| match fs::metadata(path) {
        Ok(metadata) if metadata.is_dir() => folder(path, 1, visit),
        Ok(metadata) => file(path, &metadata, visit),
        Err(error) => visit(path, Err(unreadable(&error))),
    })
}

fn folder(path: &Path, depth: usize, visit: &mut Visit<'_>) -> ControlFlow<()> {
    if depth > MAX_DEPTH {
        let text = format!("the folder lies deeper than {MAX_DEPTH} folders");
        return visit(path, Err(Reason::new("folder-depth", text)));
    }
    let entries: io::Result<Vec<PathBuf>> = fs::read_dir(path).and_then(|entries| {
        let paths = entries.map(|entry| entry.map(|entry| entry.path()));
        paths.take(MAX_FOLDER_ENTRIES + 1).collect()
    });
    let mut entries = match entries {
        Ok(entries) => entries,
        Err(error) => return visit(path, Err(unreadable(&error))),
    };
    if entries.len() > MAX_FOLDER_ENTRIES {
        let text = format!("the folder has more than {MAX_FOLDER_ENTRIES} entries");
        return visit(path, Err(Reason::new("folder-size", text)));
    }
    entries.sort_unstable();
    entries
        .iter()
        .try_for_each(|path| entry(path, depth, visit))
}

fn entry(path: &Path, depth: usize, visit: &mut Visit<'_>) -> ControlFlow<()> {
    let metadata = match fs::symlink_metadata(path) {
        Ok(metadata) if metadata.is_dir() => return folder(path, depth + 1, visit),
        Ok(metadata) if metadata.is_symlink() => fs::metadata(path),
        other => other,
    };
    match metadata {
        Ok(metadata) if metadata.is_dir() => {
            let text = "a symbolic link to a folder is not followed";
            visit(path, Err(Reason::new("folder-link", text)))
        }
        Ok(metadata) => file(path, &metadata, visit),
        Err(error) => visit(path, Err(unreadable(&error))),
    }
}

fn file(path: &Path, metadata: &fs::Metadata, visit: &mut Visit<'_>) -> ControlFlow<()> {
    if metadata.is_file() {
        visit(path, Ok(()))
    } else {
        let text = "a pipe, socket or device is not read";
        visit(path, Err(Reason::new("special-file", text)))
    }
}

/// The reason for a file that the system does not give.
pub(crate) fn unreadable(error: &io::Error) -> Reason {
    Reason::new("unreadable", error.to_string())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::os::unix::fs::symlink;

    fn walked(root: &Path) -> Vec<String> {
        let mut seen = Vec::new();
        let flow = walk(&[root.to_owned()], &mut |path, outcome| {
            let name = path.strip_prefix(root).unwrap().display().to_string();
            seen.push(match outcome {
                Ok(()) => name,
                Err(reason) => format!("{name} ({})", reason.code),
            });
            ControlFlow::Continue(())
        });
        assert!(flow.is_continue());
        seen
    }

    #[test]
    fn files_come_in_the_order_of_their_names() {
        let root = tempfile::tempdir().unwrap();
        fs::create_dir(root.path().join("b")).unwrap();
        for name in ["c", "b/2", "b/1", "B", "a"] {
            fs::write(root.path().join(name), "").unwrap();
        }
        assert_eq!(walked(root.path()), ["B", "a", "b/1", "b/2", "c"]);
    }

    #[test]
    fn links_cannot_loop_and_each_has_an_answer() {
        let root = tempfile::tempdir().unwrap();
        fs::write(root.path().join("file"), "").unwrap();
        symlink("file", root.path().join("to-file")).unwrap();
        symlink(".", root.path().join("loop")).unwrap();
        symlink("nowhere", root.path().join("dangling")).unwrap();
        symlink("self", root.path().join("self")).unwrap();
        assert_eq!(
            walked(root.path()),
            [
                "dangling (unreadable)",
                "file",
                "loop (folder-link)",
                "self (unreadable)",
                "to-file"
            ]
        );
    }

    #[test]
    fn deep_folders_end_in_a_reason() {
        let root = tempfile::tempdir().unwrap();
        let mut deep = root.path().to_owned();
        for _ in 0..MAX_DEPTH + 3 {
            deep.push("d");
        }
        fs::create_dir_all(&deep).unwrap();
        let seen = walked(root.path());
        assert_eq!(seen.len(), 1);
        assert!(seen[0].ends_with("(folder-depth)"), "{seen:?}");
    }

    #[test]
    fn sockets_are_not_opened() {
        let root = tempfile::tempdir().unwrap();
        let _listener = std::os::unix::net::UnixListener::bind(root.path().join("s")).unwrap();
        assert_eq!(walked(root.path()), ["s (special-file)"]);
    }
}
