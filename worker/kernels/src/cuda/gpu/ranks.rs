//! Between ranks: tensors as the collectives of a group take them, and what was gathered put together.

use bytemuck::{Pod, Zeroable};
use lockstep_collectives::{DeviceSlice, DeviceSliceMut};

use super::{super::CudaError, Arg, Gpu, GpuTensor, GpuTerms, ROW_THREADS};

/// Most ranks whose columns are joined.
const MAX_RANKS: usize = 64;

/// `ColumnEnds` of `elementwise.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Pod, Zeroable)]
struct ColumnEndsArg {
    end: [u32; MAX_RANKS],
}

// === impl Gpu ===

impl Gpu {
    /// Room in which to gather the columns that ranks have of `[n_rows, width]`: those of one rank after those of another,
    /// `[rank][n_rows, columns of the rank]`. What lies there is whatever lay there.
    ///
    /// # Errors
    /// The driver's.
    pub fn gather_room(&self, n_rows: usize, width: usize) -> Result<GpuTensor, CudaError> {
        self.tensor(n_rows, width)
    }

    /// Whole rows, `[n_rows, width]`, of what was gathered in a [`Gpu::gather_room`]. `ends`: where each rank's columns
    /// end in a row.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If the ends are not those of 1 to 64 ranks that share the columns.
    pub fn join_columns(&self, gathered: &GpuTensor, ends: &[u32]) -> Result<GpuTensor, CudaError> {
        let (n_ranks, width) = (ends.len(), gathered.width);
        let is_sound =
            n_ranks <= MAX_RANKS && ends.is_sorted() && ends.last().is_some_and(|end| *end as usize == width);
        assert!(is_sound, "{ends:?} are no ends of the ranks' columns in {width}");
        let joined = self.tensor(gathered.n_rows, width)?;
        if gathered.n_rows == 0 {
            return Ok(joined);
        }
        let mut ranks = ColumnEndsArg { end: [0; MAX_RANKS] };
        ranks.end[..n_ranks].copy_from_slice(ends);
        let args = [
            Arg::Ptr(gathered.values.pointer()),
            Arg::Ptr(joined.values.pointer()),
            Arg::of(&ranks),
            Arg::U32(width as u32),
        ];
        let grid = [gathered.n_rows as u32, n_ranks as u32, 1];
        // SAFETY: the kernel's parameters; both have `width` columns, which the ends share out.
        unsafe { self.kernels.join_columns.launch(grid, ROW_THREADS, 0, &args)? };
        Ok(joined)
    }
}

impl Gpu {
    /// The tokens that were chosen for the first rows of the last step's logits, for a collective between devices.
    ///
    /// # Panics
    /// If there are not so many.
    pub fn choices_slice_mut(&mut self, n_rows: usize) -> DeviceSliceMut<'_, u32> {
        assert!(n_rows <= self.choices.len(), "{n_rows} choices of {}", self.choices.len());
        // SAFETY: the buffer lives as long as this Gpu, and all who use it do so on the device's stream.
        unsafe { DeviceSliceMut::new(self.choices.pointer(), n_rows) }
    }
}

// === impl GpuTensor ===

impl GpuTensor {
    /// All values, for a collective between devices to read.
    pub fn collective_slice(&self) -> DeviceSlice<'_, f32> {
        // SAFETY: the piece lies there, its pool gives nothing back, and all who use it do so on the device's stream.
        unsafe { DeviceSlice::new(self.values.pointer(), self.values.len()) }
    }

    /// All values, for a collective between devices to write.
    pub fn collective_slice_mut(&mut self) -> DeviceSliceMut<'_, f32> {
        // SAFETY: as above.
        unsafe { DeviceSliceMut::new(self.values.pointer(), self.values.len()) }
    }
}

// === impl GpuTerms ===

impl GpuTerms {
    /// All planes, for a collective between devices to read and write.
    pub fn collective_slice_mut(&mut self) -> DeviceSliceMut<'_, f32> {
        // SAFETY: as of a tensor.
        unsafe { DeviceSliceMut::new(self.planes.pointer(), self.planes.len()) }
    }
}
