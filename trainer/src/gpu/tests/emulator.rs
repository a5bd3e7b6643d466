//! CUDA for the tests: this machine's, or where there is none the emulation in `trainer/tests/emulator`, compiled here by the C++ compiler.

use std::ffi::CString;
use std::sync::{Mutex, MutexGuard, OnceLock, PoisonError};

use self::build::{LIBRARIES, build, has_gpu};
use super::super::device::Device;

#[path = "../../../tests/emulator/build.rs"]
mod build;

/// One test at a time uses the GPU.
static TURN: Mutex<()> = Mutex::new(());

/// Waits for the GPU, and makes one where there is none.
pub(super) fn turn() -> MutexGuard<'static, ()> {
    static READY: OnceLock<()> = OnceLock::new();
    let turn = TURN.lock().unwrap_or_else(PoisonError::into_inner);
    READY.get_or_init(|| {
        if !has_gpu() {
            emulate();
        }
    });
    turn
}

/// The GPU of the tests.
pub(super) fn device() -> Device {
    Device::open(0).unwrap()
}

fn emulate() {
    let folder = tempfile::tempdir().unwrap();
    build(folder.path());
    for (library, _) in LIBRARIES {
        let name = CString::new(folder.path().join(library).to_str().unwrap()).unwrap();
        // SAFETY: a library of ours, which stays open. Later look-ups by its name find it.
        let opened = unsafe { libc::dlopen(name.as_ptr(), libc::RTLD_NOW | libc::RTLD_GLOBAL) };
        assert!(!opened.is_null(), "opening {library}");
    }
}
