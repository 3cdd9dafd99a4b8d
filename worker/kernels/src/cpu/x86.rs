//! x86-64 instruction sets.

mod amx;
mod avx2;
mod avx512;

pub(crate) use amx::Tiles;
pub(crate) use avx2::Avx2;
pub(crate) use avx512::Avx512;
