//! The embedding table on the device, and the rows of it that a step's tokens name.
//!
//! The rows are those of [`dequantize`](crate::dequantize), bit for bit. Quantized tables lie as [`GpuMatrix`] packs them
//! (see there, and [`bits_per_weight`](super::super::bits_per_weight), for what they take), which keeps all that the file
//! says and needs one decoder for all of them; floats lie as the file has them, since the packed form would round them.
//!
//! | encoding | bytes of 128,256 rows of 4096 |
//! |---|---|
//! | F32 | 2.1 GB |
//! | F16, BF16 | 1.1 GB |
//! | of 5 to 8 bits: Q8_0, Q5_0, Q5_1, Q5_K, Q6_K, I8_32 | 0.56 to 0.62 GB |
//! | of 2 to 4 bits: all others | 0.29 to 0.36 GB |

use bytemuck::{Pod, Zeroable};
use lockstep_checkpoint::Encoding;

use super::{
    super::{
        Arg, Buffer, CudaError, Device, Kernel, Program, Source,
        matrix::{GpuMatrix, MatrixArg},
        packing::{Form, bits_per_weight},
    },
    Gpu, GpuStep, GpuTensor,
};
use crate::{EncodedRows, KernelError};

/// Rows of logits, of so many tokens, that there is room for on the host from the start.
const LOGITS_ROWS: usize = 64;
/// The same for hidden states: as many as a GPU's step has rows, if nobody wants it otherwise.
const HIDDEN_ROWS: usize = 2048;
/// Threads of a block of `embed`, a value each.
const EMBED_THREADS: usize = 256;
/// Bytes of a table that are brought to the device at once.
const UPLOAD_BYTES: usize = 16 << 20;

/// The embedding table, `[n_tokens, width]`, on the device.
#[derive(Debug)]
pub struct GpuTable {
    n_rows: usize,
    width: usize,
    rows: Rows,
    embed: Kernel,
}

#[derive(Debug)]
enum Rows {
    Packed(Box<GpuMatrix>),
    /// As in the file.
    Floats(Buffer<u8>),
}

/// `Table` of `embed.cu`.
#[repr(C)]
#[derive(Clone, Copy, Debug, Default, Pod, Zeroable)]
struct TableArg {
    packed: MatrixArg,
    floats: u64,
    codebook: [u32; 4],
    n_rows: u32,
    width: u32,
}

// === impl Gpu ===

impl Gpu {
    /// Brings the embedding table to the device. The tokens of steps are checked against the last one that was.
    ///
    /// # Errors
    /// No rows, quantized columns that are no multiple of 32; not enough device memory, or a kernel that cannot be compiled.
    pub fn load_table(&mut self, source: &EncodedRows<'_>) -> Result<GpuTable, CudaError> {
        let (encoding, n_rows, width) = (source.encoding(), source.n_rows(), source.n_cols());
        if n_rows == 0 {
            return Err(KernelError::Shape { encoding, n_rows, n_cols: width }.into());
        }
        let embed = self.device.kernel(&program(encoding), "embed")?;
        let rows = match float_kind(encoding) {
            None => Rows::Packed(Box::new(GpuMatrix::new(&self.device, source, None)?)),
            Some(_) => Rows::Floats(upload_rows(&self.device, source)?),
        };
        self.table_rows = Some(n_rows);
        // To grow them later would be to wait for all that is queued, be it a call to a rank that is gone.
        self.rows.reserve((LOGITS_ROWS * n_rows).max(HIDDEN_ROWS * width))?;
        Ok(GpuTable { n_rows, width, rows, embed })
    }

    /// The rows of the table that the step's tokens name: `[n_rows, width]`. Where the step before has chosen a token that
    /// the table lacks, the last row is taken.
    ///
    /// # Errors
    /// The driver's.
    ///
    /// # Panics
    /// If it is not the table that was loaded last.
    pub fn embed(&self, table: &GpuTable, step: &GpuStep) -> Result<GpuTensor, CudaError> {
        assert_eq!(self.table_rows, Some(table.n_rows), "the table that the step's tokens were checked against");
        let n_rows = step.layout.n_rows;
        let out = self.tensor(n_rows, table.width)?;
        let table_arg = table.arg();
        let args = [
            Arg::of(&table_arg),
            Arg::Ptr(step.at(step.layout.tokens)),
            Arg::Ptr(self.choices.pointer()),
            Arg::Ptr(out.values.pointer()),
        ];
        let grid = [n_rows as u32, table.width.div_ceil(EMBED_THREADS) as u32, 1];
        // SAFETY: the kernel's parameters; tokens were checked when the step began, and chosen ones are limited.
        unsafe { table.embed.launch(grid, EMBED_THREADS as u32, 0, &args)? };
        Ok(out)
    }
}

// === impl GpuTable ===

impl GpuTable {
    /// Bytes of device memory that it takes.
    pub fn size_bytes(&self) -> usize {
        match &self.rows {
            Rows::Packed(matrix) => matrix.size_bytes(),
            Rows::Floats(values) => values.len(),
        }
    }

    fn arg(&self) -> TableArg {
        let of_all = TableArg { n_rows: self.n_rows as u32, width: self.width as u32, ..TableArg::default() };
        match &self.rows {
            Rows::Packed(matrix) => {
                TableArg { packed: matrix.arg(), codebook: matrix.form().codebook_words(), ..of_all }
            }
            Rows::Floats(values) => TableArg { floats: values.pointer(), ..of_all },
        }
    }
}

/// `FLOATS` of `embed.cu`; `None` for what is packed.
fn float_kind(encoding: Encoding) -> Option<i64> {
    match encoding {
        Encoding::F32 => Some(1),
        Encoding::F16 => Some(2),
        Encoding::BF16 => Some(3),
        _ => None,
    }
}

/// Bits that a value of an embedding table takes on a device.
pub fn table_bits_per_weight(encoding: Encoding) -> f64 {
    match float_kind(encoding) {
        Some(_) => 8.0 * encoding.block_bytes() as f64,
        None => bits_per_weight(encoding),
    }
}

fn program(encoding: Encoding) -> Program {
    match float_kind(encoding) {
        Some(kind) => Program::new(Source::Embed, &[("FLOATS", kind)]),
        None => Program::new(Source::Embed, &[&Form::of(encoding).defines()[..], &[("FLOATS", 0)]].concat()),
    }
}

/// The programs of all encodings.
pub(in crate::cuda) fn table_programs() -> Vec<Program> {
    let mut programs = Encoding::ALL.map(program).to_vec();
    programs.sort_unstable();
    programs.dedup();
    programs
}

/// The rows of a matrix on the device, one after another, as they are.
fn upload_rows(device: &Device, source: &EncodedRows<'_>) -> Result<Buffer<u8>, CudaError> {
    let row_bytes = source.row(0).len();
    let mut buffer = device.alloc(source.n_rows() * row_bytes)?;
    let rows_at_once = (UPLOAD_BYTES / row_bytes.max(1)).max(1);
    let mut bytes = Vec::new();
    for first in (0..source.n_rows()).step_by(rows_at_once) {
        bytes.clear();
        (first..source.n_rows()).take(rows_at_once).for_each(|row| bytes.extend_from_slice(source.row(row)));
        device.upload(&mut buffer, first * row_bytes, &bytes)?;
    }
    Ok(buffer)
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::{
        AttentionRow, KvEncoding, RopeStyle, RopeTable,
        cuda::{CHOSEN, GpuHeads, KernelCache, MAX_CHOICES, StepRows},
    };

    #[test]
    fn a_chosen_token_is_that_of_the_step_before() {
        lockstep_cuda_emulator::load_into_this_process().unwrap();
        let device = Device::open(0, KernelCache::new(None)).unwrap();
        let rope = RopeTable::new(64, 64, 10_000.0, None, 100, RopeStyle::Adjacent).unwrap();
        let mut gpu = Gpu::new(device.clone(), GpuHeads { n_heads: 2, n_kv_heads: 1, head_dim: 64 }, &rope).unwrap();
        let kv = gpu.new_kv(1, 5, 16, KvEncoding::F16).unwrap();
        // Values that say which row they are of.
        let (n_rows, width) = (50, 32);
        let bytes: Vec<u8> = (0..n_rows * width).flat_map(|i| ((i / width) as f32).to_le_bytes()).collect();
        let table = gpu.load_table(&EncodedRows::new(Encoding::F32, &bytes, n_rows, width).unwrap()).unwrap();
        device.upload(&mut gpu.choices, 0, &[7, 49, 0, 50]).unwrap();
        device.upload(&mut gpu.choices, MAX_CHOICES - 1, &[11]).unwrap();
        let chosen = [CHOSEN | 1, 3, CHOSEN | 3, CHOSEN, CHOSEN | (MAX_CHOICES as u32 - 1)];
        let rows: Vec<_> = (0..5).map(|table| AttentionRow { position: 0, table }).collect();
        let (slots, tables) = ([0, 16, 32, 48, 64], [0, 1, 2, 3, 4].map(|block| vec![block]));
        let step = StepRows {
            tokens: &chosen,
            slots: &slots,
            rows: &rows,
            result_rows: &[],
            result_attention: &[],
            choices: &[],
            tables: &tables,
        };
        let step = gpu.begin(&step, &kv, None).unwrap();
        let mut found = Vec::new();
        gpu.download(&gpu.embed(&table, &step).unwrap(), &mut found).unwrap();
        // The fourth choice is one more than the table has, so it is the last row.
        let expected = [49.0, 3.0, 49.0, 7.0, 11.0].map(|row| [row; 32]);
        assert_eq!(found, expected.as_flattened());
    }
}
