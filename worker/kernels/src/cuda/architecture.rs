//! Architectures: the instruction sets of NVIDIA's GPUs.

use std::{fmt, str::FromStr};

use super::CudaError;

/// Kernels use bf16 matrix multiplication and asynchronous copies, which came with 8.0.
const MIN_NUMBER: u32 = 80;

/// An instruction set that kernels are compiled for, such as `sm_80` or `sm_90a`.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Architecture {
    /// Ten times the major compute capability and the minor one.
    number: u32,
    /// Whether instructions that only this architecture has may be used: the `a` at its end.
    specific: bool,
}

impl Architecture {
    /// The one to compile for on a device of this compute capability, if kernels run on it at all. Hopper's own
    /// instructions are used on Hopper.
    pub(super) fn of_device(major: u32, minor: u32) -> Option<Self> {
        let number = major.checked_mul(10)?.checked_add(minor)?;
        (number >= MIN_NUMBER).then_some(Self { number, specific: number == 90 })
    }
}

impl fmt::Display for Architecture {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "sm_{}{}", self.number, if self.specific { "a" } else { "" })
    }
}

impl FromStr for Architecture {
    type Err = CudaError;

    fn from_str(text: &str) -> Result<Self, CudaError> {
        let parse = || {
            let name = text.strip_prefix("sm_")?;
            let digits = name.strip_suffix('a').unwrap_or(name);
            // `parse` alone would take a sign.
            let plain = digits.bytes().all(|byte| byte.is_ascii_digit());
            let number: u32 = digits.parse().ok().filter(|number| plain && (MIN_NUMBER..1000).contains(number))?;
            Some(Self { number, specific: name.len() > digits.len() })
        };
        parse().ok_or_else(|| CudaError::Architecture { text: text.into() })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_name_is_read_as_it_is_written() {
        for name in ["sm_80", "sm_89", "sm_90", "sm_90a", "sm_100"] {
            assert_eq!(name.parse::<Architecture>().unwrap().to_string(), name);
        }
        for name in ["", "sm_", "80", "sm_75", "sm_90b", "sm_90aa", "sm_+90", "sm_1000", "compute_80"] {
            assert!(name.parse::<Architecture>().is_err(), "{name}");
        }
    }

    #[test]
    fn a_hopper_device_gets_its_own_instructions() {
        let name = |major, minor| Architecture::of_device(major, minor).map(|found| found.to_string());
        assert_eq!(name(9, 0).as_deref(), Some("sm_90a"));
        assert_eq!(name(8, 9).as_deref(), Some("sm_89"));
        assert_eq!(name(10, 0).as_deref(), Some("sm_100"));
        assert_eq!(name(7, 5), None);
    }
}
