//! AMX, emulated: on a processor without tiles, each instruction on them raises SIGILL, and a handler executes it.
//!
//! The handler knows the instructions of `src/cpu/x86/amx.rs` and no others, and holds them to the manual: on a wrong
//! shape the process ends and says which instruction it was. What is no instruction on tiles ends it as ever. As befits a
//! handler, it does not allocate, lock or unwind.

mod instruction;
#[cfg(test)]
mod tests;
mod tile_unit;

use std::cell::RefCell;
use std::ffi::{c_int, c_void};
use std::fmt::{self, Write};
use std::ptr::with_exposed_provenance as at_address;
use std::sync::Once;

use lockstep_kernels::{Cpu, Isa};

use instruction::{Instruction, Registers};
use tile_unit::TileUnit;

/// Where the registers of general purpose are in a signal's context, in the order of their numbers in machine code.
const GENERAL: [c_int; 16] = [
    libc::REG_RAX,
    libc::REG_RCX,
    libc::REG_RDX,
    libc::REG_RBX,
    libc::REG_RSP,
    libc::REG_RBP,
    libc::REG_RSI,
    libc::REG_RDI,
    libc::REG_R8,
    libc::REG_R9,
    libc::REG_R10,
    libc::REG_R11,
    libc::REG_R12,
    libc::REG_R13,
    libc::REG_R14,
    libc::REG_R15,
];

thread_local! {
    // Constant and never dropped: a handler may use it, as there is nothing to set up.
    static TILES: RefCell<TileUnit> = const { RefCell::new(TileUnit::RELEASED) };
}

/// Threads with tiles, emulated ones; none if the processor lacks even AVX-512.
pub(crate) fn cpu(n_threads: usize) -> Option<Cpu> {
    ensure_tiles();
    // SAFETY: from here on the handler executes the instructions.
    unsafe { Cpu::with_emulated_tiles(n_threads) }.ok()
}

/// From here on the process may execute instructions on tiles, whatever the processor.
fn ensure_tiles() {
    static INSTALL: Once = Once::new();
    INSTALL.call_once(|| {
        if !Isa::Amx.is_supported() {
            set_handler(execute as *const () as usize);
        }
    });
}

/// Has SIGILL handled by a function, or as `SIG_DFL` says.
fn set_handler(handler: usize) {
    // SAFETY: a plain struct, of which 0 everywhere is a value.
    let mut action: libc::sigaction = unsafe { std::mem::zeroed() };
    action.sa_sigaction = handler;
    action.sa_flags = libc::SA_SIGINFO;
    // SAFETY: the action is there to be read, and `execute` is a handler of the kind that its flags say.
    let result = unsafe { libc::sigaction(libc::SIGILL, &raw const action, std::ptr::null_mut()) };
    assert_eq!(result, 0, "SIGILL can be handled");
}

/// The handler: executes the instruction that raised the signal, and has the thread go on behind it.
extern "C" fn execute(_signal: c_int, _info: *mut libc::siginfo_t, context: *mut c_void) {
    // SAFETY: the third argument of such a handler is the thread's context, for the handler alone.
    let context = unsafe { &mut *context.cast::<libc::ucontext_t>() };
    let registers = &mut context.uc_mcontext.gregs;
    let read = |register: c_int| registers[register as usize] as usize;
    let before = Registers { general: GENERAL.map(read), rip: read(libc::REG_RIP) };
    // SAFETY: the processor has read as many bytes as the instruction has, and no more of them are read here.
    let byte = |i: usize| unsafe { at_address::<u8>(before.rip).add(i).read() };
    let Some((instruction, len)) = Instruction::decode(byte, &before) else {
        // Raised anew, the signal ends the process.
        set_handler(libc::SIG_DFL);
        return;
    };
    // SAFETY: whoever wrote the instruction vouches for its memory.
    if let Err(refusal) = TILES.with_borrow_mut(|tiles| unsafe { tiles.execute(instruction) }) {
        // Should that fail, too, there is nobody to tell.
        let _ = writeln!(StandardError, "emulated AMX: {instruction}: {refusal}");
        // SAFETY: it may be called anywhere, and does not return.
        unsafe { libc::abort() };
    }
    registers[libc::REG_RIP as usize] += len as i64;
}

/// Standard error, without the lock and the capturing of tests.
struct StandardError;

impl Write for StandardError {
    fn write_str(&mut self, text: &str) -> fmt::Result {
        // SAFETY: the text is there to be read.
        let n_written = unsafe { libc::write(libc::STDERR_FILENO, text.as_ptr().cast(), text.len()) };
        if n_written < 0 { Err(fmt::Error) } else { Ok(()) }
    }
}
