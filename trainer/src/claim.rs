//! One process at a time in a folder.
//!
//! In: a folder. Out: a lock on it (`flock`) that ends with the process, however that ends, and leaves no file behind. On a file system that
//! has no such locks nobody is kept out.

use std::fs::{File, TryLockError};
use std::path::Path;

use anyhow::{Context, Result};

use crate::exit::{Exit, fault};

/// Claims a folder for as long as the returned file is open.
///
/// # Errors
/// The folder cannot be opened, or another process works in it.
pub fn claim(folder: &Path) -> Result<File> {
    let file = File::open(folder).with_context(|| format!("opening {}", folder.display()))?;
    match file.try_lock() {
        Err(TryLockError::WouldBlock) => Err(fault(
            Exit::CannotWrite,
            format!(
                "another process works in {}; wait for it, stop it, or choose another folder",
                folder.display()
            ),
        )),
        Ok(()) | Err(TryLockError::Error(_)) => Ok(file),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_folder_is_claimed_once_at_a_time() {
        let folder = tempfile::tempdir().unwrap();
        let first = claim(folder.path()).unwrap();
        let error = claim(folder.path()).unwrap_err();
        assert_eq!(crate::exit::code_of(&error), Exit::CannotWrite);
        assert!(error.to_string().contains("another process works in"));
        drop(first);
        claim(folder.path()).unwrap();
    }
}
