//! Plain loops, compiled for the widest registers that the processor has.

/// The arguments of a function, to be applied to it.
pub trait Arguments<F> {
    /// What the function gives.
    type Output;

    /// Calls `f` with these arguments.
    fn apply(self, f: F) -> Self::Output;
}

macro_rules! arguments {
    ($($name:ident)+) => {
        impl<Function: FnOnce($($name),+) -> Out, Out, $($name),+> Arguments<Function> for ($($name,)+) {
            type Output = Out;

            #[inline(always)]
            fn apply(self, f: Function) -> Out {
                #[expect(non_snake_case, reason = "the names of the types")]
                let ($($name,)+) = self;
                f($($name),+)
            }
        }
    };
}

arguments!(A);
arguments!(A B);
arguments!(A B C);
arguments!(A B C D);
arguments!(A B C D E);
arguments!(A B C D E G);

/// Calls `f` with `arguments`, compiled for AVX-512 or AVX2 where the processor has them. The result does not depend
/// on which: the compiler neither reorders sums nor fuses products with them. On AArch64 the plain version has all
/// vectors there are, NEON's.
///
/// `f` must be a function marked `#[inline(always)]`; of others, and of closures, the plain version is called.
#[inline(always)]
pub fn wide<F, A: Arguments<F>>(f: F, arguments: A) -> A::Output {
    #[cfg(target_arch = "x86_64")]
    {
        if is_x86_feature_detected!("avx512f")
            && is_x86_feature_detected!("avx512dq")
            && is_x86_feature_detected!("avx512bw")
            && is_x86_feature_detected!("avx512vl")
        {
            // SAFETY: the processor has these instructions.
            return unsafe { with_avx512(f, arguments) };
        }
        if is_x86_feature_detected!("avx2") {
            // SAFETY: the processor has these instructions.
            return unsafe { with_avx2(f, arguments) };
        }
    }
    arguments.apply(f)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx512f,avx512dq,avx512bw,avx512vl")]
fn with_avx512<F, A: Arguments<F>>(f: F, arguments: A) -> A::Output {
    arguments.apply(f)
}

#[cfg(target_arch = "x86_64")]
#[target_feature(enable = "avx2")]
fn with_avx2<F, A: Arguments<F>>(f: F, arguments: A) -> A::Output {
    arguments.apply(f)
}
