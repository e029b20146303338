//! Which vector instructions the kernels use.

use std::sync::OnceLock;

/// A set of instructions that a family of kernels is written for, from plain to wide.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
#[non_exhaustive]
pub enum Isa {
    /// What every processor has.
    Scalar,
    /// x86-64 with AVX2 and FMA.
    Avx2,
    /// x86-64 with AVX-512 F, BW, VL and VNNI.
    Avx512Vnni,
    /// AArch64, all of which has vectors of 128 bits.
    Neon,
    /// AArch64 with dot products of bytes.
    NeonDot,
}

impl Isa {
    /// The name that `OLIVE_ISA` takes.
    pub const fn name(self) -> &'static str {
        match self {
            Self::Scalar => "scalar",
            Self::Avx2 => "avx2",
            Self::Avx512Vnni => "avx512vnni",
            Self::Neon => "neon",
            Self::NeonDot => "neondot",
        }
    }

    /// Every set that this processor has, plainest first.
    pub fn available() -> Vec<Self> {
        [
            Self::Scalar,
            Self::Avx2,
            Self::Avx512Vnni,
            Self::Neon,
            Self::NeonDot,
        ]
        .into_iter()
        .filter(|isa| isa.is_available())
        .collect()
    }

    /// Whether this processor has it.
    pub fn is_available(self) -> bool {
        #[cfg(target_arch = "x86_64")]
        let found = match self {
            Self::Scalar => true,
            Self::Avx2 => is_x86_feature_detected!("avx2") && is_x86_feature_detected!("fma"),
            Self::Avx512Vnni => {
                is_x86_feature_detected!("avx512f")
                    && is_x86_feature_detected!("avx512bw")
                    && is_x86_feature_detected!("avx512vl")
                    && is_x86_feature_detected!("avx512vnni")
                    && Self::Avx2.is_available()
            }
            Self::Neon | Self::NeonDot => false,
        };
        #[cfg(target_arch = "aarch64")]
        let found = match self {
            Self::Scalar | Self::Neon => true,
            Self::NeonDot => std::arch::is_aarch64_feature_detected!("dotprod"),
            Self::Avx2 | Self::Avx512Vnni => false,
        };
        #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
        let found = self == Self::Scalar;
        found
    }
}

/// The set in use: the widest that the processor has, or the one that the environment variable `OLIVE_ISA` names
/// (`scalar`, `avx2`, `avx512vnni`, `neon`, `neondot`) if the processor has it. Read once.
pub fn isa() -> Isa {
    static CHOSEN: OnceLock<Isa> = OnceLock::new();
    *CHOSEN.get_or_init(|| {
        let available = Isa::available();
        let widest = available.last().copied().unwrap_or(Isa::Scalar);
        let Ok(wanted) = std::env::var("OLIVE_ISA") else {
            return widest;
        };
        match available.iter().find(|isa| isa.name() == wanted) {
            Some(isa) => *isa,
            None => {
                tracing::warn!(
                    "OLIVE_ISA={wanted} is not available here, using {}",
                    widest.name()
                );
                widest
            }
        }
    })
}

/// Compiles a plain function once for every instruction set and calls the version for the given [`Isa`].
macro_rules! multiversion {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($isa:ident; $($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)? = $plain:path) => {
        $crate::kernels::isa::multiversion! {
            @ $(#[$meta])* $vis fn $name($isa; $($arg: $ty),*) $(-> $ret)? = $plain, $plain
        }
    };
    (@ $(#[$meta:meta])* $vis:vis fn $name:ident($isa:ident; $($arg:ident: $ty:ty),*) $(-> $ret:ty)?
        = $plain:path, $wide:path) => {
        $(#[$meta])*
        $vis fn $name($isa: $crate::kernels::Isa, $($arg: $ty),*) $(-> $ret)? {
            #[cfg(target_arch = "x86_64")]
            {
                #[target_feature(enable = "avx2,fma")]
                fn avx2($($arg: $ty),*) $(-> $ret)? {
                    $wide($($arg),*)
                }
                #[target_feature(enable = "avx2,fma,avx512f,avx512bw,avx512vl")]
                fn avx512($($arg: $ty),*) $(-> $ret)? {
                    $wide($($arg),*)
                }
                match $isa {
                    // SAFETY: an `Isa` other than `Scalar` is only passed on where `Isa::is_available` said so.
                    $crate::kernels::Isa::Avx2 => unsafe { avx2($($arg),*) },
                    // SAFETY: as above.
                    $crate::kernels::Isa::Avx512Vnni => unsafe { avx512($($arg),*) },
                    _ => $plain($($arg),*),
                }
            }
            // NEON is what the compiler takes for granted there.
            #[cfg(target_arch = "aarch64")]
            match $isa {
                $crate::kernels::Isa::Scalar => $plain($($arg),*),
                _ => $wide($($arg),*),
            }
            #[cfg(not(any(target_arch = "x86_64", target_arch = "aarch64")))]
            {
                let _ = $isa;
                $plain($($arg),*)
            }
        }
    };
}
pub(crate) use multiversion;

/// [`multiversion!`] for functions whose last constant says whether products and sums may be fused.
macro_rules! multiversion_fused {
    ($(#[$meta:meta])* $vis:vis fn $name:ident($isa:ident; $($arg:ident: $ty:ty),* $(,)?) $(-> $ret:ty)?
        = $plain:ident::<$($constant:literal),*>) => {
        $crate::kernels::isa::multiversion! {
            @ $(#[$meta])* $vis fn $name($isa; $($arg: $ty),*) $(-> $ret)?
                = $plain::<$($constant,)* false>, $plain::<$($constant,)* true>
        }
    };
}
pub(crate) use multiversion_fused;
