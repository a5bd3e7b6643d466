//! The models that are installed on the board, and which of them is in force.
//!
//! In: a model file and its minisign signature. Out: `state_dir/models/DIGEST.onnx` and `state.json`, which names the one in force and the one before.
//! A model comes into force only after its signature is verified and a process of its own has loaded it and passed its self-test; the switch is one
//! rename. Until it has served ([`ModelStore::confirm`]) it is on trial: a start on which it cannot be loaded, or [`MAX_TRIAL_STARTS`] starts that were not
//! confirmed, bring the one before back. Without an installed model the demonstration model is in force. The folder is locked while it changes.

use std::fs::{self, File};
use std::io::{self, Read, Write};
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, anyhow};
use minisign_verify::{PublicKey, Signature};
use serde::{Deserialize, Serialize};

use crate::exit::{Exit, Failure, failure};
use crate::model::MAX_MODEL_BYTES;

/// Starts on trial; at the next one the model before is brought back.
pub(crate) const MAX_TRIAL_STARTS: u32 = 2;
/// Largest signature or key file.
const MAX_TEXT_BYTES: u64 = 16 << 10;
/// Models kept: the one in force and the one before.
const MAX_KEPT: usize = 2;

/// The folder of models.
#[derive(Clone, Debug)]
pub(crate) struct ModelStore {
    folder: PathBuf,
}

/// An installed model.
#[derive(Clone, Debug, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Entry {
    /// BLAKE3 of the file, hexadecimal.
    pub(crate) digest: String,
    /// As results name it.
    pub(crate) name: String,
    /// Whether its signature was verified.
    pub(crate) is_signed: bool,
    /// Unix time in ms.
    pub(crate) installed_ms: i64,
}

/// What is in force; `state.json`.
#[derive(Clone, Debug, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(default, deny_unknown_fields)]
pub(crate) struct State {
    /// In force; `None`: the demonstration model.
    pub(crate) current: Option<Entry>,
    /// What a rollback brings back; `None`: the demonstration model.
    pub(crate) previous: Option<Entry>,
    /// Starts since `current` came into force, until it is confirmed.
    pub(crate) trial_starts: Option<u32>,
}

/// Whom a model file must be signed by.
#[derive(Clone, Debug)]
pub(crate) enum Trust {
    /// The holder of this key: a file, or its base64 text.
    Key(String),
    /// Nobody.
    Unsigned,
}

/// What `choose` found.
#[derive(Debug)]
pub(crate) struct Chosen<T> {
    /// What the loader made.
    pub(crate) loaded: T,
    /// Why the model before was brought back, where it was.
    pub(crate) rolled_back: Option<String>,
}

impl ModelStore {
    /// The store in a state folder; nothing is made yet.
    pub(crate) fn new(state_dir: &Path) -> Self {
        Self {
            folder: state_dir.join("models"),
        }
    }

    /// What is in force.
    ///
    /// # Errors
    /// `CannotWrite` where the file is there and cannot be read or understood.
    pub(crate) fn state(&self) -> Result<State, Failure> {
        let path = self.folder.join("state.json");
        let state = match fs::read(&path) {
            Ok(text) => serde_json::from_slice(&text).map_err(anyhow::Error::from),
            Err(error) if error.kind() == io::ErrorKind::NotFound => Ok(State::default()),
            Err(error) => Err(error.into()),
        };
        state
            .with_context(|| format!("{}", path.display()))
            .map_err(failure(Exit::CannotWrite))
    }

    /// Where a model lies; `None` for the demonstration model.
    pub(crate) fn path(&self, entry: Option<&Entry>) -> Option<PathBuf> {
        entry.map(|entry| self.folder.join(format!("{}.onnx", entry.digest)))
    }

    /// Installs `file` and brings it into force. `probe` loads the model in a process of its own and says its name.
    ///
    /// # Errors
    /// `BadData` where the signature or the file is not good; `FailedCheck` or what `probe` says; `CannotWrite`. Nothing has changed then.
    pub(crate) fn install(
        &self,
        file: &Path,
        trust: &Trust,
        now_ms: i64,
        probe: impl Fn(&Path) -> Result<String, Failure>,
    ) -> Result<Entry, Failure> {
        let bytes = read(file, MAX_MODEL_BYTES)?;
        if let Trust::Key(key) = trust {
            verify(&bytes, file, key).map_err(failure(Exit::BadData))?;
        }
        let _lock = self.lock()?;
        let digest = blake3::hash(&bytes).to_hex().to_string();
        let trial = self.folder.join("trial.onnx");
        write_durably(&trial, &bytes)?;
        let name = probe(&trial).inspect_err(|_| drop(fs::remove_file(&trial)))?;
        let entry = Entry {
            digest,
            name,
            is_signed: matches!(trust, Trust::Key(_)),
            installed_ms: now_ms,
        };
        let before = self.state()?;
        let path = self.folder.join(format!("{}.onnx", entry.digest));
        fs::rename(&trial, path).map_err(failure(Exit::CannotWrite))?;
        let is_same = before
            .current
            .as_ref()
            .is_some_and(|current| current.digest == entry.digest);
        self.replace_state(&State {
            previous: if is_same {
                before.previous
            } else {
                before.current
            },
            current: Some(entry.clone()),
            trial_starts: Some(0),
        })?;
        Ok(entry)
    }

    /// Brings the model before back; the one in force becomes the one before.
    ///
    /// # Errors
    /// `FailedCheck` where nothing is installed; `CannotWrite`.
    pub(crate) fn rollback(&self) -> Result<State, Failure> {
        let _lock = self.lock()?;
        let state = self.state()?;
        if state.current.is_none() && state.previous.is_none() {
            let error = anyhow!("no model is installed; the demonstration model is in force");
            return Err(failure(Exit::FailedCheck)(error));
        }
        let state = State {
            current: state.previous,
            previous: state.current,
            trial_starts: None,
        };
        self.replace_state(&state)?;
        Ok(state)
    }

    /// At start: loads the model in force, or the one before where this one is at fault. The one at fault is forgotten, so that no rollback
    /// brings it back.
    ///
    /// # Errors
    /// What `load` says of the model before, or of the one in force where there is no other.
    pub(crate) fn choose<T>(
        &self,
        load: impl Fn(Option<&Path>) -> Result<T, Failure>,
    ) -> Result<Chosen<T>, Failure> {
        let state = self.state()?;
        let loaded = match state.trial_starts {
            Some(n_starts) if n_starts >= MAX_TRIAL_STARTS => Err(failure(Exit::FailedCheck)(
                anyhow!("{n_starts} starts with it were not confirmed"),
            )),
            Some(n_starts) => {
                // Counted before it is loaded: loading may be what kills this process.
                let _lock = self.lock()?;
                self.replace_state(&State {
                    trial_starts: Some(n_starts + 1),
                    ..state.clone()
                })?;
                load(self.path(state.current.as_ref()).as_deref())
            }
            None => load(self.path(state.current.as_ref()).as_deref()),
        };
        match loaded {
            Ok(loaded) => Ok(Chosen {
                loaded,
                rolled_back: None,
            }),
            Err(fault) if state.current.is_some() => {
                let back = State {
                    current: state.previous,
                    ..State::default()
                };
                let _lock = self.lock()?;
                self.replace_state(&back)?;
                Ok(Chosen {
                    loaded: load(self.path(back.current.as_ref()).as_deref())?,
                    rolled_back: Some(fault.to_string()),
                })
            }
            Err(fault) => Err(fault),
        }
    }

    /// The model with this digest has served, or the daemon that runs it stops in order: no crash can be its fault. One that was installed
    /// beside it, and has yet to be started, stays on trial.
    ///
    /// # Errors
    /// `CannotWrite`.
    pub(crate) fn confirm(&self, digest: &str) -> Result<(), Failure> {
        let is_it = |state: &State| {
            let current = state.current.as_ref();
            state.trial_starts.is_some() && current.is_some_and(|current| current.digest == digest)
        };
        if !is_it(&self.state()?) {
            return Ok(());
        }
        let _lock = self.lock()?;
        let state = self.state()?;
        if !is_it(&state) {
            return Ok(());
        }
        self.replace_state(&State {
            trial_starts: None,
            ..state
        })
    }

    /// Held while the folder changes. The folder itself is locked: a file that root made for it would shut the daemon out.
    fn lock(&self) -> Result<File, Failure> {
        fs::create_dir_all(&self.folder)
            .and_then(|()| give_to_owner(&self.folder))
            .and_then(|()| File::open(&self.folder))
            .and_then(|folder| folder.lock().map(|()| folder))
            .with_context(|| format!("{}", self.folder.display()))
            .map_err(failure(Exit::CannotWrite))
    }

    fn replace_state(&self, state: &State) -> Result<(), Failure> {
        let text = serde_json::to_vec_pretty(state).map_err(failure(Exit::CannotWrite))?;
        let new = self.folder.join("state.json.new");
        write_durably(&new, &text)?;
        fs::rename(new, self.folder.join("state.json"))
            .and_then(|()| File::open(&self.folder)?.sync_all())
            .map_err(failure(Exit::CannotWrite))?;
        self.delete_others(state);
        Ok(())
    }

    /// Deletes files of models that no rollback reaches.
    fn delete_others(&self, state: &State) {
        let entries = [&state.current, &state.previous];
        let kept: Vec<PathBuf> = entries
            .iter()
            .filter_map(|entry| self.path(entry.as_ref()))
            .take(MAX_KEPT)
            .collect();
        for file in fs::read_dir(&self.folder).into_iter().flatten().flatten() {
            let path = file.path();
            let is_model = path
                .extension()
                .is_some_and(|extension| extension == "onnx");
            if is_model && !kept.contains(&path) {
                // It is tried again at the next change.
                drop(fs::remove_file(path));
            }
        }
    }
}

fn read(path: &Path, max_bytes: u64) -> Result<Vec<u8>, Failure> {
    let mut bytes = Vec::new();
    File::open(path)
        .and_then(|file| file.take(max_bytes + 1).read_to_end(&mut bytes))
        .with_context(|| format!("reading {}", path.display()))
        .map_err(failure(Exit::BadData))?;
    if bytes.len() as u64 > max_bytes {
        let error = anyhow!("{}: more than {max_bytes} bytes", path.display());
        return Err(failure(Exit::BadData)(error));
    }
    Ok(bytes)
}

/// Verifies `FILE.minisig` beside the file.
fn verify(bytes: &[u8], file: &Path, key: &str) -> anyhow::Result<()> {
    let mut signature = file.as_os_str().to_owned();
    signature.push(".minisig");
    let text = |path: &Path| {
        let bytes = read(path, MAX_TEXT_BYTES).map_err(|failure| failure.error)?;
        String::from_utf8(bytes).with_context(|| format!("{}: no text", path.display()))
    };
    let signature = Signature::decode(&text(Path::new(&signature))?)
        .map_err(|error| anyhow!("{}: {error}", Path::new(&signature).display()))?;
    let key = if Path::new(key).exists() {
        PublicKey::decode(&text(Path::new(key))?)
            .map_err(|error| anyhow!("{key} holds no public key: {error}"))?
    } else {
        PublicKey::from_base64(key)
            .map_err(|error| anyhow!("`{key}` is neither a file nor a public key: {error}"))?
    };
    key.verify(bytes, &signature, false)
        .map_err(|error| anyhow!("{}: the signature does not hold: {error}", file.display()))
}

fn write_durably(path: &Path, bytes: &[u8]) -> Result<(), Failure> {
    let written = File::create(path).and_then(|mut file| {
        file.write_all(bytes)?;
        file.sync_all()
    });
    written
        .and_then(|()| give_to_owner(path))
        .with_context(|| format!("writing {}", path.display()))
        .map_err(failure(Exit::CannotWrite))
}

/// What root makes belongs to whom the folder above belongs to, so that the daemon can replace it.
pub(crate) fn give_to_owner(path: &Path) -> io::Result<()> {
    let Some(above) = path.parent().map(fs::metadata).transpose()? else {
        return Ok(());
    };
    let own = fs::metadata(path)?;
    if (own.uid(), own.gid()) == (above.uid(), above.gid()) {
        return Ok(());
    }
    std::os::unix::fs::chown(path, Some(above.uid()), Some(above.gid()))
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Made with minisign 0.11 for the bytes `test`: the example of the minisign-verify crate's documentation.
    const KEY: &str = "RWQf6LRCGA9i53mlYecO4IzT51TGPpvWucNSCh1CBM0QTaLn73Y7GFO3";
    const SIGNATURE: &str = "untrusted comment: signature from minisign secret key
RUQf6LRCGA9i559r3g7V1qNyJDApGip8MfqcadIgT9CuhV3EMhHoN1mGTkUidF/z7SrlQgXdy8ofjb7bNJJylDOocrCo8KLzZwo=
trusted comment: timestamp:1633700835\tfile:test\tprehashed
wLMDjy9FLAuxZ3q4NlEvkgtyhrr0gtTu6KC4KBJdITbbOeAi1zBIYo0v4iTgt8jJpIidRJnp94ABQkJAgAooBQ==";

    fn store() -> (tempfile::TempDir, ModelStore) {
        let folder = tempfile::tempdir().unwrap();
        let store = ModelStore::new(folder.path());
        (folder, store)
    }

    fn install(store: &ModelStore, bytes: &[u8]) -> Entry {
        let folder = tempfile::tempdir().unwrap();
        let file = folder.path().join("model.onnx");
        fs::write(&file, bytes).unwrap();
        let probe = |path: &Path| {
            assert_eq!(fs::read(path).unwrap(), bytes);
            Ok(format!("model {}", bytes.len()))
        };
        store.install(&file, &Trust::Unsigned, 5, probe).unwrap()
    }

    fn current(store: &ModelStore) -> String {
        let chosen = store
            .choose(|path| Ok(path.map(|path| fs::read(path).unwrap())))
            .unwrap();
        String::from_utf8(chosen.loaded.unwrap_or_default()).unwrap()
    }

    #[test]
    fn a_model_comes_into_force_and_goes_back() {
        let (_folder, store) = store();
        assert_eq!(current(&store), "");
        install(&store, b"one");
        assert_eq!(current(&store), "one");
        install(&store, b"two");
        assert_eq!(current(&store), "two");
        store.rollback().unwrap();
        assert_eq!(current(&store), "one");
        store.rollback().unwrap();
        assert_eq!(current(&store), "two");
        install(&store, b"three");
        let models = fs::read_dir(&store.folder).unwrap().flatten();
        let n_models = models.filter(|file| file.path().extension().is_some_and(|e| e == "onnx"));
        assert_eq!(n_models.count(), MAX_KEPT);
    }

    #[test]
    fn nothing_in_the_folder_shuts_out_the_daemon_when_root_installs() {
        let (_folder, store) = store();
        let entry = install(&store, b"one");
        let mut names: Vec<_> = fs::read_dir(&store.folder)
            .unwrap()
            .map(|file| file.unwrap().file_name().into_string().unwrap())
            .collect();
        names.sort();
        // Each was given to the folder's owner; a file of another kind would be one that nobody gave.
        let mut given = [format!("{}.onnx", entry.digest), "state.json".to_owned()];
        given.sort();
        assert_eq!(names, given);
    }

    #[test]
    fn a_model_that_fails_its_probe_changes_nothing() {
        let (folder, store) = store();
        install(&store, b"one");
        let before = store.state().unwrap();
        let file = folder.path().join("bad.onnx");
        fs::write(&file, b"bad").unwrap();
        let refuse = |_: &Path| Err(failure(Exit::FailedCheck)(anyhow!("other bits")));
        let refused = store
            .install(&file, &Trust::Unsigned, 5, refuse)
            .unwrap_err();
        assert_eq!(refused.exit, Exit::FailedCheck);
        assert_eq!(store.state().unwrap(), before);
        assert!(!store.folder.join("trial.onnx").exists());
        assert_eq!(current(&store), "one");
    }

    #[test]
    fn a_model_that_cannot_be_loaded_at_start_gives_way_to_the_one_before() {
        let (_folder, store) = store();
        let one = install(&store, b"one");
        store.confirm(&one.digest).unwrap();
        install(&store, b"two");
        let load = |path: Option<&Path>| match fs::read(path.unwrap()).unwrap().as_slice() {
            b"two" => Err(failure(Exit::FailedCheck)(anyhow!("self-test"))),
            _ => Ok(()),
        };
        assert_eq!(
            store.choose(load).unwrap().rolled_back.unwrap(),
            "self-test"
        );
        assert_eq!(current(&store), "one");
        // Nothing brings the faulty one back: what a rollback reaches now is the demonstration model.
        let broken = store
            .folder
            .join(format!("{}.onnx", blake3::hash(b"two").to_hex()));
        assert!(!broken.exists());
        store.rollback().unwrap();
        assert_eq!(current(&store), "");
    }

    #[test]
    fn a_model_that_crashes_the_daemon_twice_gives_way() {
        let (_folder, store) = store();
        let one = install(&store, b"one");
        store.confirm(&one.digest).unwrap();
        install(&store, b"two");
        // The daemon that runs the first stops in order, to start with the second.
        store.confirm(&one.digest).unwrap();
        for _ in 0..MAX_TRIAL_STARTS {
            assert_eq!(current(&store), "two");
        }
        assert_eq!(current(&store), "one");
        let three = install(&store, b"three");
        store.confirm(&three.digest).unwrap();
        for _ in 0..5 {
            assert_eq!(current(&store), "three", "confirmed");
        }
    }

    #[test]
    fn only_the_holder_of_the_key_installs() {
        let (folder, store) = store();
        let file = folder.path().join("m.onnx");
        let signature = folder.path().join("m.onnx.minisig");
        let trust = Trust::Key(KEY.into());
        let try_it = || store.install(&file, &trust, 5, |_| Ok("m".into()));
        fs::write(&file, b"test").unwrap();
        assert_eq!(try_it().unwrap_err().exit, Exit::BadData, "no signature");
        fs::write(&signature, SIGNATURE).unwrap();
        assert!(try_it().unwrap().is_signed);
        fs::write(&file, b"tesu").unwrap();
        let refused = try_it().unwrap_err();
        assert!(refused.to_string().contains("does not hold"), "{refused}");
        assert_eq!(current(&store), "test");
    }
}
