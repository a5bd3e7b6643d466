//! Sums over several GPUs by NCCL, one process a GPU.
//!
//! `libnccl.so.2` is opened here by that name, which cudarc does not look for. Rank 0 makes an identity, which travels through [`crate::ranks::Ranks`];
//! from then on gradients go from GPU to GPU. Sums are put on a stream of their own, behind an event of the stream that makes the gradients, so that they run beside the rest of the
//! backward pass.
#![expect(
    unsafe_code,
    reason = "calls of NCCL through symbols looked up at run time, on memory of the network"
)]

use std::ffi::{CStr, c_char, c_int, c_void};
use std::sync::Arc;

use anyhow::{Result, anyhow};
use cudarc::driver::CudaStream;

use super::device::{Device, Memory};
use crate::exit::{Exit, fault};
use crate::ranks::Ranks;

/// Library name.
const LIBRARY: &CStr = c"libnccl.so.2";
/// Bytes of an identity.
const ID_BYTES: usize = 128;
/// `ncclFloat32`.
const FLOAT: c_int = 7;
/// `ncclSum`.
const SUM: c_int = 0;

#[repr(C)]
#[derive(Clone, Copy)]
struct UniqueId([u8; ID_BYTES]);

type GetUniqueId = unsafe extern "C" fn(*mut UniqueId) -> c_int;
type InitRank = unsafe extern "C" fn(*mut *mut c_void, c_int, UniqueId, c_int) -> c_int;
type AllReduce = unsafe extern "C" fn(
    *const c_void,
    *mut c_void,
    usize,
    c_int,
    c_int,
    *mut c_void,
    *mut c_void,
) -> c_int;
type OfCommunicator = unsafe extern "C" fn(*mut c_void) -> c_int;
type AsyncError = unsafe extern "C" fn(*mut c_void, *mut c_int) -> c_int;
type ErrorString = unsafe extern "C" fn(c_int) -> *const c_char;

/// All GPUs of a run, as one of them sees them.
#[derive(Debug)]
pub(crate) struct Communicator {
    communicator: *mut c_void,
    /// The stream of the sums.
    pub(crate) stream: Arc<CudaStream>,
    all_reduce: AllReduce,
    abort: OfCommunicator,
    async_error: AsyncError,
    error_string: ErrorString,
}

/// A function of NCCL; `T` must be its type.
fn symbol<T: Copy>(library: *mut c_void, name: &CStr) -> Result<T> {
    assert_eq!(size_of::<T>(), size_of::<*mut c_void>());
    // SAFETY: the library is open and the name ends with 0.
    let address = unsafe { libc::dlsym(library, name.as_ptr()) };
    if address.is_null() {
        return Err(fault(
            Exit::PeerDown,
            format!("libnccl has no {}", name.to_string_lossy()),
        ));
    }
    // SAFETY: a pointer to a function of that type, as NCCL's header declares it.
    Ok(unsafe { std::mem::transmute_copy(&address) })
}

impl Communicator {
    /// Meets the GPUs of the other ranks; all must call it.
    ///
    /// # Errors
    /// No NCCL (exit code 69), a rank that is lost, NCCL's errors.
    pub(crate) fn meet(device: &Device, ranks: &mut Ranks) -> Result<Self> {
        device.bind()?;
        // SAFETY: the name ends with 0; the library stays open.
        let library = unsafe { libc::dlopen(LIBRARY.as_ptr(), libc::RTLD_NOW) };
        if library.is_null() {
            let message = "no libnccl.so.2 here, which several GPUs need; NCCL 2 comes with PyTorch: set LD_LIBRARY_PATH to its site-packages/nvidia/nccl/lib";
            return Err(fault(Exit::PeerDown, message));
        }
        let get_id: GetUniqueId = symbol(library, c"ncclGetUniqueId")?;
        let init: InitRank = symbol(library, c"ncclCommInitRank")?;
        let mut communicator = Self {
            communicator: std::ptr::null_mut(),
            stream: device.new_stream()?,
            all_reduce: symbol(library, c"ncclAllReduce")?,
            abort: symbol(library, c"ncclCommAbort")?,
            async_error: symbol(library, c"ncclCommGetAsyncError")?,
            error_string: symbol(library, c"ncclGetErrorString")?,
        };
        let mut id = UniqueId([0; ID_BYTES]);
        if ranks.is_root() {
            // SAFETY: it writes the identity, which is that long.
            communicator.check(unsafe { get_id(&raw mut id) })?;
        }
        // Small integers are exact in f32.
        let mut values = id.0.map(f32::from);
        ranks.spread(&mut values)?;
        #[expect(
            clippy::cast_possible_truncation,
            clippy::cast_sign_loss,
            reason = "they were bytes"
        )]
        let id = UniqueId(values.map(|value| value as u8));
        let (n, rank) = (c_int::try_from(ranks.n())?, c_int::try_from(ranks.rank())?);
        // SAFETY: the device is this thread's; the place for the communicator is ours.
        let code = unsafe { init(&raw mut communicator.communicator, n, id, rank) };
        communicator.check(code)?;
        Ok(communicator)
    }

    fn check(&self, code: c_int) -> Result<()> {
        if code == 0 {
            return Ok(());
        }
        // SAFETY: it takes every code.
        let text = unsafe { (self.error_string)(code) };
        // SAFETY: a constant text that ends with 0.
        let text = unsafe { CStr::from_ptr(text) };
        let message = format!("NCCL: {}", text.to_string_lossy());
        Err(fault(Exit::PeerDown, message))
    }

    /// Whether NCCL has met an error meanwhile.
    ///
    /// # Errors
    /// That error.
    pub(crate) fn is_well(&self) -> Result<()> {
        let mut code = 0;
        // SAFETY: the communicator is open; the code is a variable of ours.
        self.check(unsafe { (self.async_error)(self.communicator, &raw mut code) })?;
        self.check(code)
    }

    /// Replaces `n` f32 values from value `begin` on by their sums over all ranks, on the communicator's stream.
    ///
    /// # Errors
    /// NCCL's.
    pub(crate) fn sum(&self, memory: &Memory, begin: usize, n: usize) -> Result<()> {
        let values = memory.range(4 * begin, 4 * n);
        let stream = self.stream.cu_stream().cast::<c_void>();
        // SAFETY: the memory is that long; sums may be taken in place.
        let code = unsafe {
            (self.all_reduce)(
                values as *const c_void,
                values as *mut c_void,
                n,
                FLOAT,
                SUM,
                self.communicator,
                stream,
            )
        };
        self.check(code)
            .map_err(|error| anyhow!("summing {n} gradients: {error:#}"))
    }
}

impl Drop for Communicator {
    fn drop(&mut self) {
        if !self.communicator.is_null() {
            // SAFETY: it is ended here alone. Abort, not destroy: another rank may be lost, and nothing is under way where all went well.
            let _code = unsafe { (self.abort)(self.communicator) };
        }
    }
}
