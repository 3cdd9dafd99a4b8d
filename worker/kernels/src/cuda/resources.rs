//! Resources: what an entry point takes of a multiprocessor, as the assembler reports it.

/// What one entry point takes.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Resources {
    /// Registers of a thread, of at most 255.
    pub registers: u32,
    /// Bytes of static shared memory of a block.
    pub shared_bytes: u32,
    /// Bytes of local memory of a thread: arrays that are indexed at run time, and spilled registers.
    pub stack_bytes: u32,
    /// Bytes that a thread stores to local memory, and loads again, since registers do not suffice.
    pub spill_bytes: u32,
}

impl Resources {
    /// Finds what `entry` takes in the log of a compilation; `None` if the log says nothing of it.
    ///
    /// The assembler (of NVRTC 12 and 13) writes, for each entry point in any order:
    ///
    /// ```text
    /// ptxas info    : Compiling entry function 'axpy' for 'sm_80'
    /// ptxas info    : Function properties for axpy
    /// ptxas         .     256 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
    /// ptxas info    : Used 32 registers, used 1 barriers, 1024 bytes smem, 368 bytes cmem[0]
    /// ```
    pub fn of(entry: &str, log: &str) -> Option<Self> {
        let begin = format!("Compiling entry function '{entry}' ");
        let mut lines = log.lines().skip_while(|line| !line.contains(&begin));
        lines.next()?;
        let mut found = None;
        let mut resources = Self::default();
        // Functions that it calls have a line of properties each.
        for line in lines.take_while(|line| !line.contains("Compiling entry function")) {
            let bytes = |name: &str| number_before(line, name).unwrap_or(0);
            resources.stack_bytes = resources.stack_bytes.max(bytes(" bytes stack frame"));
            resources.spill_bytes += bytes(" bytes spill stores") + bytes(" bytes spill loads");
            resources.stack_bytes = resources.stack_bytes.max(bytes(" bytes cumulative stack size"));
            if let Some(registers) = number_before(line, " registers") {
                found = Some(registers);
                resources.shared_bytes = bytes(" bytes smem");
            }
        }
        found.map(|registers| Self { registers, ..resources })
    }

    /// Whether registers and shared memory suffice.
    pub fn stays_in_registers(&self) -> bool {
        self.stack_bytes == 0 && self.spill_bytes == 0
    }
}

/// The number that stands right before `name`.
fn number_before(line: &str, name: &str) -> Option<u32> {
    let (before, _) = line.split_once(name)?;
    let digits = before.rsplit(|c: char| !c.is_ascii_digit()).next()?;
    digits.parse().ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    /// NVRTC 13.0's, of a kernel with an array that is indexed at run time, and one with shared memory; the spills are
    /// made up.
    const LOG: &str = "probe.cu(3): warning #177-D: variable was declared but never referenced
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'local' for 'sm_80'
ptxas info    : Function properties for local
ptxas         .     256 bytes stack frame, 8 bytes spill stores, 16 bytes spill loads
ptxas info    : Used 32 registers, used 0 barriers, 256 bytes cumulative stack size, 368 bytes cmem[0]
ptxas info    : Compile time = 14.416 ms
ptxas info    : Compiling entry function 'add' for 'sm_80'
ptxas info    : Function properties for add
ptxas         .     0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 1 barriers, 1024 bytes smem, 364 bytes cmem[0]
ptxas info    : Compile time = 1.712 ms";

    #[test]
    fn each_entry_point_has_its_own() {
        let add = Resources::of("add", LOG).unwrap();
        assert_eq!(add, Resources { registers: 10, shared_bytes: 1024, stack_bytes: 0, spill_bytes: 0 });
        assert!(add.stays_in_registers());
        let local = Resources::of("local", LOG).unwrap();
        assert_eq!(local, Resources { registers: 32, shared_bytes: 0, stack_bytes: 256, spill_bytes: 24 });
        assert!(!local.stays_in_registers());
    }

    #[test]
    fn what_the_log_does_not_say_is_not_made_up() {
        assert_eq!(Resources::of("ad", LOG), None);
        assert_eq!(Resources::of("add", ""), None);
        assert_eq!(Resources::of("add", LOG.split_once("Used 10").unwrap().0), None);
    }
}
