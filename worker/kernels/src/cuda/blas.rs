//! cuBLASLt: NVIDIA's products of dense matrices, at the speed of the tensor cores, queued on our stream.
//!
//! The library counts matrices column by column. Ours lie row by row, so each is its own transpose to the library, and it is
//! given `outᵀ = w · xᵀ` to compute, where we have `out = x · wᵀ`:
//!
//! | | we have, by rows | it sees, by columns | leading dimension | is transposed |
//! |---|---|---|---|---|
//! | A | weights `[n_out, n_in]` | `[n_in, n_out]` | `n_in` | yes |
//! | B | inputs `[n_rows, n_in]` | `[n_in, n_rows]` | `n_in` | no |
//! | C, D | `n_out` columns of outputs `[n_rows, stride]` | `[n_out, n_rows]` | `stride` | no |
//!
//! That is the one combination which every kind of tensor core reads straight from memory. Which of its kernels is best for a
//! shape the library says by a heuristic, which takes the host some time: it is asked once for each shape.

use std::{collections::HashMap, ffi::c_void, fmt, ptr};

use bytemuck::Pod;
use cudarc::cublaslt::{
    result::{self, CublasError},
    sys::{
        self, cublasComputeType_t as ComputeType, cublasLtHandle_t, cublasLtMatmulAlgo_t, cublasLtMatmulDesc_t,
        cublasLtMatmulDescAttributes_t as OperationAttribute, cublasLtMatmulPreference_t,
        cublasLtMatmulPreferenceAttributes_t as PreferenceAttribute, cublasLtMatrixLayout_t, cublasStatus_t as Status,
        cudaDataType as DataType,
    },
};
use tracing::warn;

use super::{Buffer, CudaError, Device, library::Library};

/// Device memory that the library computes in; NVIDIA's advice for Hopper, which is eight times that for what was before.
const WORKSPACE_BYTES: usize = 32 << 20;
/// Shapes that are kept: those of the products of prompts of some forty lengths.
const MAX_PLANS: usize = 256;
/// What inputs and weights are aligned to, as the library assumes where it is told nothing: they begin where memory does.
const OPERAND_ALIGNMENT: u64 = 256;
/// What outputs are aligned to, which may begin at any column that is a multiple of 4.
const OUTPUT_ALIGNMENT: u32 = 16;

/// `CUBLAS_OP_T`, which cudarc has for cuBLAS alone.
const TRANSPOSE: i32 = 1;

/// A version of cuBLASLt.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct BlasVersion {
    /// The major version of CUDA that it belongs to.
    pub major: usize,
    /// Its own second number.
    pub minor: usize,
}

/// The library, ready for products on one device.
pub(super) struct Blas {
    device: Device,
    plans: HashMap<DenseShape, Option<Plan>>,
    preference: Owned<cublasLtMatmulPreference_t>,
    operation: Owned<cublasLtMatmulDesc_t>,
    handle: Owned<cublasLtHandle_t>,
    workspace: Buffer<u8>,
}

/// A product of dense matrices.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub(super) struct DenseShape {
    /// Of inputs and outputs.
    pub(super) n_rows: usize,
    /// Rows of the weights.
    pub(super) n_out: usize,
    /// Columns of inputs and weights.
    pub(super) n_in: usize,
    /// From one row of the outputs to the next.
    pub(super) stride: usize,
}

/// How products of one shape are computed.
struct Plan {
    weights: Owned<cublasLtMatrixLayout_t>,
    inputs: Owned<cublasLtMatrixLayout_t>,
    outputs: Owned<cublasLtMatrixLayout_t>,
    algorithm: cublasLtMatmulAlgo_t,
}

/// Something of the library's, which is given back at the end.
struct Owned<T: Copy> {
    raw: T,
    destroy: unsafe fn(T) -> Result<(), CublasError>,
}

// SAFETY: the library's objects may be used by any thread, one at a time: what changes them takes `&mut`.
unsafe impl Send for Blas {}

/// Which cuBLASLt there is.
///
/// # Errors
/// There is none.
pub fn blas_version() -> Result<BlasVersion, CudaError> {
    Library::CublasLt.find()?;
    // SAFETY: it takes nothing, and the library is there.
    let version = unsafe { sys::cublasLtGetVersion() };
    Ok(BlasVersion { major: version / 10_000, minor: version / 100 % 100 })
}

// === impl Blas ===

impl Blas {
    /// Opens the library for a device.
    ///
    /// # Errors
    /// There is no library, it does not work on this device, or its workspace finds no room.
    pub(super) fn open(device: &Device) -> Result<Self, CudaError> {
        Library::CublasLt.find()?;
        device.bind()?;
        let handle = result::create_handle().map_err(CudaError::blas("cublasLtCreate"))?;
        let handle = Owned { raw: handle, destroy: result::destroy_handle };
        let blas = Self {
            device: device.clone(),
            plans: HashMap::new(),
            preference: preference()?,
            operation: operation()?,
            handle,
            workspace: device.alloc(WORKSPACE_BYTES)?,
        };
        Ok(blas)
    }

    /// Whether the library has a kernel for a shape.
    ///
    /// # Errors
    /// The library's.
    pub(super) fn can(&mut self, shape: DenseShape) -> Result<bool, CudaError> {
        self.plan(shape)?;
        Ok(self.plans[&shape].is_some())
    }

    #[cfg(test)]
    pub(super) fn n_plans(&self) -> usize {
        self.plans.len()
    }

    /// Queues `out = inputs · weightsᵀ`: bf16 by bf16, summed in f32.
    ///
    /// # Errors
    /// The library's; or it has no kernel for the shape.
    ///
    /// # Safety
    /// All three lead to memory of the device, of the shape's size, that stays there until the product is computed.
    pub(super) unsafe fn multiply(
        &mut self,
        shape: DenseShape,
        weights: u64,
        inputs: u64,
        out: u64,
    ) -> Result<(), CudaError> {
        assert!((weights | inputs).is_multiple_of(OPERAND_ALIGNMENT), "operands at the beginning of memory");
        assert!(out.is_multiple_of(u64::from(OUTPUT_ALIGNMENT)), "outputs at a multiple of {OUTPUT_ALIGNMENT} bytes");
        self.plan(shape)?;
        let no_kernel =
            CudaError::blas("cublasLtMatmulAlgoGetHeuristic")(CublasError(Status::CUBLAS_STATUS_NOT_SUPPORTED));
        let Some(Plan { weights: a, inputs: b, outputs: d, algorithm }) = &self.plans[&shape] else {
            return Err(no_kernel);
        };
        let (one, zero) = (1_f32, 0_f32);
        let out = out as *mut c_void;
        // SAFETY: the objects are alive; the two factors are read before the call returns, and C, which is D, not at all,
        // since its factor is 0. That the rest is there is the caller's contract.
        unsafe {
            result::matmul(
                self.handle.raw,
                self.operation.raw,
                ptr::from_ref(&one).cast(),
                ptr::from_ref(&zero).cast(),
                weights as *const c_void,
                a.raw,
                inputs as *const c_void,
                b.raw,
                out,
                d.raw,
                out,
                d.raw,
                algorithm,
                self.workspace.pointer() as *mut c_void,
                WORKSPACE_BYTES,
                self.device.stream().cast(),
            )
        }
        .map_err(CudaError::blas("cublasLtMatmul"))
    }

    /// Asks the library for a plan, if it was not asked before.
    fn plan(&mut self, shape: DenseShape) -> Result<(), CudaError> {
        self.device.bind()?;
        if self.plans.contains_key(&shape) {
            return Ok(());
        }
        if self.plans.len() >= MAX_PLANS {
            self.plans.clear();
        }
        let plan = self.find_plan(shape)?;
        if plan.is_none() {
            warn!("cuBLASLt has no kernel for {shape:?}: our own computes it");
        }
        self.plans.insert(shape, plan);
        Ok(())
    }

    fn find_plan(&self, shape: DenseShape) -> Result<Option<Plan>, CudaError> {
        let DenseShape { n_rows, n_out, n_in, stride } = shape;
        let weights = layout(DataType::CUDA_R_16BF, [n_in, n_out], n_in)?;
        let inputs = layout(DataType::CUDA_R_16BF, [n_in, n_rows], n_in)?;
        let outputs = layout(DataType::CUDA_R_32F, [n_out, n_rows], stride)?;
        // SAFETY: all of these are alive.
        let found = unsafe {
            result::get_matmul_algo_heuristic(
                self.handle.raw,
                self.operation.raw,
                weights.raw,
                inputs.raw,
                outputs.raw,
                outputs.raw,
                self.preference.raw,
            )
        };
        match found {
            Ok(found) => Ok(Some(Plan { weights, inputs, outputs, algorithm: found.algo })),
            Err(CublasError(Status::CUBLAS_STATUS_NOT_SUPPORTED)) => Ok(None),
            Err(error) => Err(CudaError::blas("cublasLtMatmulAlgoGetHeuristic")(error)),
        }
    }
}

impl Drop for Blas {
    fn drop(&mut self) {
        // What is given back is of the device's context. If that is gone, so is everything.
        let _ = self.device.bind();
    }
}

impl fmt::Debug for Blas {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.debug_struct("Blas").field("device", &self.device).field("n_plans", &self.plans.len()).finish_non_exhaustive()
    }
}

impl fmt::Display for BlasVersion {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}.{}", self.major, self.minor)
    }
}

// === impl Owned ===

impl<T: Copy> Drop for Owned<T> {
    fn drop(&mut self) {
        // SAFETY: it was made once and is destroyed once. An error is of no use to anybody.
        let _ = unsafe { (self.destroy)(self.raw) };
    }
}

/// A matrix as the library sees it: `rows` and `columns`, from one column to the next `stride` values.
fn layout(
    data_type: DataType,
    [rows, columns]: [usize; 2],
    stride: usize,
) -> Result<Owned<cublasLtMatrixLayout_t>, CudaError> {
    let raw = result::create_matrix_layout(data_type, rows as u64, columns as u64, stride as i64);
    let raw = raw.map_err(CudaError::blas("cublasLtMatrixLayoutCreate"))?;
    Ok(Owned { raw, destroy: result::destroy_matrix_layout })
}

/// `Aᵀ · B`, summed in f32. All else is as the library has it: column order, and factors in the host's memory.
fn operation() -> Result<Owned<cublasLtMatmulDesc_t>, CudaError> {
    let raw = result::create_matmul_desc(ComputeType::CUBLAS_COMPUTE_32F, DataType::CUDA_R_32F);
    let raw = raw.map_err(CudaError::blas("cublasLtMatmulDescCreate"))?;
    let operation = Owned { raw, destroy: result::destroy_matmul_desc };
    let (value, size) = attribute(&TRANSPOSE);
    // SAFETY: the object is alive, and the attribute an i32.
    let set =
        unsafe { result::set_matmul_desc_attribute(raw, OperationAttribute::CUBLASLT_MATMUL_DESC_TRANSA, value, size) };
    set.map_err(CudaError::blas("cublasLtMatmulDescSetAttribute"))?;
    Ok(operation)
}

/// What kernels may count on.
fn preference() -> Result<Owned<cublasLtMatmulPreference_t>, CudaError> {
    let raw = result::create_matmul_pref().map_err(CudaError::blas("cublasLtMatmulPreferenceCreate"))?;
    let preference = Owned { raw, destroy: result::destroy_matmul_pref };
    let workspace = WORKSPACE_BYTES as u64;
    for (name, (value, size)) in [
        (PreferenceAttribute::CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, attribute(&workspace)),
        (PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, attribute(&OUTPUT_ALIGNMENT)),
        (PreferenceAttribute::CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, attribute(&OUTPUT_ALIGNMENT)),
    ] {
        // SAFETY: the object is alive; the first attribute is a u64, the others are u32.
        let set = unsafe { result::set_matmul_pref_attribute(raw, name, value, size) };
        set.map_err(CudaError::blas("cublasLtMatmulPreferenceSetAttribute"))?;
    }
    Ok(preference)
}

/// An attribute's value as the library takes it.
fn attribute<T: Pod>(value: &T) -> (*const c_void, usize) {
    (ptr::from_ref(value).cast(), size_of::<T>())
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cuda::KernelCache;

    fn blas() -> Blas {
        lockstep_cuda_emulator::load_into_this_process().unwrap();
        Blas::open(&Device::open(0, KernelCache::new(None)).unwrap()).unwrap()
    }

    fn shape(n_rows: usize, stride: usize) -> DenseShape {
        DenseShape { n_rows, n_out: 8, n_in: 32, stride }
    }

    #[test]
    fn what_there_is_no_kernel_for_is_said_beforehand() {
        let mut blas = blas();
        assert!(blas.can(shape(5, 12)).unwrap());
        assert!(!blas.can(shape(5, 10)).unwrap(), "rows that are not aligned");
        let error = blas.can(shape(5, 4)).unwrap_err();
        assert_eq!(error.to_string(), "cublasLtMatmulAlgoGetHeuristic: CUBLAS_STATUS_INVALID_VALUE");
    }

    #[test]
    fn plans_of_many_shapes_take_no_more_room() {
        let mut blas = blas();
        for n_rows in 1..=MAX_PLANS + 1 {
            assert!(blas.can(shape(n_rows, 8)).unwrap());
            assert!(blas.n_plans() <= MAX_PLANS);
        }
        assert!(blas.can(shape(1, 8)).unwrap(), "one that was forgotten");
    }
}
