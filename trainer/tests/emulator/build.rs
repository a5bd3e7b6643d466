//! Compiles the emulated CUDA libraries, for the tests of the crate and of the program.

use std::path::Path;
use std::process::Command;

/// Libraries by the names that the program looks for them, and the source of each.
pub(crate) const LIBRARIES: [(&str, &str); 4] = [
    ("libcuda.so", "cuda.cpp"),
    ("libcublas.so", "libraries.cpp"),
    ("libcudnn.so", "libraries.cpp"),
    ("libnccl.so.2", "libraries.cpp"),
];

/// Whether this machine has a GPU.
pub(crate) fn has_gpu() -> bool {
    let listed = Command::new("nvidia-smi").arg("-L").output();
    listed.is_ok_and(|listed| listed.status.success())
}

/// Compiles them into `folder`. `EMULATOR_FLAGS` may ask for sanitizers; the program itself then runs with theirs loaded before it.
pub(crate) fn build(folder: &Path) {
    let source = Path::new(env!("CARGO_MANIFEST_DIR")).join("tests/emulator");
    let compiler = std::env::var("CXX").unwrap_or_else(|_| "g++".into());
    let flags = std::env::var("EMULATOR_FLAGS").unwrap_or_default();
    for (library, file) in LIBRARIES {
        let status = Command::new(&compiler)
            .args(["-std=c++17", "-O2", "-g1", "-fPIC", "-shared", "-I"])
            .arg(&source)
            .args(flags.split_whitespace())
            .arg(format!("-Wl,-soname,{library}"))
            .arg("-o")
            .args([&folder.join(library), &source.join(file)])
            // The others put their work on its streams.
            .args((library != LIBRARIES[0].0).then(|| folder.join(LIBRARIES[0].0)))
            .status();
        let status = status.unwrap_or_else(|error| {
            panic!("these tests need a GPU or a C++ compiler to emulate one: {compiler}: {error}")
        });
        assert!(status.success(), "{compiler} {file}: {status}");
    }
}
