//! One GPU: memory, transfers and the stream, all of Burn's CUDA backend.

use std::path::PathBuf;
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, OnceLock};

use burn_cuda::CudaDevice;
use cubecl::MemoryAllocationMode;
use cubecl::Runtime;
use cubecl::bytes::Bytes;
use cubecl::client::ComputeClient;
use cubecl::config::cache::CacheConfig;
use cubecl::config::{CubeClRuntimeConfig, RuntimeConfig};
use cubecl::cuda::CudaRuntime;
use cubecl::device::Device;
use cubecl::device_handle::DeviceHandle;
use cubecl::prelude::ArrayArg;
use cubecl::server::{ComputeServer, Handle};
use cubecl::stream_id::StreamId;
use half::bf16;

use super::gemm::Blas;
use super::matrix::{Element, Matrix};
use super::probe;
use crate::error::{Error, Result};

pub(super) type Server = <CudaRuntime as Runtime>::Server;

/// A GPU that is ready for work. Work is queued and runs in the order in which it was asked for.
#[derive(Clone)]
pub struct Gpu {
    pub(super) client: ComputeClient<CudaRuntime>,
    pub(super) server: DeviceHandle<Server>,
    pub(super) blas: Arc<Mutex<Blas>>,
    /// Asked for each product, while another thread may hold the lock for the one before.
    pub(super) blas_is_open: Arc<AtomicBool>,
    /// Whether fresh memory is filled with what is not a number.
    poison: Arc<AtomicBool>,
    /// The first thing that went wrong since the last look.
    failure: Arc<Mutex<Option<String>>>,
}

/// What the device or its libraries say.
#[derive(Debug, thiserror::Error)]
#[error("{0}")]
struct Failed(String);

static GPU: OnceLock<std::result::Result<Gpu, String>> = OnceLock::new();

impl Gpu {
    /// The default GPU, opened once for the whole process.
    ///
    /// # Errors
    /// Those of [`probe::check`]; [`Error::Unsupported`] if the device cannot be used.
    pub fn open() -> Result<Self> {
        probe::check()?;
        let opened = GPU.get_or_init(|| Self::connect().map_err(|error| error.to_string()));
        match opened {
            Ok(gpu) => Ok(gpu.clone()),
            Err(reason) => Err(Error::unsupported("--device gpu", reason.clone())),
        }
    }

    fn connect() -> Result<Self> {
        // One stream for every thread: what one thread queues, another may read.
        let mut config = CubeClRuntimeConfig::default().override_from_env();
        config.streaming.max_streams = 1;
        if config.compilation.cache.is_none() {
            config.compilation.cache = cache_folder().map(CacheConfig::File);
        }
        let taken = std::panic::catch_unwind(|| CubeClRuntimeConfig::set(config)).is_err();
        if taken {
            return Err(Error::unsupported("--device gpu", "CubeCL was configured before"));
        }
        let device = CudaDevice::default();
        let client = CudaRuntime::client(&device);
        let server = DeviceHandle::<Server>::new(device.to_id());
        let gpu = Self {
            client,
            server,
            blas: Arc::new(Mutex::new(Blas::default())),
            blas_is_open: Arc::new(AtomicBool::new(false)),
            poison: Arc::new(AtomicBool::new(false)),
            failure: Arc::new(Mutex::new(None)),
        };
        // The stream exists once something ran on it.
        let first = gpu.zeros(1, 8, Element::F32);
        gpu.download_f32(&first)?;
        gpu.open_blas()?;
        Ok(gpu)
    }

    /// Uninitialised memory.
    pub fn empty(&self, rows: usize, cols: usize, element: Element) -> Matrix {
        let bytes = (rows * cols * element.size()).max(16);
        let matrix = Matrix {
            handle: self.client.empty(bytes),
            rows,
            cols,
            element,
        };
        if self.poison.load(Ordering::Relaxed) {
            self.fill(&matrix, u32::MAX);
        }
        matrix
    }

    /// From now on fresh memory is filled with NaN: for tests, which see so what no kernel wrote.
    pub fn poison(&self) {
        self.poison.store(true, Ordering::Relaxed);
    }

    /// Zeros.
    pub fn zeros(&self, rows: usize, cols: usize, element: Element) -> Matrix {
        let matrix = self.empty(rows, cols, element);
        self.fill_zeros(&matrix);
        matrix
    }

    /// A matrix from the host's single-precision values.
    pub fn upload_f32(&self, values: &[f32], rows: usize, cols: usize) -> Matrix {
        self.upload_bytes(bytemuck::cast_slice(values).to_vec(), rows, cols, Element::F32)
    }

    /// A matrix from the host's values, rounded to bfloat16.
    pub fn upload_bf16(&self, values: &[f32], rows: usize, cols: usize) -> Matrix {
        let rounded: Vec<bf16> = values.iter().map(|v| bf16::from_f32(*v)).collect();
        self.upload_bytes(bytemuck::cast_slice(&rounded).to_vec(), rows, cols, Element::Bf16)
    }

    /// A matrix from its bytes, which go through pinned memory.
    pub fn upload_bytes(&self, bytes: Vec<u8>, rows: usize, cols: usize, element: Element) -> Matrix {
        Matrix {
            handle: self.upload(bytes),
            rows,
            cols,
            element,
        }
    }

    /// Bytes in device memory.
    pub(super) fn upload(&self, bytes: Vec<u8>) -> Handle {
        let mut bytes = Bytes::from_bytes_vec(bytes);
        self.client.staging(std::iter::once(&mut bytes), false);
        self.client.create(bytes)
    }

    /// A matrix from what `fill` writes to pinned memory, and what it returns.
    pub(super) fn upload_with<T>(
        &self,
        [rows, cols]: [usize; 2],
        element: Element,
        fill: impl FnOnce(&mut [u8]) -> T,
    ) -> (Matrix, T) {
        let len = rows * cols * element.size();
        let stream_id = Self::stream_id();
        let pinned = self
            .server
            .submit_blocking(move |server: &mut Server| server.staging(&[len], stream_id));
        let pinned = pinned.ok().and_then(std::result::Result::ok);
        let mut bytes = match pinned.and_then(|mut pinned| pinned.pop()) {
            Some(bytes) => bytes,
            None => Bytes::from_bytes_vec(vec![0; len]),
        };
        let filled = fill(&mut bytes);
        let matrix = Matrix {
            handle: self.client.create(bytes),
            rows,
            cols,
            element,
        };
        (matrix, filled)
    }

    /// Numbers of tokens, rows and the like in device memory.
    pub fn upload_u32(&self, values: &[u32]) -> Numbers {
        Numbers {
            handle: self.upload(bytemuck::cast_slice(values).to_vec()),
            len: values.len(),
        }
    }

    /// The bytes of a matrix, once all that was queued before is done.
    ///
    /// # Errors
    /// [`Error::Stage`] with what went wrong on the device.
    pub fn download(&self, matrix: &Matrix) -> Result<Vec<u8>> {
        let bytes = self
            .client
            .read_one(matrix.handle.clone())
            .map_err(|error| Error::stage("reading from the GPU")(Failed(format!("{error:?}"))))?;
        self.check()?;
        Ok(bytes[..matrix.len() * matrix.element.size()].to_vec())
    }

    /// As [`Gpu::download`], as single precision whatever the elements are.
    ///
    /// # Errors
    /// As [`Gpu::download`].
    pub fn download_f32(&self, matrix: &Matrix) -> Result<Vec<f32>> {
        let bytes = self.download(matrix)?;
        Ok(match matrix.element {
            Element::F32 => bytes
                .as_chunks::<4>()
                .0
                .iter()
                .map(|bytes| f32::from_le_bytes(*bytes))
                .collect(),
            Element::Bf16 => bytes
                .as_chunks::<2>()
                .0
                .iter()
                .map(|bytes| bf16::from_le_bytes(*bytes).to_f32())
                .collect(),
        })
    }

    /// Waits for all that was queued.
    ///
    /// # Errors
    /// [`Error::Stage`] with what went wrong on the device.
    pub fn sync(&self) -> Result<()> {
        cubecl::future::block_on(self.client.sync())
            .map_err(|error| Error::stage("waiting for the GPU")(Failed(format!("{error:?}"))))?;
        self.check()
    }

    /// Bytes of device memory that are in use, and that are held from the driver.
    pub fn memory(&self) -> Option<(u64, u64)> {
        let usage = self.client.memory_usage().ok()?;
        Some((usage.bytes_in_use, usage.bytes_reserved))
    }

    /// Gives unused memory back to the driver.
    pub fn release_unused(&self) {
        self.client.memory_cleanup();
    }

    /// Allocates what `work` asks for in pieces of their own size, not inside the pool's large pages: for what stays.
    pub fn lasting<T>(&self, work: impl FnOnce() -> T) -> T {
        let stream_id = Self::stream_id();
        self.server.submit(move |server: &mut Server| {
            server.allocation_mode(MemoryAllocationMode::Persistent, stream_id);
        });
        let done = work();
        self.server.submit(move |server: &mut Server| {
            server.allocation_mode(MemoryAllocationMode::Auto, stream_id);
        });
        done
    }

    /// Keeps the first failure for the next [`Gpu::check`].
    pub(super) fn fail(failure: &Mutex<Option<String>>, message: String) {
        if let Ok(mut first) = failure.lock() {
            first.get_or_insert(message);
        }
    }

    pub(super) fn failure(&self) -> Arc<Mutex<Option<String>>> {
        self.failure.clone()
    }

    /// # Errors
    /// [`Error::Stage`] with what failed since the last call.
    fn check(&self) -> Result<()> {
        let failure = self.failure.lock().ok().and_then(|mut first| first.take());
        match failure {
            Some(message) => Err(Error::stage("a product on the GPU")(Failed(message))),
            None => Ok(()),
        }
    }

    pub(super) fn stream_id() -> StreamId {
        StreamId::current()
    }
}

/// Where compiled kernels are kept, in a folder of their own for every version of their sources; none where the user
/// has no folder for caches.
fn cache_folder() -> Option<PathBuf> {
    let folder = |name: &str| {
        std::env::var_os(name)
            .filter(|value| !value.is_empty())
            .map(PathBuf::from)
    };
    let caches = folder("XDG_CACHE_HOME").or_else(|| folder("HOME").map(|home| home.join(".cache")))?;
    let mut hasher = blake3::Hasher::new();
    for source in super::kernels::SOURCES {
        hasher.update(source.as_bytes());
    }
    let version = hasher.finalize().to_hex();
    Some(caches.join("olive").join(format!("kernels-{}", &version[..16])))
}

/// Whole numbers in device memory.
#[derive(Debug, Clone)]
pub struct Numbers {
    pub(super) handle: Handle,
    /// How many.
    pub len: usize,
}

impl Numbers {
    pub(super) fn arg(&self) -> ArrayArg<CudaRuntime> {
        // SAFETY: the memory holds `len` numbers.
        unsafe { ArrayArg::from_raw_parts(self.handle.clone(), self.len) }
    }
}

impl Matrix {
    /// Its elements as the argument of a kernel.
    pub(super) fn arg(&self) -> ArrayArg<CudaRuntime> {
        // SAFETY: the memory holds `len` elements.
        unsafe { ArrayArg::from_raw_parts(self.handle.clone(), self.len()) }
    }
}
