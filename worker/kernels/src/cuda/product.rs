//! Launches of products: which kernel multiplies some rows by weights, on what grid. All kernels give a row the same bits,
//! so the choice is one of time alone.

use super::{
    CudaError, Device, DeviceLimits, Kernel, Program, Source,
    packing::{Form, TILE},
};

/// Threads of a block, in warps.
const WARPS: usize = 8;
/// Floats from one row of sums in the shared memory of `matmul` to the next.
const SUMS_STRIDE: usize = 36;
/// Rows of a block of `matmul_rows`, and tiles of inputs that come to its shared memory at once.
const MANY_ROWS: usize = 64;
const STEP_TILES: usize = 4;
/// Bytes of shared memory that a codebook takes.
const CODEBOOK_BYTES: usize = 1024;

/// A kernel that multiplies by weights of any form.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) enum ProductKernel {
    /// `matmul`: blocks of 32 outputs, whose warps share out the K-segments.
    FewRows {
        /// Rows of a block, in eights.
        row_tiles: usize,
    },
    /// `matmul_rows`: blocks of 256 outputs of 64 rows.
    ManyRows,
}

/// All kernels that multiply by weights of one form, in the order of [`ProductKernel::ALL`].
#[derive(Debug)]
pub(super) struct ProductKernels(Vec<Kernel>);

/// What a launch depends on, beside the rows and the device: weights that are alike.
#[derive(Clone, Copy, Debug)]
pub(super) struct ProductShape {
    /// Of each weight.
    pub(super) form: Form,
    /// Of each weight.
    pub(super) n_segments: usize,
    /// Sums of segments that wait for others at once.
    pub(super) max_pending: usize,
    /// Tiles of 32 outputs of all weights; of one, if gated.
    pub(super) out_tiles: usize,
    /// Whether two weights become one output.
    pub(super) gated: bool,
}

/// A launch of a product.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct ProductLaunch {
    /// What is launched.
    pub(super) kernel: ProductKernel,
    /// Blocks: of rows, of outputs.
    pub(super) grid: [u32; 3],
    /// Threads of a block.
    pub(super) threads: u32,
    /// Dynamic shared memory of a block.
    pub(super) shared_bytes: u32,
}

// === impl ProductKernel ===

impl ProductKernel {
    /// All kernels, those for fewer rows first.
    pub(super) const ALL: [Self; 5] = [
        Self::FewRows { row_tiles: 1 },
        Self::FewRows { row_tiles: 2 },
        Self::FewRows { row_tiles: 4 },
        Self::FewRows { row_tiles: 8 },
        Self::ManyRows,
    ];

    /// Its entry point, the only one of its program.
    pub(super) fn entries(self) -> &'static [&'static str; 1] {
        match self {
            Self::FewRows { .. } => &["matmul"],
            Self::ManyRows => &["matmul_rows"],
        }
    }

    /// The program that has it, for weights of one form.
    pub(super) fn program(self, form: Form, gated: bool) -> Program {
        let gated = [("GATED", i64::from(gated))];
        match self {
            Self::FewRows { row_tiles } => {
                let rows = [("ROW_TILES", row_tiles as i64)];
                Program::new(Source::Matmul, &[&form.defines()[..], &rows, &gated].concat())
            }
            Self::ManyRows => Program::new(Source::MatmulRows, &[&form.defines()[..], &gated].concat()),
        }
    }

    /// Rows and out tiles of a block.
    fn block(self, gated: bool) -> [usize; 2] {
        match self {
            Self::FewRows { row_tiles } => [8 * row_tiles, 1],
            Self::ManyRows => [MANY_ROWS, if gated { WARPS / 2 } else { WARPS }],
        }
    }

    /// Dynamic shared memory of a block.
    fn shared_bytes(self, shape: &ProductShape) -> usize {
        match self {
            Self::FewRows { row_tiles } => {
                let sums = if shape.gated { 2 } else { 1 } * shape.n_segments;
                sums * 8 * row_tiles * SUMS_STRIDE * size_of::<f32>()
            }
            Self::ManyRows => {
                let sums_of_inputs = if shape.form.has_minimum() { TILE / shape.form.group_len() } else { 0 };
                let row_bytes = TILE * size_of::<u16>() + sums_of_inputs * size_of::<f32>();
                let steps = 2 * STEP_TILES * MANY_ROWS * row_bytes;
                // The last of the pending sums are in registers; finished sums need room, too.
                let pending = shape.max_pending.saturating_sub(1).max(1);
                steps + pending * MANY_ROWS * WARPS * TILE * size_of::<f32>()
            }
        }
    }

    fn fits(self, shape: &ProductShape, limits: DeviceLimits) -> bool {
        self.shared_bytes(shape) + CODEBOOK_BYTES <= limits.shared_bytes_per_block as usize
    }

    /// Whether `matmul_rows` is the faster one. Bound by the L2, `matmul` does 28 flops for each byte of it with 4-bit
    /// weights, which is 150 Tflop/s of an H100; a block of `matmul_rows` has a multiprocessor to itself, of which all 132
    /// do 400 by the count of its instructions. So a third of them must have one (by arithmetic: no GPU was at hand).
    fn pays_off(self, shape: &ProductShape, n_rows: usize, limits: DeviceLimits) -> bool {
        match self {
            Self::FewRows { .. } => true,
            Self::ManyRows => {
                let [rows, out_tiles] = self.block(shape.gated);
                let n_blocks = n_rows.div_ceil(rows) * shape.out_tiles.div_ceil(out_tiles);
                n_rows > rows && 3 * n_blocks >= limits.n_multiprocessors as usize
            }
        }
    }

    /// The one for so many rows: of the few-row kernels the smallest that has all of them, if one does.
    fn choose(shape: &ProductShape, n_rows: usize, limits: DeviceLimits) -> Self {
        let fitting = || {
            Self::ALL.into_iter().filter(|kernel| kernel.fits(shape, limits) && kernel.pays_off(shape, n_rows, limits))
        };
        let enough = fitting().find(|kernel| kernel.block(shape.gated)[0] >= n_rows);
        enough.or(fitting().next_back()).unwrap_or(Self::ALL[0])
    }
}

// === impl ProductKernels ===

impl ProductKernels {
    /// Loads or compiles them.
    pub(super) fn load(device: &Device, form: Form, gated: bool) -> Result<Self, CudaError> {
        let load = |kernel: ProductKernel| device.kernel(&kernel.program(form, gated), kernel.entries()[0]);
        ProductKernel::ALL.into_iter().map(load).collect::<Result<_, _>>().map(Self)
    }

    pub(super) fn get(&self, kernel: ProductKernel) -> &Kernel {
        let place = ProductKernel::ALL.into_iter().position(|other| other == kernel);
        &self.0[place.expect("one of all")]
    }
}

// === impl ProductLaunch ===

impl ProductLaunch {
    /// The launch for some rows.
    pub(super) fn new(shape: &ProductShape, n_rows: usize, limits: DeviceLimits) -> Self {
        let kernel = ProductKernel::choose(shape, n_rows, limits);
        let [rows, out_tiles] = kernel.block(shape.gated);
        Self {
            kernel,
            grid: [n_rows.div_ceil(rows) as u32, shape.out_tiles.div_ceil(out_tiles) as u32, 1],
            threads: 32 * WARPS as u32,
            shared_bytes: kernel.shared_bytes(shape) as u32,
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_kernel_goes_by_rows_and_blocks_and_room() {
        let h100 = DeviceLimits { n_multiprocessors: 132, shared_bytes_per_block: 227 << 10, l2_bytes: 50 << 20 };
        let a100 = DeviceLimits { n_multiprocessors: 108, shared_bytes_per_block: 163 << 10, l2_bytes: 40 << 20 };
        let rtx = DeviceLimits { n_multiprocessors: 84, shared_bytes_per_block: 99 << 10, l2_bytes: 6 << 20 };
        let shape = |out_tiles: usize, max_pending: usize| ProductShape {
            form: Form::all()[0],
            n_segments: 8,
            max_pending,
            out_tiles,
            gated: false,
        };
        let few = |row_tiles| ProductKernel::FewRows { row_tiles };
        let many = ProductKernel::ManyRows;
        for (shape, n_rows, limits, expected) in [
            (shape(128, 3), 1, h100, few(1)),
            (shape(128, 3), 17, h100, few(4)),
            (shape(1000, 3), 64, h100, few(8)),
            // 32 blocks, and 48.
            (shape(128, 3), 128, h100, few(8)),
            (shape(128, 3), 192, h100, many),
            (shape(128, 3), 192, a100, many),
            // More pending sums than shared memory has room for.
            (shape(128, 7), 512, h100, few(8)),
            (shape(128, 3), 512, rtx, few(8)),
            (shape(128, 2), 512, rtx, many),
        ] {
            let launch = ProductLaunch::new(&shape, n_rows, limits);
            assert_eq!(launch.kernel, expected, "{shape:?}, {n_rows} rows, {limits:?}");
            let [rows, out_tiles] = launch.kernel.block(false);
            assert!(launch.grid[0] as usize * rows >= n_rows && launch.grid[1] as usize * out_tiles >= shape.out_tiles);
        }
    }
}
