//! A GPU of the CUDA emulator, with a stream and memory.
// Each test program that has this as a module uses a part of it.
#![allow(dead_code)]

use std::{
    ffi::c_void,
    sync::{Arc, OnceLock},
    thread,
    time::{Duration, Instant},
};

use cudarc::driver::{
    result::{self, stream::StreamKind},
    sys::{self, CUcontext, CUdeviceptr, CUstream},
};
use lockstep_collectives::{CollectiveError, DeviceSlice, DeviceSliceMut, DeviceStream, Endpoint, Member, nccl};

/// Time for ranks to come together; only what hangs takes it.
pub(crate) const MEET: Duration = Duration::from_secs(60);

/// A device of the emulator, and a stream of it. Neither is given back before the process ends.
#[derive(Clone, Copy)]
pub(crate) struct Gpu {
    context: CUcontext,
    stream: CUstream,
    ordinal: usize,
}

// SAFETY: contexts and streams are handles for all threads.
unsafe impl Send for Gpu {}
// SAFETY: as above.
unsafe impl Sync for Gpu {}

/// Values in the memory of a [`Gpu`].
pub(crate) struct Memory<T> {
    gpu: Gpu,
    address: CUdeviceptr,
    len: usize,
    _values: std::marker::PhantomData<T>,
}

impl Gpu {
    pub(crate) fn open(ordinal: usize) -> Self {
        static EMULATOR: OnceLock<()> = OnceLock::new();
        EMULATOR.get_or_init(|| lockstep_cuda_emulator::load_into_this_process().unwrap());
        result::init().unwrap();
        let device = result::device::get(ordinal as i32).unwrap();
        // SAFETY: the device is there, and its context is never given back.
        let context = unsafe { result::primary_ctx::retain(device) }.unwrap();
        // SAFETY: it was just retained.
        unsafe { result::ctx::set_current(context) }.unwrap();
        let stream = result::stream::create(StreamKind::NonBlocking).unwrap();
        Self { context, stream, ordinal }
    }

    /// As a transport takes it.
    pub(crate) fn stream(&self) -> DeviceStream {
        let (context, stream): (*mut c_void, *mut c_void) = (self.context.cast(), self.stream.cast());
        // SAFETY: the context is the primary one and the stream is its; both stay.
        unsafe { DeviceStream::new(context, stream, format!("gpu {}", self.ordinal), Arc::new(())) }
    }

    /// To be called in each thread that uses the device.
    pub(crate) fn enter(&self) {
        // SAFETY: the context stays.
        unsafe { result::ctx::set_current(self.context) }.unwrap();
    }

    pub(crate) fn upload<T: Copy + 'static>(&self, values: &[T]) -> Memory<T> {
        self.enter();
        let size_bytes = size_of_val(values).max(1);
        // SAFETY: it takes any size.
        let address = unsafe { result::malloc_sync(size_bytes) }.unwrap();
        if !values.is_empty() {
            // SAFETY: so many bytes lie there, and these are read before the call returns.
            unsafe { result::memcpy_htod_async(address, values, self.stream) }.unwrap();
        }
        Memory { gpu: *self, address, len: values.len(), _values: std::marker::PhantomData }
    }

    /// Whether the stream has passed all that lies on it.
    pub(crate) fn is_idle(&self) -> bool {
        self.enter();
        // SAFETY: the stream stays.
        let state = unsafe { sys::cuStreamQuery(self.stream) };
        state == sys::CUresult::CUDA_SUCCESS
    }

    pub(crate) fn await_idle(&self) {
        let deadline = Instant::now() + MEET;
        while !self.is_idle() {
            assert!(Instant::now() < deadline, "the stream of gpu {} does not become idle", self.ordinal);
            thread::yield_now();
        }
    }
}

impl<T: Copy + Default + 'static> Memory<T> {
    pub(crate) fn slice(&self) -> DeviceSlice<'_, T> {
        // SAFETY: it lies there until it is dropped, which waits for the stream.
        unsafe { DeviceSlice::new(self.address, self.len) }
    }

    pub(crate) fn slice_mut(&mut self) -> DeviceSliceMut<'_, T> {
        // SAFETY: as above.
        unsafe { DeviceSliceMut::new(self.address, self.len) }
    }

    /// To be called when the stream is idle, or will be.
    pub(crate) fn download(&self) -> Vec<T> {
        self.gpu.enter();
        let mut values = vec![T::default(); self.len];
        if self.len > 0 {
            // SAFETY: so many values lie there; the call returns when they have come.
            unsafe { result::memcpy_dtoh_async(&mut values, self.address, self.gpu.stream) }.unwrap();
        }
        values
    }
}

impl<T> Drop for Memory<T> {
    fn drop(&mut self) {
        if !thread::panicking() {
            self.gpu.enter();
            self.gpu.await_idle();
            // SAFETY: nothing uses it any more.
            unsafe { result::free_sync(self.address) }.unwrap();
        }
    }
}

/// The ranks of a group, each on a GPU of its own, which is new.
pub(crate) fn gpus(world_size: usize) -> Vec<Gpu> {
    (0..world_size).map(Gpu::open).collect()
}

/// Connects `members` over NCCL, the rank `r` on `gpus[r]`.
pub(crate) fn connect(
    gpus: &[Gpu],
    members: impl IntoIterator<Item = Member>,
) -> Vec<Result<Endpoint, CollectiveError>> {
    let id = nccl::UniqueId::new().unwrap();
    let deadline = Instant::now() + MEET;
    thread::scope(|scope| {
        let connect = |(gpu, member): (&Gpu, Member)| {
            let stream = gpu.stream();
            scope.spawn(move || nccl::connect(&id, stream, member, deadline))
        };
        let ends: Vec<_> = gpus.iter().zip(members).map(connect).collect();
        ends.into_iter().map(|end| end.join().unwrap()).collect()
    })
}
