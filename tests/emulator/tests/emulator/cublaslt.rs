//! Dense products of cuBLASLt: what they mean, and what is refused.

use std::ffi::c_void;
use std::ptr;

use cudarc::cublaslt::result::{self, CublasError};
use cudarc::cublaslt::sys::cublasComputeType_t::CUBLAS_COMPUTE_32F;
use cudarc::cublaslt::sys::cublasLtMatmulDescAttributes_t::{
    CUBLASLT_MATMUL_DESC_TRANSA as TRANSPOSES_A, CUBLASLT_MATMUL_DESC_TRANSB as TRANSPOSES_B,
};
use cudarc::cublaslt::sys::cublasLtMatmulPreferenceAttributes_t::{
    CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES as WORKSPACE_BYTES,
    CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES as D_ALIGNMENT,
};
use cudarc::cublaslt::sys::cublasLtMatrixLayoutAttribute_t::CUBLASLT_MATRIX_LAYOUT_ORDER as ORDER;
use cudarc::cublaslt::sys::cublasStatus_t::{
    self as Status, CUBLAS_STATUS_INVALID_VALUE as INVALID, CUBLAS_STATUS_NOT_SUPPORTED as NOT_SUPPORTED,
};
use cudarc::cublaslt::sys::cudaDataType::{self as DataType, CUDA_R_16BF, CUDA_R_16F, CUDA_R_32F};
use cudarc::driver::DevicePtr;

use crate::driver::hold;
use crate::gpu::Gpu;

/// A matrix as it is laid out, and where it begins in memory, in values.
#[derive(Clone, Copy)]
struct Matrix {
    data_type: DataType,
    rows: usize,
    columns: usize,
    stride: usize,
    by_rows: bool,
    offset: usize,
}

/// Everything that a product depends on.
#[derive(Clone, Copy)]
struct Case {
    /// A, B, C and D.
    matrices: [Matrix; 4],
    /// Of A and B.
    transposed: [bool; 2],
    alpha: f32,
    beta: f32,
    /// What D is said to be aligned to.
    alignment: u32,
    /// What the algorithm may take, what it is given, and from where on.
    workspace: [usize; 3],
}

/// Values of a buffer, and bytes of the workspace.
const LEN: usize = 1024;

fn matrix(rows: usize, columns: usize, stride: usize) -> Matrix {
    Matrix { data_type: CUDA_R_32F, rows, columns, stride, by_rows: false, offset: 0 }
}

/// D[12, 8] = Aᵀ B: as Lockstep has it.
fn case() -> Case {
    let outputs = matrix(12, 8, 16);
    Case {
        matrices: [matrix(40, 12, 40), matrix(40, 8, 44), outputs, outputs],
        transposed: [true, false],
        alpha: 1.0,
        beta: 0.0,
        alignment: 256,
        workspace: [LEN, LEN, 0],
    }
}

/// Small integers, whose sums are exact in any order.
fn values(salt: usize) -> Vec<f32> {
    (0..LEN).map(|i| ((i * (salt + 3) + i / 7) % 9) as f32 - 4.0).collect()
}

fn at(matrix: &Matrix, row: usize, column: usize) -> usize {
    matrix.offset + if matrix.by_rows { row * matrix.stride + column } else { column * matrix.stride + row }
}

/// What D's whole buffer holds in the end.
fn expected(case: &Case) -> Vec<f32> {
    let [a, b, c, d] = &case.matrices;
    let [from_a, from_b, from_c, mut out] = [0, 1, 2, 3].map(values);
    let [turns_a, turns_b] = case.transposed;
    for row in 0..d.rows {
        for column in 0..d.columns {
            let terms = (0..if turns_a { a.rows } else { a.columns }).map(|k| {
                let a = from_a[if turns_a { at(a, k, row) } else { at(a, row, k) }];
                a * from_b[if turns_b { at(b, column, k) } else { at(b, k, column) }]
            });
            let sum = case.alpha * terms.sum::<f32>();
            out[at(d, row, column)] = if case.beta == 0.0 { sum } else { sum + case.beta * from_c[at(c, row, column)] };
        }
    }
    out
}

/// What D's whole buffer holds after the product, which is held back until the host has gone on.
fn multiply(case: &Case) -> Result<Vec<f32>, CublasError> {
    let gpu = Gpu::open();
    let buffers = [0, 1, 2, 3].map(|i| {
        let values = values(i);
        let is_bf16 = case.matrices[i].data_type == CUDA_R_16BF;
        let bytes = values.iter().flat_map(|x| x.to_bits().to_le_bytes()[if is_bf16 { 2.. } else { 0.. }].to_vec());
        gpu.stream.clone_htod(&bytes.collect::<Vec<u8>>()).unwrap()
    });
    let workspace = gpu.stream.alloc_zeros::<u8>(LEN + 256).unwrap();
    gpu.stream.synchronize().unwrap();
    let pointers = [0, 1, 2, 3].map(|i| {
        let size = if case.matrices[i].data_type == CUDA_R_32F { 4 } else { 2 };
        (buffers[i].device_ptr(&gpu.stream).0 + (case.matrices[i].offset * size) as u64) as *mut c_void
    });
    let scratch = (workspace.device_ptr(&gpu.stream).0 as usize + case.workspace[2]) as *mut c_void;
    // SAFETY: the objects live until they are destroyed at the end, the buffers until the stream is done.
    unsafe {
        let handle = result::create_handle()?;
        let operation = result::create_matmul_desc(CUBLAS_COMPUTE_32F, CUDA_R_32F)?;
        for (name, transposed) in [TRANSPOSES_A, TRANSPOSES_B].into_iter().zip(case.transposed) {
            result::set_matmul_desc_attribute(operation, name, ptr::from_ref(&i32::from(transposed)).cast(), 4)?;
        }
        let preference = result::create_matmul_pref()?;
        let workspace_bytes = case.workspace[0] as u64;
        result::set_matmul_pref_attribute(preference, WORKSPACE_BYTES, ptr::from_ref(&workspace_bytes).cast(), 8)?;
        result::set_matmul_pref_attribute(preference, D_ALIGNMENT, ptr::from_ref(&case.alignment).cast(), 4)?;
        let [a, b, c, d] = case.matrices.map(|Matrix { data_type, rows, columns, stride, by_rows, .. }| {
            let layout = result::create_matrix_layout(data_type, rows as u64, columns as u64, stride as i64).unwrap();
            result::set_matrix_layout_attribute(layout, ORDER, ptr::from_ref(&i32::from(by_rows)).cast(), 4).unwrap();
            layout
        });
        let algorithm = result::get_matmul_algo_heuristic(handle, operation, a, b, c, d, preference)?.algo;
        let release = hold(&gpu.stream);
        let (alpha, beta) = (case.alpha, case.beta);
        let [from_a, from_b, from_c, out] = pointers;
        let (alpha, beta) = (ptr::from_ref(&alpha).cast(), ptr::from_ref(&beta).cast());
        let stream = gpu.stream.cu_stream().cast();
        let queued = result::matmul(
            handle,
            operation,
            alpha,
            beta,
            from_a,
            a,
            from_b,
            b,
            from_c,
            c,
            out,
            d,
            &algorithm,
            scratch,
            case.workspace[1],
            stream,
        );
        for layout in [a, b, c, d] {
            result::destroy_matrix_layout(layout)?;
        }
        result::destroy_matmul_pref(preference)?;
        result::destroy_matmul_desc(operation)?;
        result::destroy_handle(handle)?;
        release.send(()).unwrap();
        queued?;
    }
    assert!(gpu.stream.clone_dtoh(&workspace).unwrap()[..case.workspace[0]].iter().all(|byte| *byte == 0xff));
    let out = gpu.stream.clone_dtoh(&buffers[3]).unwrap();
    let size = out.len() / LEN;
    Ok(out
        .chunks_exact(size)
        .map(|x| f32::from_le_bytes(std::array::from_fn(|i| if i + size < 4 { 0 } else { x[i + size - 4] })))
        .collect())
}

#[track_caller]
fn check(case: &Case) {
    assert_eq!(multiply(case).unwrap(), expected(case));
}

#[track_caller]
fn check_refused(status: Status, change: impl FnOnce(&mut Case)) {
    let mut changed = case();
    change(&mut changed);
    assert_eq!(multiply(&changed), Err(CublasError(status)));
}

#[test]
fn transposes_and_strides_and_offsets_say_where_values_are() {
    check(&case());
    for transposed in [[false, false], [false, true], [true, true]] {
        let mut case = Case { transposed, ..case() };
        case.matrices[0] = if transposed[0] { matrix(40, 12, 40) } else { matrix(12, 40, 20) };
        case.matrices[1] = if transposed[1] { matrix(8, 40, 8) } else { matrix(40, 8, 40) };
        check(&case);
    }
    let mut apart = case();
    (apart.alignment, apart.matrices[3].offset) = (16, 4);
    check(&apart);
}

#[test]
fn rows_may_come_one_after_another() {
    for turned in 0..4 {
        let mut case = case();
        let matrix = &mut case.matrices[turned];
        (matrix.by_rows, matrix.stride) = (true, matrix.columns.next_multiple_of(8) + 8);
        if turned >= 2 {
            // C and D have one order.
            (case.matrices[2], case.matrices[3]) = (*matrix, *matrix);
        }
        check(&case);
    }
}

#[test]
fn factors_and_types_are_those_asked_for() {
    check(&Case { alpha: -2.0, beta: 0.5, ..case() });
    let mut halves = case();
    (halves.matrices[0].data_type, halves.matrices[1].data_type) = (CUDA_R_16BF, CUDA_R_16BF);
    halves.matrices[1].stride = 48;
    check(&halves);
    // C and D, too: sums of eight products are exact in eight bits.
    (halves.matrices[2].data_type, halves.matrices[3].data_type) = (CUDA_R_16BF, CUDA_R_16BF);
    (halves.alpha, halves.matrices[0].rows, halves.matrices[1].rows) = (1.0, 8, 8);
    check(&halves);
}

#[test]
fn what_does_not_fit_is_refused() {
    check_refused(INVALID, |case| case.matrices[0].stride = 36);
    check_refused(INVALID, |case| case.matrices[3].stride = 8);
    check_refused(INVALID, |case| case.matrices[1].rows = 36);
    check_refused(INVALID, |case| case.matrices[3].columns = 12);
    check_refused(INVALID, |case| case.transposed = [false, false]);
    check_refused(INVALID, |case| case.workspace[1] = LEN - 1);
    check_refused(INVALID, |case| case.workspace[2] = 128);
    check_refused(INVALID, |case| case.matrices[0].offset = 4);
    check_refused(INVALID, |case| (case.alignment, case.matrices[3].offset) = (16, 2));
    check_refused(NOT_SUPPORTED, |case| case.alignment = 8);
    check_refused(NOT_SUPPORTED, |case| case.matrices[1].stride = 42);
    check_refused(NOT_SUPPORTED, |case| {
        (case.matrices[0].data_type, case.matrices[1].data_type) = (CUDA_R_16F, CUDA_R_16F)
    });
}
