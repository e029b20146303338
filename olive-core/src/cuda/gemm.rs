//! Matrix products: cuBLASLt on Burn's own stream and memory, opened at run time.
//!
//! Burn's matmul reaches 200 TFLOP/s in bfloat16 on an H200 and is tuned for seconds at each new shape; cuBLASLt
//! reaches 700 to 800. Where cuBLASLt is not installed, Burn's is used ([`fallback`]).

mod fallback;
pub use fallback::product as burns_product;

use std::collections::HashMap;
use std::ffi::c_void;
use std::sync::MutexGuard;
use std::sync::atomic::Ordering;

use cubecl::server::{Binding, ComputeServer};
use cudarc::cublaslt::{result, sys};
use cudarc::driver::sys::CUstream;

use super::device::{Gpu, Server};
use super::matrix::{Element, View};
use crate::error::{Error, Result};

/// Scratch memory that an algorithm may use; what NVIDIA recommends for Hopper.
const WORKSPACE: usize = 32 << 20;
/// Alignment of every operand, in bytes: views begin at whole heads or rows.
const ALIGNMENT: u32 = 16;

/// `out = alpha · a b + beta · add`, for a batch of equally large matrices. Sums are in single precision.
#[derive(Clone, Copy)]
pub struct Product<'a> {
    /// Rows of `out`, columns of `out`, and what is summed over.
    pub size: [usize; 3],
    /// How many products; their operands are as far apart as their views say.
    pub batch: usize,
    /// `a [m, k]`.
    pub a: View<'a>,
    /// `b [k, n]`, with elements of the same type.
    pub b: View<'a>,
    /// Multiplies the product.
    pub alpha: f32,
    /// What is added, `[m, n]`, with elements of the type of `out`.
    pub add: Option<View<'a>>,
    /// `[m, n]`, not transposed.
    pub out: View<'a>,
    /// Whether single-precision operands may be rounded to ten bits of mantissa (TF32).
    pub tf32: bool,
}

impl<'a> Product<'a> {
    /// `out = a b`.
    pub fn new(size: [usize; 3], a: View<'a>, b: View<'a>, out: View<'a>) -> Self {
        Self {
            size,
            batch: 1,
            a,
            b,
            alpha: 1.0,
            add: None,
            out,
            tf32: false,
        }
    }

    /// `out = a b + add`.
    pub fn plus(self, add: View<'a>) -> Self {
        Self {
            add: Some(add),
            ..self
        }
    }

    /// `out = out + a b`.
    pub fn accumulate(self) -> Self {
        self.plus(self.out)
    }

    /// With another `alpha`.
    pub fn times(self, alpha: f32) -> Self {
        Self { alpha, ..self }
    }

    /// A batch of `batch`.
    pub fn batch(self, batch: usize) -> Self {
        Self { batch, ..self }
    }

    /// With single-precision operands rounded to TF32.
    pub fn tf32(self) -> Self {
        Self { tf32: true, ..self }
    }
}

/// An operand as cuBLASLt sees it: column-major, so that what is row-major here is transposed there.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Layout {
    element: Element,
    rows: usize,
    cols: usize,
    stride: usize,
    batch_stride: usize,
    transposed: bool,
}

impl Layout {
    /// The operand `[rows, cols]` behind a view.
    fn new(view: &View<'_>, [rows, cols]: [usize; 2]) -> Self {
        // As stored: a transposed operand has its columns as rows.
        let [rows, cols] = if view.transposed {
            [cols, rows]
        } else {
            [rows, cols]
        };
        Self {
            element: view.matrix.element,
            rows,
            cols,
            stride: view.stride,
            batch_stride: view.batch_stride,
            transposed: view.transposed,
        }
    }
}

/// What decides the algorithm.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash)]
struct Key {
    a: Layout,
    b: Layout,
    out: Layout,
    batch: usize,
    adds: bool,
    tf32: bool,
}

/// A product that is ready to run.
struct Plan {
    operation: sys::cublasLtMatmulDesc_t,
    a: sys::cublasLtMatrixLayout_t,
    b: sys::cublasLtMatrixLayout_t,
    out: sys::cublasLtMatrixLayout_t,
    algorithm: sys::cublasLtMatmulAlgo_t,
}

/// cuBLASLt and the products that it has run.
#[derive(Default)]
pub(super) struct Blas {
    open: Option<Open>,
}

struct Open {
    handle: sys::cublasLtHandle_t,
    stream: CUstream,
    workspace: u64,
    /// Keeps the workspace.
    _memory: cubecl::server::Handle,
    plans: HashMap<Key, Plan>,
}

// SAFETY: handle, stream and plans are pointers to objects of the CUDA context, which any thread may use while it
// alone does; the mutex around `Blas` sees to that.
unsafe impl Send for Open {}

type Run<T> = std::result::Result<T, String>;

impl Gpu {
    /// Opens cuBLASLt on the stream of the CubeCL server, or says why products will be Burn's.
    ///
    /// # Errors
    /// [`Error::Unsupported`] if the library is there and does not start.
    pub(super) fn open_blas(&self) -> Result<()> {
        // SAFETY: opening a library runs its initialisers; these have no effect.
        if !unsafe { sys::is_culib_present() } {
            tracing::warn!("libcublasLt was not found: matrix products are Burn's, about a quarter as fast");
            return Ok(());
        }
        let memory = self.client.empty(WORKSPACE);
        let binding = memory.clone().binding();
        let stream_id = Self::stream_id();
        let opened = self
            .server
            .submit_blocking(move |server: &mut Server| -> Run<Option<Open>> {
                let Some(stream) = stream_of(&format!("{server:?}")) else {
                    return Ok(None);
                };
                let workspace = pointer(server, binding, stream_id)?;
                let handle = result::create_handle().map_err(|error| format!("cublasLtCreate: {error:?}"))?;
                Ok(Some(Open {
                    handle,
                    stream,
                    workspace,
                    _memory: memory,
                    plans: HashMap::new(),
                }))
            });
        let opened = opened
            .map_err(|error| format!("{error:?}"))
            .and_then(|opened| opened);
        match opened {
            Ok(Some(open)) => {
                if let Ok(mut blas) = self.blas.lock() {
                    blas.open = Some(open);
                    self.blas_is_open.store(true, Ordering::Release);
                }
                Ok(())
            }
            Ok(None) => {
                tracing::warn!(
                    "CubeCL's stream is not known: matrix products are Burn's, about a quarter as fast"
                );
                Ok(())
            }
            Err(reason) => Err(Error::unsupported("--device gpu", reason)),
        }
    }

    /// Whether products are cuBLASLt's.
    pub fn has_blas(&self) -> bool {
        self.blas_is_open.load(Ordering::Acquire)
    }

    /// Queues a product. What fails is reported by the next wait or download.
    pub fn product(&self, product: Product<'_>) {
        let [m, n, k] = product.size;
        if m == 0 || n == 0 || product.batch == 0 {
            return;
        }
        if !self.has_blas() {
            return fallback::product(self, product);
        }
        let key = Key {
            a: Layout::new(&product.a, [m, k]),
            b: Layout::new(&product.b, [k, n]),
            out: Layout::new(&product.out, [m, n]),
            batch: product.batch,
            adds: product.add.is_some(),
            tf32: product.tf32,
        };
        let operand = |view: &View<'_>| {
            let bytes = view.offset * view.matrix.element.size();
            (view.matrix.handle.clone().binding(), bytes as u64)
        };
        let add = product.add.unwrap_or(product.out);
        debug_assert!(
            Layout::new(&add, [m, n]) == key.out,
            "invariant: what is added lies like the result"
        );
        let operands = [&product.a, &product.b, &add, &product.out].map(operand);
        let (alpha, beta) = (product.alpha, if product.add.is_some() { 1.0 } else { 0.0 });
        let (blas, failure) = (self.blas.clone(), self.failure());
        let stream_id = Self::stream_id();
        self.server.submit(move |server: &mut Server| {
            let run = || -> Run<()> {
                let mut pointers = [0; 4];
                for (pointer_of, (binding, bytes)) in pointers.iter_mut().zip(operands) {
                    *pointer_of = pointer(server, binding, stream_id)? + bytes;
                }
                let mut blas = blas.lock().map_err(|_| "a product failed before".to_owned())?;
                run(&mut blas, key, pointers, [alpha, beta])
            };
            if let Err(message) = run() {
                Gpu::fail(&failure, format!("{message} ({key:?})"));
            }
        });
    }
}

/// The CUDA stream of a server that has exactly one. CubeCL offers it nowhere else than in this text.
fn stream_of(debug: &str) -> Option<CUstream> {
    let mut found = debug.split("sys: 0x").skip(1).map(|rest| {
        let digits = rest.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(rest.len());
        usize::from_str_radix(&rest[..digits], 16)
    });
    match (found.next(), found.next()) {
        (Some(Ok(address)), None) if address != 0 => Some(address as CUstream),
        _ => None,
    }
}

/// Where a binding is in device memory.
fn pointer(server: &mut Server, binding: Binding, stream_id: cubecl::stream_id::StreamId) -> Run<u64> {
    let resource = server.get_resource(binding, stream_id);
    let resource = resource.map_err(|error| format!("device memory: {error:?}"))?;
    Ok(resource.resource().ptr)
}

fn run(blas: &mut MutexGuard<'_, Blas>, key: Key, pointers: [u64; 4], scales: [f32; 2]) -> Run<()> {
    let open = blas.open.as_mut().ok_or("cuBLASLt is not open")?;
    if !open.plans.contains_key(&key) {
        let plan = Plan::new(open.handle, key)?;
        open.plans.insert(key, plan);
    }
    let plan = &open.plans[&key];
    let [a, b, add, out] = pointers.map(|pointer| pointer as *mut c_void);
    let [alpha, beta] = &scales;
    // Row-major `a b` is column-major `bᵀ aᵀ`: the operands change places.
    // SAFETY: descriptors and algorithm belong to this handle and were made for these layouts; the pointers are to
    // device memory that the bindings of the caller kept until now, and what frees it is queued behind on the same
    // stream; scales are host memory, read before the call returns.
    let status = unsafe {
        result::matmul(
            open.handle,
            plan.operation,
            std::ptr::from_ref(alpha).cast(),
            std::ptr::from_ref(beta).cast(),
            b,
            plan.b,
            a,
            plan.a,
            add,
            plan.out,
            out,
            plan.out,
            &plan.algorithm,
            open.workspace as *mut c_void,
            WORKSPACE,
            open.stream.cast(),
        )
    };
    status.map_err(|error| format!("cublasLtMatmul: {error:?}"))
}

impl Plan {
    fn new(handle: sys::cublasLtHandle_t, key: Key) -> Run<Self> {
        let failed = |what: &'static str| move |error| format!("{what}: {error:?}");
        let compute = match (key.a.element, key.tf32) {
            (Element::F32, true) => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F_FAST_TF32,
            _ => sys::cublasComputeType_t::CUBLAS_COMPUTE_32F,
        };
        let operation = result::create_matmul_desc(compute, sys::cudaDataType_t::CUDA_R_32F)
            .map_err(failed("cublasLtMatmulDescCreate"))?;
        use sys::cublasLtMatmulDescAttributes_t as Attribute;
        for (attribute, operand) in [
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSA, key.b),
            (Attribute::CUBLASLT_MATMUL_DESC_TRANSB, key.a),
        ] {
            let transpose = i32::from(operand.transposed);
            // SAFETY: the attribute is an `i32`, copied before the call returns.
            unsafe {
                result::set_matmul_desc_attribute(
                    operation,
                    attribute,
                    std::ptr::from_ref(&transpose).cast(),
                    size_of::<i32>(),
                )
            }
            .map_err(failed("cublasLtMatmulDescSetAttribute"))?;
        }
        let [a, b, out] = [key.a, key.b, key.out].map(|operand| layout(operand, key.batch));
        let (a, b, out) = (a?, b?, out?);
        let preference = preference()?;
        // SAFETY: all descriptors were made above.
        let found =
            unsafe { result::get_matmul_algo_heuristic(handle, operation, b, a, out, out, preference) };
        // SAFETY: made above and not used again.
        unsafe { result::destroy_matmul_pref(preference) }
            .map_err(failed("cublasLtMatmulPreferenceDestroy"))?;
        let found = found.map_err(failed("cublasLtMatmulAlgoGetHeuristic"))?;
        Ok(Self {
            operation,
            a,
            b,
            out,
            algorithm: found.algo,
        })
    }
}

/// The descriptor of a row-major operand as a column-major one.
fn layout(operand: Layout, batch: usize) -> Run<sys::cublasLtMatrixLayout_t> {
    let element = match operand.element {
        Element::Bf16 => sys::cudaDataType_t::CUDA_R_16BF,
        Element::F32 => sys::cudaDataType_t::CUDA_R_32F,
    };
    let failed = |error| format!("cublasLtMatrixLayout: {error:?}");
    let layout = result::create_matrix_layout(
        element,
        operand.cols as u64,
        operand.rows as u64,
        operand.stride as i64,
    )
    .map_err(failed)?;
    if batch > 1 {
        use sys::cublasLtMatrixLayoutAttribute_t as Attribute;
        let (count, stride) = (batch as i32, operand.batch_stride as i64);
        // SAFETY: the attributes are an `i32` and an `i64`, copied before the calls return.
        unsafe {
            result::set_matrix_layout_attribute(
                layout,
                Attribute::CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT,
                std::ptr::from_ref(&count).cast(),
                size_of::<i32>(),
            )
            .map_err(failed)?;
            result::set_matrix_layout_attribute(
                layout,
                Attribute::CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                std::ptr::from_ref(&stride).cast(),
                size_of::<i64>(),
            )
            .map_err(failed)?;
        }
    }
    Ok(layout)
}

fn preference() -> Run<sys::cublasLtMatmulPreference_t> {
    use sys::cublasLtMatmulPreferenceAttributes_t as Attribute;
    let failed = |error| format!("cublasLtMatmulPreference: {error:?}");
    let preference = result::create_matmul_pref().map_err(failed)?;
    // SAFETY: the attribute is a `u64`, copied before the call returns.
    unsafe {
        result::set_matmul_pref_attribute(
            preference,
            Attribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES,
            std::ptr::from_ref(&(WORKSPACE as u64)).cast(),
            size_of::<u64>(),
        )
        .map_err(failed)?;
    }
    for attribute in [
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES,
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES,
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES,
        Attribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES,
    ] {
        // SAFETY: the attribute is a `u32`, copied before the call returns.
        unsafe {
            result::set_matmul_pref_attribute(
                preference,
                attribute,
                std::ptr::from_ref(&ALIGNMENT).cast(),
                size_of::<u32>(),
            )
            .map_err(failed)?;
        }
    }
    Ok(preference)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_stream_is_taken_only_where_there_is_exactly_one() {
        assert_eq!(
            stream_of("Stream { sys: 0x7f00aa10, memory: 3 }").map(|s| s as usize),
            Some(0x7f00_aa10)
        );
        assert!(stream_of("Stream { sys: 0x1, a: 1 }, Stream { sys: 0x2 }").is_none());
        assert!(stream_of("Stream { sys: 0x0 }").is_none());
        assert!(stream_of("Stream { }").is_none());
    }
}
