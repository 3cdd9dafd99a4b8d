//! A step as the device sees it: where its rows go in the cache, and its queries cut into tiles (`cuda/attention.cu`).

use bytemuck::{Pod, Zeroable};

use super::ChoiceRule;
use crate::AttentionRow;

/// Queries of a tile: the rows of a tensor-core operand.
pub(super) const QUERIES: usize = 16;
/// Positions of a split.
pub(super) const SPLIT: usize = 256;
/// Rows of one sequence from which on a tile goes through its keys alone: then there are tiles enough to fill a device.
const ROWS_OF_A_PROMPT: usize = 32;

/// Marks a token that the step before has chosen: `CHOSEN | r` is the one for its logits row `r`, wherever that is by now.
pub const CHOSEN: u32 = 1 << 31;

/// The rows of a step, before they are on the device.
#[derive(Clone, Copy, Debug)]
pub struct StepRows<'a> {
    /// Each row's token: an id of the table's, or [`CHOSEN`] and a logits row of the step before.
    pub tokens: &'a [u32],
    /// Where each row's key and value go.
    pub slots: &'a [u32],
    /// What each row attends to. Rows of one sequence are neighbours, with ascending positions.
    pub rows: &'a [AttentionRow],
    /// Rows that give a result: those that give logits, then those that give hidden states.
    pub result_rows: &'a [u32],
    /// What each of those attends to.
    pub result_attention: &'a [AttentionRow],
    /// How the token of each row of logits is chosen; empty if no token is.
    pub choices: &'a [ChoiceRule],
    /// Block tables, one for each sequence.
    pub tables: &'a [Vec<u32>],
}

/// Which rows of a step attend.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum RowChoice {
    /// All of them.
    All,
    /// Those that give a result.
    Results,
}

/// Neighbouring rows of one sequence, with the heads that share a KV head.
#[repr(C)]
#[derive(Clone, Copy, Debug, PartialEq, Eq, Pod, Zeroable)]
pub(super) struct QueryTile {
    pub(super) first_row: u32,
    pub(super) n_rows: u32,
    pub(super) table: u32,
    pub(super) last_position: u32,
    pub(super) n_splits: u32,
    /// Queries times splits of all tiles before, over all KV heads.
    pub(super) first_part: u32,
}

/// How heads are dealt out to query tiles.
#[derive(Clone, Copy, Debug)]
pub(super) struct Heads {
    pub(super) n_kv_heads: usize,
    pub(super) group_size: usize,
}

/// Queries cut into tiles.
#[derive(Clone, Debug, Default, PartialEq, Eq)]
pub(super) struct QueryTiles {
    /// Those whose splits go to blocks of their own, then those that go through their splits one by one.
    pub(super) tiles: Vec<QueryTile>,
    /// How many of `tiles` are of the first kind.
    pub(super) n_split: usize,
    pub(super) tile_of_row: Vec<u32>,
    /// Queries times splits, all in all.
    pub(super) n_parts: usize,
    /// Splits of the tile of the first kind that has most.
    pub(super) max_splits: usize,
}

/// The shape of a step that can be recorded: all that its launches depend on. A step takes the smallest shape that it fits
/// into, and is filled up with rows that nobody asked for.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct StepShape {
    n_rows: usize,
    n_splits: usize,
    chooses: bool,
}

/// A step as the device reads it: its words, and where in them things are.
#[derive(Clone, Debug)]
pub(super) struct StepData {
    pub(super) words: Vec<u32>,
    pub(super) layout: Layout,
}

/// Where the things of a step are.
#[derive(Clone, Debug)]
pub(super) struct Layout {
    pub(super) n_rows: usize,
    pub(super) tokens: Part,
    pub(super) slots: Part,
    pub(super) result_rows: Part,
    pub(super) choices: Part,
    /// Rows whose token is chosen: all that give logits, or none.
    pub(super) n_choices: usize,
    pub(super) tables: Part,
    pub(super) table_stride: usize,
    all: Queries,
    results: Queries,
}

/// Where the queries of a step are, and what launches need to know of them.
#[derive(Clone, Copy, Debug)]
pub(super) struct Queries {
    pub(super) n_rows: usize,
    pub(super) n_tiles: usize,
    /// As [`QueryTiles`] has them.
    pub(super) n_split: usize,
    pub(super) n_parts: usize,
    pub(super) max_splits: usize,
    pub(super) positions: Part,
    pub(super) tiles: Part,
    pub(super) tile_of_row: Part,
}

/// A part of a step's words: the first of them.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(super) struct Part(usize);

/// The blocks of a cache.
#[derive(Clone, Copy, Debug)]
pub(super) struct Blocks {
    pub(super) n_blocks: usize,
    pub(super) block_size: usize,
}

// === impl Heads ===

impl Heads {
    /// Heads of a row in one tile.
    fn per_tile(self) -> usize {
        self.group_size.min(QUERIES)
    }

    /// Tiles that the heads of one KV head make.
    pub(super) fn n_parts(self) -> usize {
        self.group_size.div_ceil(QUERIES)
    }

    fn rows_per_tile(self) -> usize {
        QUERIES / self.per_tile()
    }

    /// Queries that a row makes, over all tiles.
    fn queries_of_a_row(self) -> usize {
        self.n_kv_heads * self.n_parts() * self.per_tile()
    }
}

// === impl StepShape ===

impl StepShape {
    /// Rows of the shapes there are. More would waste less and take longer to record.
    const ROWS: [usize; 13] = [1, 2, 4, 8, 16, 24, 32, 48, 64, 96, 128, 192, 256];

    /// Rows of a step of this shape.
    pub fn n_rows(self) -> usize {
        self.n_rows
    }

    /// The shape for a step; `None` for one with a prompt, which is not recorded, since hardly another is like it.
    pub fn of(step: &StepRows<'_>) -> Option<Self> {
        let is_prompt = |run: &[AttentionRow]| run.len() >= ROWS_OF_A_PROMPT;
        if !Self::all_count(step) || step.rows.chunk_by(same_table).any(is_prompt) {
            return None;
        }
        let n_rows = Self::ROWS.into_iter().find(|n_rows| *n_rows >= step.rows.len())?;
        let last_position = step.rows.iter().map(|row| row.position as usize).max()?;
        let n_splits = (last_position / SPLIT + 1).next_power_of_two();
        Some(Self { n_rows, n_splits, chooses: !step.choices.is_empty() })
    }

    /// Whether every row gives a result, of one kind, and every table has a row.
    fn all_count(step: &StepRows<'_>) -> bool {
        let n_rows = step.rows.len();
        let is_of_one_kind = step.choices.is_empty() || step.choices.len() == n_rows;
        step.result_rows.len() == n_rows && is_of_one_kind && step.tables.len() <= n_rows
    }

    /// Whether the step's rows and tables fit; its queries are another matter ([`QueryTiles::filled_up`]).
    fn has_room_for(self, step: &StepRows<'_>) -> bool {
        Self::all_count(step) && step.rows.len() <= self.n_rows && self.chooses != step.choices.is_empty()
    }
}

fn same_table(a: &AttentionRow, b: &AttentionRow) -> bool {
    a.table == b.table
}

// === impl QueryTiles ===

impl QueryTiles {
    pub(super) fn new(rows: &[AttentionRow], heads: Heads) -> Self {
        let mut cut = Self { tile_of_row: vec![0; rows.len()], ..Self::default() };
        let mut first_row = 0;
        let mut prompts = Vec::new();
        for run in rows.chunk_by(same_table) {
            let is_prompt = run.len() >= ROWS_OF_A_PROMPT;
            for (i, rows) in run.chunks(heads.rows_per_tile()).enumerate() {
                let last_position = rows.iter().map(|row| row.position).max().unwrap_or_default();
                let tile = QueryTile {
                    first_row: (first_row + i * heads.rows_per_tile()) as u32,
                    n_rows: rows.len() as u32,
                    table: rows[0].table as u32,
                    last_position,
                    n_splits: if is_prompt { 1 } else { last_position / SPLIT as u32 + 1 },
                    first_part: 0,
                };
                if is_prompt { prompts.push(tile) } else { cut.tiles.push(tile) }
            }
            first_row += run.len();
        }
        cut.n_split = cut.tiles.len();
        cut.max_splits = cut.tiles.iter().map(|tile| tile.n_splits as usize).max().unwrap_or_default();
        cut.tiles.append(&mut prompts);
        for (tile_idx, tile) in cut.tiles.iter_mut().enumerate() {
            tile.first_part = cut.n_parts as u32;
            let (n_rows, n_splits) = (tile.n_rows as usize, tile.n_splits as usize);
            cut.n_parts += heads.queries_of_a_row() * n_splits * n_rows;
            cut.tile_of_row[tile.first_row as usize..][..n_rows].fill(tile_idx as u32);
        }
        cut
    }

    /// Fills up with tiles of no splits, so that launches are those of any step of this shape; `None` if it has another.
    fn filled_up(mut self, shape: StepShape, heads: Heads) -> Option<Self> {
        let has_prompts = self.n_split < self.tiles.len();
        if has_prompts || self.tile_of_row.len() > shape.n_rows || self.max_splits > shape.n_splits {
            return None;
        }
        let nothing = QueryTile {
            first_row: 0,
            n_rows: 0,
            table: 0,
            last_position: 0,
            n_splits: 0,
            first_part: self.n_parts as u32,
        };
        self.tiles.resize(shape.n_rows, nothing);
        // If there are rows to fill up, there are such tiles.
        self.tile_of_row.resize(shape.n_rows, shape.n_rows as u32 - 1);
        self.n_split = shape.n_rows;
        self.n_parts = heads.queries_of_a_row() * shape.n_splits * shape.n_rows;
        self.max_splits = shape.n_splits;
        Some(self)
    }
}

// === impl StepData ===

impl StepData {
    /// Lays a step out; with a shape as one of that shape, or not at all if it has another. Rows that fill it up have token
    /// 0, write to the block after the last, and choose what is likeliest. `words` is a vector to use again.
    pub(super) fn new(
        mut words: Vec<u32>,
        step: &StepRows<'_>,
        heads: Heads,
        blocks: Blocks,
        shape: Option<StepShape>,
    ) -> Option<Self> {
        if shape.is_some_and(|shape| !shape.has_room_for(step)) {
            return None;
        }
        words.clear();
        let longest = step.tables.iter().map(Vec::len).max().unwrap_or_default().max(1);
        let table_stride = shape.map_or(longest, |shape| (shape.n_splits * SPLIT).div_ceil(blocks.block_size));
        let n_rows = shape.map_or(step.slots.len(), |shape| shape.n_rows);
        let tokens = append(&mut words, step.tokens, n_rows, 0);
        let spare_slot = (blocks.n_blocks * blocks.block_size) as u32;
        let slots = append(&mut words, step.slots, n_rows, spare_slot);
        let n_results = shape.map_or(step.result_rows.len(), |_| 0);
        let result_rows = append(&mut words, &step.result_rows[..n_results], n_results, 0);
        let n_choices = shape.map_or(step.choices.len(), |shape| if shape.chooses { shape.n_rows } else { 0 });
        let rule_words = size_of::<ChoiceRule>() / size_of::<u32>();
        let choices = append(&mut words, bytemuck::cast_slice(step.choices), n_choices * rule_words, 0);
        let tables = Part(words.len());
        for table in step.tables {
            // A table may reach past the positions of its rows.
            append(&mut words, &table[..table.len().min(table_stride)], table_stride, 0);
        }
        words.resize(tables.0 + table_stride * shape.map_or(step.tables.len(), |shape| shape.n_rows), 0);
        let all = Queries::append(&mut words, step.rows, heads, shape)?;
        let results = Queries::append(&mut words, &step.result_attention[..n_results], heads, None)?;
        Some(Self {
            words,
            layout: Layout {
                n_rows,
                tokens,
                slots,
                result_rows,
                choices,
                n_choices,
                tables,
                table_stride,
                all,
                results,
            },
        })
    }
}

// === impl Layout ===

impl Layout {
    pub(super) fn queries(&self, choice: RowChoice) -> &Queries {
        match choice {
            RowChoice::All => &self.all,
            RowChoice::Results => &self.results,
        }
    }
}

impl Part {
    /// Its bytes from the first word of the step on.
    pub(super) fn offset(self) -> u64 {
        (self.0 * size_of::<u32>()) as u64
    }
}

impl Queries {
    /// `None` if the rows do not have the shape.
    fn append(words: &mut Vec<u32>, rows: &[AttentionRow], heads: Heads, shape: Option<StepShape>) -> Option<Self> {
        let mut queries = QueryTiles::new(rows, heads);
        if let Some(shape) = shape {
            queries = queries.filled_up(shape, heads)?;
        }
        let n_rows = queries.tile_of_row.len();
        let positions = Part(words.len());
        words.extend(rows.iter().map(|row| row.position));
        words.resize(positions.0 + n_rows, 0);
        let tiles: &[u32] = bytemuck::cast_slice(&queries.tiles);
        Some(Self {
            n_rows,
            n_tiles: queries.tiles.len(),
            n_split: queries.n_split,
            n_parts: queries.n_parts,
            max_splits: queries.max_splits,
            positions,
            tiles: append(words, tiles, tiles.len(), 0),
            tile_of_row: append(words, &queries.tile_of_row, n_rows, 0),
        })
    }
}

/// Appends values, and others up to `len`.
fn append(words: &mut Vec<u32>, values: &[u32], len: usize, filling: u32) -> Part {
    let part = Part(words.len());
    words.extend(values);
    words.resize(part.0 + len, filling);
    part
}

#[cfg(test)]
mod tests {
    use super::*;

    fn rows(table: usize, positions: std::ops::Range<u32>) -> impl Iterator<Item = AttentionRow> {
        positions.map(move |position| AttentionRow { position, table })
    }

    #[test]
    fn every_row_is_in_one_tile_of_its_sequence() {
        for (n_kv_heads, group_size) in [(8, 4), (3, 3), (1, 1), (2, 24), (1, 16)] {
            let heads = Heads { n_kv_heads, group_size };
            let all: Vec<_> =
                rows(0, 700..701).chain(rows(1, 0..100)).chain(rows(2, 5..12)).chain(rows(3, 0..1)).collect();
            let cut = QueryTiles::new(&all, heads);
            let mut seen = vec![0; all.len()];
            let mut part = 0;
            for (i, tile) in cut.tiles.iter().enumerate() {
                let of_tile = tile.first_row as usize..(tile.first_row + tile.n_rows) as usize;
                assert!(tile.n_rows as usize * group_size.min(QUERIES) <= QUERIES);
                for row in of_tile {
                    seen[row] += 1;
                    assert_eq!(all[row].table as u32, tile.table);
                    assert!(all[row].position <= tile.last_position);
                    assert_eq!(cut.tile_of_row[row], i as u32);
                }
                assert_eq!(tile.first_part, part);
                let parts = n_kv_heads * heads.n_parts() * tile.n_splits as usize;
                part += (parts * tile.n_rows as usize * group_size.min(QUERIES)) as u32;
                assert_eq!(tile.table == 1, i >= cut.n_split, "only the prompt goes through its keys alone");
            }
            assert!(seen.iter().all(|n| *n == 1));
            assert_eq!((cut.n_parts, cut.max_splits), (part as usize, 3));
        }
    }

    #[test]
    fn steps_of_one_shape_differ_in_nothing_but_words() {
        let (heads, blocks) = (Heads { n_kv_heads: 2, group_size: 4 }, Blocks { n_blocks: 100, block_size: 16 });
        let rule = ChoiceRule { temperature: 1.0, top_k: 2, top_p: 3.0, min_p: 4.0, uniform: [5, 6] };
        let choosing = |all: &[AttentionRow], n_choices: usize| {
            let n_tables = all.iter().map(|row| row.table).max().unwrap() + 1;
            let tables: Vec<Vec<u32>> = (0..n_tables).map(|table| vec![table as u32; 40]).collect();
            let (slots, result_rows) = (vec![7; all.len()], (0..all.len() as u32).collect::<Vec<_>>());
            let step = StepRows {
                tokens: &vec![9; all.len()],
                slots: &slots,
                rows: all,
                result_rows: &result_rows,
                result_attention: all,
                choices: &vec![rule; n_choices],
                tables: &tables,
            };
            let shape = StepShape::of(&step).expect("no prompt");
            (shape, StepData::new(Vec::new(), &step, heads, blocks, Some(shape)).expect("of its shape"))
        };
        let data = |all: &[AttentionRow]| choosing(all, all.len());
        let (shape, a) = data(&rows(0, 300..301).chain(rows(1, 5..6)).chain(rows(2, 0..1)).collect::<Vec<_>>());
        // Three rows of one sequence, as speculation has them, and one of another.
        let (same, b) = data(&rows(0, 400..403).chain(rows(1, 500..501)).collect::<Vec<_>>());
        assert_eq!(shape, StepShape { n_rows: 4, n_splits: 2, chooses: true });
        assert_eq!(shape, same);
        assert_eq!(format!("{:?}", a.layout), format!("{:?}", b.layout));
        assert_eq!(a.words.len(), b.words.len());
        // The row that fills up has a token that is there, and writes past the last block.
        assert_eq!(a.words[a.layout.tokens.0..][..4], [9, 9, 9, 0]);
        assert_eq!(a.words[a.layout.slots.0..][..4], [7, 7, 7, 1600]);
        // ... and takes the likeliest token.
        let (rules, greedy) = a.words[a.layout.choices.0..][..24].split_at(18);
        assert_eq!(bytemuck::cast_slice::<u32, ChoiceRule>(rules), [rule; 3]);
        assert_eq!(bytemuck::cast_slice::<u32, ChoiceRule>(greedy), [ChoiceRule::default()]);
        let (unlike, c) = choosing(&rows(0, 300..303).collect::<Vec<_>>(), 0);
        assert_eq!(unlike, StepShape { chooses: false, ..shape });
        assert_eq!(c.words.len(), a.words.len() - 24, "no rules");
        let queries = a.layout.queries(RowChoice::All);
        let splits =
            |data: &StepData| -> Vec<u32> { (0..4).map(|tile| data.words[queries.tiles.0 + 6 * tile + 4]).collect() };
        assert_eq!((splits(&a), splits(&b)), (vec![2, 1, 1, 0], vec![2, 2, 0, 0]));
        let prompt: Vec<_> = rows(0, 0..40).collect();
        let result_rows: Vec<u32> = (0..40).collect();
        let step = StepRows {
            tokens: &result_rows,
            slots: &result_rows,
            rows: &prompt,
            result_rows: &result_rows,
            result_attention: &prompt,
            choices: &[],
            tables: &[],
        };
        assert_eq!(StepShape::of(&step), None);
    }

    #[test]
    fn a_step_of_another_shape_is_not_laid_out() {
        let (heads, blocks) = (Heads { n_kv_heads: 2, group_size: 4 }, Blocks { n_blocks: 100, block_size: 16 });
        let numbers: Vec<u32> = (0..40).collect();
        let fits = |rows: &[AttentionRow], n_results: usize, n_tables: usize, n_rows, n_splits| {
            let step = StepRows {
                tokens: &numbers[..rows.len()],
                slots: &numbers[..rows.len()],
                rows,
                result_rows: &numbers[..n_results],
                result_attention: &rows[..n_results],
                choices: &[],
                tables: &vec![numbers.clone(); n_tables],
            };
            StepData::new(Vec::new(), &step, heads, blocks, Some(StepShape { n_rows, n_splits, chooses: false }))
                .is_some()
        };
        let few: Vec<_> = rows(0, 250..258).collect();
        assert!(fits(&few, 8, 1, 8, 2) && fits(&few, 8, 8, 16, 4));
        assert!(!fits(&few, 8, 1, 4, 2), "too many rows");
        assert!(!fits(&few, 8, 1, 8, 1), "too many splits");
        assert!(!fits(&few, 7, 1, 8, 2), "a row without a result");
        assert!(!fits(&few, 8, 9, 8, 2), "a table without rows");
        let prompt: Vec<_> = rows(0, 0..40).collect();
        assert!(!fits(&prompt, 40, 1, 48, 1), "a prompt, which goes through its keys alone");
    }
}
