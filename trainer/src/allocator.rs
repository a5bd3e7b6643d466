//! What the C library's allocator does with freed memory: it keeps it.
//!
//! A training step allocates and frees the same large buffers. By default glibc maps each anew, and the kernel clears every page of it:
//! 30 % of a small network's step.
#![expect(unsafe_code, reason = "mallopt has no safe wrapper")]

/// Lets freed memory stay with the process. Does nothing where the C library is not glibc, nor in a second call.
pub fn keep_freed_memory() {
    #[cfg(all(target_os = "linux", target_env = "gnu"))]
    for option in [libc::M_MMAP_THRESHOLD, libc::M_TRIM_THRESHOLD] {
        // SAFETY: mallopt changes a parameter of the allocator under its own lock; a value that it refuses changes nothing.
        let _is_set = unsafe { libc::mallopt(option, i32::MAX) };
    }
}
