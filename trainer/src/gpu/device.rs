//! The GPU: finding it, its memory, its streams and the kernels of `kernels.cu`.
//!
//! CUDA's libraries are looked for when they are needed, so that a build with the feature `cuda` starts everywhere; where one is missing the error says which, and
//! what to do. The kernels are PTX of compute capability 9.0 (`kernels.ptx`, made by `compile_kernels.sh`), which the driver compiles for this
//! card and every later one.
#![expect(
    unsafe_code,
    reason = "calls of the CUDA driver, whose arguments are memory of this module and its owners"
)]

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::Arc;

use anyhow::{Context, Result, anyhow, ensure};
use cudarc::driver::{CudaContext, CudaEvent, CudaFunction, CudaModule, CudaStream, result, sys};
use cudarc::nvrtc::Ptx;

use crate::exit::{Exit, fault};

/// `kernels.cu`, compiled.
const PTX: &str = include_str!("kernels.ptx");
/// Least compute capability.
const LEAST_CAPABILITY: (i32, i32) = (9, 0);
/// What to do where a library is missing.
const HOW: &str = "CUDA 13 is needed: NVIDIA's driver 580 or later, cuBLAS 13 and cuDNN 9 (NCCL 2 for several GPUs); where PyTorch brings them, set LD_LIBRARY_PATH to \
    its site-packages/nvidia/cu13/lib, nvidia/cudnn/lib and nvidia/nccl/lib";

/// A GPU with its kernels, and the stream on which a step is computed.
#[derive(Debug)]
pub(crate) struct Device {
    context: Arc<CudaContext>,
    /// The stream of the steps.
    pub(crate) stream: Arc<CudaStream>,
    module: Arc<CudaModule>,
    functions: HashMap<&'static str, CudaFunction>,
    n_multiprocessors: usize,
}

/// Bytes of the GPU's memory.
#[derive(Debug)]
pub(crate) struct Memory {
    pointer: u64,
    n_bytes: usize,
    context: Arc<CudaContext>,
}

/// Memory of the host that the GPU reads and writes by itself.
#[derive(Debug)]
pub(crate) struct Pinned {
    pointer: *mut c_void,
    n_bytes: usize,
    context: Arc<CudaContext>,
}

/// An argument of a kernel.
#[derive(Clone, Copy, Debug)]
pub(crate) enum Argument {
    /// Memory of the GPU, or 0.
    Pointer(u64),
    /// C's `int`.
    Int(usize),
    /// C's `long long`.
    Long(usize),
    /// C's `float`.
    Float(f32),
}

/// Blocks and threads of a launch.
#[derive(Clone, Copy, Debug)]
pub(crate) struct Grid {
    pub(crate) blocks: [usize; 3],
    pub(crate) threads: [usize; 2],
    pub(crate) shared_bytes: usize,
}

impl Grid {
    /// Blocks of 256 threads for `n` threads, at most `most` blocks.
    pub(crate) fn of(n: usize, most: usize) -> Self {
        Self {
            blocks: [n.div_ceil(256).clamp(1, most), 1, 1],
            threads: [256, 1],
            shared_bytes: 0,
        }
    }
}

/// An `int` of the libraries. Sizes are within its range because `Layout::most_images` bounds them.
pub(crate) fn int(value: usize) -> i32 {
    i32::try_from(value).expect("sizes of a step are below 2^31")
}

fn missing(what: &str) -> anyhow::Error {
    fault(Exit::PeerDown, format!("no {what} here; {HOW}"))
}

/// Number of GPUs; 0 where there is no driver.
pub(crate) fn count() -> usize {
    // SAFETY: it opens the library if it is there and calls nothing of it.
    if !unsafe { sys::is_culib_present() } {
        return 0;
    }
    let count = result::init().and_then(|()| CudaContext::device_count());
    count.map_or(0, |count| usize::try_from(count).unwrap_or(0))
}

impl Device {
    /// GPU number `ordinal`.
    ///
    /// # Errors
    /// No such GPU, one that is too old, or a library that is missing; the exit code is 69.
    pub(crate) fn open(ordinal: usize) -> Result<Self> {
        // SAFETY: as in `count`.
        if !unsafe { sys::is_culib_present() } {
            return Err(missing("libcuda"));
        }
        // SAFETY: likewise.
        if !unsafe { cudarc::cublas::sys::is_culib_present() } {
            return Err(missing("libcublas"));
        }
        // SAFETY: likewise.
        if !unsafe { cudarc::cudnn::sys::is_culib_present() } {
            return Err(missing("libcudnn"));
        }
        let n = count();
        if ordinal >= n {
            let message = format!("no device cuda:{ordinal}: this machine has {n} GPUs; {HOW}");
            return Err(fault(Exit::PeerDown, message));
        }
        let opened = Self::with(ordinal);
        opened.map_err(|error| fault(Exit::PeerDown, format!("device cuda:{ordinal}: {error:#}")))
    }

    fn with(ordinal: usize) -> Result<Self> {
        let context = CudaContext::new(ordinal)?;
        let capability = context.compute_capability()?;
        ensure!(
            capability >= LEAST_CAPABILITY,
            "{} has compute capability {}.{}; the kernels need {}.{} (Hopper)",
            context.name()?,
            capability.0,
            capability.1,
            LEAST_CAPABILITY.0,
            LEAST_CAPABILITY.1
        );
        let count =
            context.attribute(sys::CUdevice_attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)?;
        let stream = context.new_stream()?;
        let module = context
            .load_module(Ptx::from_src(PTX))
            .context("loading the kernels")?;
        Ok(Self {
            n_multiprocessors: usize::try_from(count).unwrap_or(1).max(1),
            context,
            stream,
            module,
            functions: HashMap::new(),
        })
    }

    /// Its name.
    pub(crate) fn name(&self) -> String {
        self.context.name().unwrap_or_default()
    }

    pub(crate) fn n_multiprocessors(&self) -> usize {
        self.n_multiprocessors
    }

    /// A further stream.
    pub(crate) fn new_stream(&self) -> Result<Arc<CudaStream>> {
        Ok(self.context.new_stream()?)
    }

    /// An event without time.
    pub(crate) fn event(&self) -> Result<CudaEvent> {
        Ok(self.context.new_event(None)?)
    }

    /// An event with time.
    pub(crate) fn clock(&self) -> Result<CudaEvent> {
        let flags = sys::CUevent_flags::CU_EVENT_DEFAULT;
        Ok(self.context.new_event(Some(flags))?)
    }

    /// Bytes free and in all.
    pub(crate) fn free_and_total(&self) -> Result<(usize, usize)> {
        Ok(self.context.mem_get_info()?)
    }

    /// Makes this device the calling thread's.
    pub(crate) fn bind(&self) -> Result<()> {
        Ok(self.context.bind_to_thread()?)
    }

    /// Fresh memory, all zeros.
    pub(crate) fn zeros(&self, n_bytes: usize) -> Result<Memory> {
        self.bind()?;
        let n_bytes = n_bytes.max(16);
        // SAFETY: it is freed once, when `Memory` is dropped.
        let pointer = unsafe { result::malloc_sync(n_bytes) }.map_err(|error| {
            let free = self.free_and_total().map_or(0, |(free, _)| free);
            let message = format!(
                "{n_bytes} bytes of GPU memory: {error} ({free} are free); a smaller --batch needs less"
            );
            fault(Exit::PeerDown, message)
        })?;
        let memory = Memory {
            pointer,
            n_bytes,
            context: self.context.clone(),
        };
        self.clear(&memory)?;
        Ok(memory)
    }

    /// Sets memory to zeros.
    pub(crate) fn clear(&self, memory: &Memory) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: the memory is `n_bytes` long.
        unsafe { result::memset_d8_async(memory.pointer, 0, memory.n_bytes, stream) }?;
        Ok(())
    }

    /// Fresh memory of the host that the GPU can reach.
    pub(crate) fn pinned(&self, n_bytes: usize) -> Result<Pinned> {
        self.bind()?;
        // SAFETY: it is freed once, when `Pinned` is dropped.
        let pointer = unsafe { result::malloc_host(n_bytes.max(16), 0) }?;
        // SAFETY: fresh memory of that length, which nobody else knows.
        unsafe { std::ptr::write_bytes(pointer.cast::<u8>(), 0, n_bytes.max(16)) };
        Ok(Pinned {
            pointer,
            n_bytes,
            context: self.context.clone(),
        })
    }

    /// Sets `n_bytes` from `begin` on to zeros.
    pub(crate) fn clear_range(&self, memory: &Memory, begin: usize, n_bytes: usize) -> Result<()> {
        self.bind()?;
        let stream = self.stream.cu_stream();
        // SAFETY: `range` has checked the length.
        unsafe { result::memset_d8_async(memory.range(begin, n_bytes), 0, n_bytes, stream) }?;
        Ok(())
    }

    /// Copies values to the GPU from `begin` (in bytes) on, and waits.
    pub(crate) fn write<T: Copy>(&self, memory: &Memory, begin: usize, values: &[T]) -> Result<()> {
        self.bind()?;
        let to = memory.range(begin, size_of_val(values));
        // SAFETY: `range` has checked the length, and the values stay until the copy is done.
        unsafe { result::memcpy_htod_async(to, values, self.stream.cu_stream()) }?;
        Ok(self.stream.synchronize()?)
    }

    /// The values from `begin` (in bytes) on, once the stream has come here.
    pub(crate) fn read<T: Copy + Default>(
        &self,
        memory: &Memory,
        begin: usize,
        n: usize,
    ) -> Result<Vec<T>> {
        self.bind()?;
        let mut values = vec![T::default(); n];
        let from = memory.range(begin, n * size_of::<T>());
        // SAFETY: `range` has checked the length, and the values stay until the copy is done.
        unsafe { result::memcpy_dtoh_async(&mut values, from, self.stream.cu_stream()) }?;
        self.stream.synchronize()?;
        Ok(values)
    }

    /// Copies from pinned memory on `stream`, without waiting; neither may be dropped or written to before the stream has come there.
    pub(crate) fn upload(
        &self,
        stream: &CudaStream,
        from: &Pinned,
        to: &Memory,
        n_bytes: usize,
    ) -> Result<()> {
        self.bind()?;
        let target = to.range(0, n_bytes);
        let bytes = &from.bytes()[..n_bytes];
        // SAFETY: both are that long; the caller keeps them.
        unsafe { result::memcpy_htod_async(target, bytes, stream.cu_stream()) }?;
        Ok(())
    }

    /// Copies `n_bytes` from `begin` on into pinned memory at the same place on the device's stream, without waiting; as [`Self::upload`].
    pub(crate) fn download(
        &self,
        from: &Memory,
        to: &mut Pinned,
        begin: usize,
        n_bytes: usize,
    ) -> Result<()> {
        self.bind()?;
        let source = from.range(begin, n_bytes);
        let stream = self.stream.cu_stream();
        let bytes = &mut to.bytes_mut()[begin..begin + n_bytes];
        // SAFETY: both are that long; the caller keeps them.
        unsafe { result::memcpy_dtoh_async(bytes, source, stream) }?;
        Ok(())
    }

    /// Launches a kernel on the device's stream.
    ///
    /// The caller answers for the arguments: their number and types are those of the kernel, and the memory is as long as it reaches.
    pub(crate) fn launch(
        &mut self,
        kernel: &'static str,
        grid: Grid,
        arguments: &[Argument],
    ) -> Result<()> {
        self.bind()?;
        if !self.functions.contains_key(kernel) {
            let function = self.module.load_function(kernel);
            let function = function.with_context(|| format!("loading kernel {kernel}"))?;
            self.functions.insert(kernel, function);
        }
        let function = self.functions[kernel].cu_function();
        // Each argument in the first bytes of a word of its own.
        let words: Vec<[u8; 8]> = arguments
            .iter()
            .map(|argument| match *argument {
                Argument::Pointer(pointer) => pointer.to_ne_bytes(),
                Argument::Long(value) => (value as u64).to_ne_bytes(),
                Argument::Int(value) => u64::from(int(value).unsigned_abs()).to_ne_bytes(),
                Argument::Float(value) => u64::from(value.to_bits()).to_ne_bytes(),
            })
            .collect();
        let mut pointers: Vec<*mut c_void> = words
            .iter()
            .map(|word| word.as_ptr().cast_mut().cast())
            .collect();
        let size = |value: usize| u32::try_from(value).context("size of a launch");
        let [x, y, z] = grid.blocks;
        let blocks = (size(x)?, size(y)?, size(z)?);
        let threads = (size(grid.threads[0])?, size(grid.threads[1])?, 1);
        let shared_bytes = size(grid.shared_bytes)?;
        let stream = self.stream.cu_stream();
        // SAFETY: the function belongs to a module that lives as long as `self`; for the arguments the caller answers.
        unsafe {
            result::launch_kernel(
                function,
                blocks,
                threads,
                shared_bytes,
                stream,
                &mut pointers,
            )
        }
        .map_err(|error| anyhow!("launching {kernel} with {grid:?}: {error}"))
    }
}

impl Memory {
    /// Where it begins.
    pub(crate) fn pointer(&self) -> u64 {
        self.pointer
    }

    pub(crate) fn n_bytes(&self) -> usize {
        self.n_bytes
    }

    /// Where byte `begin` lies, of which `n_bytes` follow.
    pub(crate) fn range(&self, begin: usize, n_bytes: usize) -> u64 {
        assert!(
            begin
                .checked_add(n_bytes)
                .is_some_and(|end| end <= self.n_bytes),
            "{n_bytes} bytes from {begin} on of {}",
            self.n_bytes
        );
        self.pointer + begin as u64
    }
}

impl Drop for Memory {
    fn drop(&mut self) {
        let _bound = self.context.bind_to_thread();
        // SAFETY: it was allocated by `Device::zeros` and is freed here alone. A failure at the end of the process is nobody's concern.
        let _freed = unsafe { result::free_sync(self.pointer) };
    }
}

impl Pinned {
    pub(crate) fn bytes(&self) -> &[u8] {
        // SAFETY: it is that long and was initialised; the device writes it only while its owner waits.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.n_bytes) }
    }

    pub(crate) fn bytes_mut(&mut self) -> &mut [u8] {
        // SAFETY: as in `bytes`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.n_bytes) }
    }

    /// As f32.
    pub(crate) fn floats(&self) -> &[f32] {
        // SAFETY: as in `bytes`; a page's begin is aligned for f32, and all bits are one.
        unsafe { std::slice::from_raw_parts(self.pointer.cast(), self.n_bytes / 4) }
    }

    pub(crate) fn floats_mut(&mut self) -> &mut [f32] {
        // SAFETY: as in `floats`, and the borrow is exclusive.
        unsafe { std::slice::from_raw_parts_mut(self.pointer.cast(), self.n_bytes / 4) }
    }
}

impl Drop for Pinned {
    fn drop(&mut self) {
        let _bound = self.context.bind_to_thread();
        // SAFETY: as in `Memory::drop`.
        let _freed = unsafe { result::free_host(self.pointer) };
    }
}

// SAFETY: the pointer is owned and reached through `bytes` and `bytes_mut` alone.
unsafe impl Send for Pinned {}
