use super::*;
use olive_onnx::ir::OnnxType;

struct Random(u64);

impl Random {
    fn next(&mut self) -> u32 {
        self.0 = self.0.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1);
        (self.0 >> 33) as u32
    }

    fn float(&mut self) -> f32 {
        self.next() as f32 / (1u32 << 30) as f32 - 1.0
    }
}

#[derive(Clone, Copy, Debug, PartialEq)]
enum Points {
    Absent,
    Packed,
    Floats,
}

fn random_weight(random: &mut Random, shape: NBitsShape, points: Points) -> NBitsWeight {
    let NBitsShape { n, k, bits, block } = shape;
    let blocks = k.div_ceil(block);
    let size = [n, blocks, block * bits / 8];
    let bytes: Vec<u8> = (0..size.iter().product()).map(|_| random.next() as u8).collect();
    let packed = ir::Tensor::inline("w", OnnxType::Uint8, size, bytes).unwrap();
    let kind = random.next() % 3;
    let scale = |_| match (kind, random.float() * 0.1) {
        (0, scale) => scale,
        (1, scale) => half::f16::from_f32(scale).to_f32(),
        (_, scale) => half::bf16::from_f32(scale).to_f32(),
    };
    let scales: Vec<f32> = (0..n * blocks).map(scale).collect();
    let zero_points = match points {
        Points::Absent => ZeroPoints::Constant(1 << (bits - 1)),
        Points::Packed => {
            let row = (blocks * bits).div_ceil(8);
            let bytes: Vec<u8> = (0..n * row).map(|_| random.next() as u8).collect();
            NBitsWeight::unpack_zero_points("z", &bytes, shape).unwrap()
        }
        Points::Floats => ZeroPoints::Floats((0..n * blocks).map(|_| random.float() * 8.0 + 8.0).collect()),
    };
    NBitsWeight::new(shape, packed, &scales, zero_points).unwrap()
}

/// The definition, in double precision, with activations rounded a block at a time if asked; and the sum of the
/// products' sizes, which rounding errors grow with.
fn reference(weight: &NBitsWeight, a: &[f32], quantize: bool) -> Vec<(f64, f64)> {
    let mut row = vec![0.0; weight.k];
    let mut out = Vec::new();
    for a in a.chunks_exact(weight.k) {
        let mut a: Vec<f64> = a.iter().map(|v| f64::from(*v)).collect();
        if quantize {
            for block in a.chunks_mut(weight.block) {
                let scale = block.iter().fold(0.0f64, |m, v| m.max(v.abs())) as f32 / 127.0;
                let inverse = if scale == 0.0 { 0.0 } else { 1.0 / scale };
                for v in block {
                    *v = f64::from((*v as f32 * inverse).round_ties_even()) * f64::from(scale);
                }
            }
        }
        for n in 0..weight.n {
            weight.dequantize_row(n, &mut row);
            let products = || a.iter().zip(&row).map(|(a, w)| a * f64::from(*w));
            out.push((products().sum(), products().map(f64::abs).sum()));
        }
    }
    out
}

#[test]
fn every_instruction_set_gives_the_definition_at_block_edges() {
    let mut random = Random(7);
    for bits in [4, 8] {
        for block in [16, 32, 64, 128, 256] {
            for k in [16, 32, 48, 100, 128, 160, 256, 272, 384, 520] {
                for (n, rows) in [(1, 1), (5, 1), (67, 2), (9, 5), (70, 9)] {
                    for points in [Points::Absent, Points::Packed, Points::Floats] {
                        let shape = NBitsShape { n, k, bits, block };
                        let weight = random_weight(&mut random, shape, points);
                        check(&mut random, &weight, rows, points);
                    }
                }
            }
        }
    }
}

fn check(random: &mut Random, weight: &NBitsWeight, rows: usize, points: Points) {
    let a: Vec<f32> = (0..rows * weight.k).map(|_| random.float()).collect();
    for quantize in [false, true] {
        let want = reference(weight, &a, quantize && points != Points::Floats);
        for isa in Isa::available() {
            let mut out = vec![f32::NAN; rows * weight.n];
            weight.matmul_with(isa, &a, quantize, &mut out);
            for (i, (found, (want, size))) in out.iter().zip(&want).enumerate() {
                assert!(
                    (f64::from(*found) - want).abs() <= 2e-6 * size + 1e-6,
                    "{isa:?} {} bits block {} k {} n {} rows {rows} {points:?} quantize {quantize} at {i}: {found} {want}",
                    weight.bits,
                    weight.block,
                    weight.k,
                    weight.n
                );
            }
        }
    }
}

#[test]
fn the_number_of_threads_does_not_change_a_bit() {
    let mut random = Random(3);
    let shape = NBitsShape {
        n: 515,
        k: 1024,
        bits: 4,
        block: 32,
    };
    let weight = random_weight(&mut random, shape, Points::Packed);
    let a: Vec<f32> = (0..3 * 1024).map(|_| random.float()).collect();
    let run = |threads| {
        let pool = super::super::pool::Pool::new(threads).unwrap();
        let mut out = vec![0.0; 3 * 515];
        pool.install(|| weight.matmul(&a, true, &mut out));
        out.iter().map(|v| v.to_bits()).collect::<Vec<_>>()
    };
    assert_eq!(run(1), run(3));
}

#[test]
fn sizes_that_do_not_fit_are_errors() {
    let tensor = |bytes: usize| ir::Tensor::inline("w", OnnxType::Uint8, [bytes], vec![0; bytes]).unwrap();
    let shape = NBitsShape {
        n: 2,
        k: 32,
        bits: 4,
        block: 32,
    };
    let make = |shape, bytes, scales| {
        NBitsWeight::new(shape, tensor(bytes), &vec![0.0; scales], ZeroPoints::Constant(8))
    };
    assert!(make(shape, 32, 2).is_ok());
    assert!(make(shape, 31, 2).is_err());
    assert!(make(shape, 32, 3).is_err());
    assert!(make(NBitsShape { bits: 3, ..shape }, 32, 2).is_err());
    assert!(make(NBitsShape { block: 24, ..shape }, 32, 2).is_err());
    assert!(make(NBitsShape { k: 0, ..shape }, 0, 0).is_err());
}

/// Prints the time of products with one and with many rows for every instruction set:
/// `cargo test --release -p olive-genai --lib -- --ignored --nocapture time_of_products`.
#[test]
#[ignore = "measures, checks nothing"]
fn time_of_products() {
    let mut random = Random(5);
    for (bits, n, k) in [(4, 1536, 512), (4, 1024, 3072), (8, 1536, 512)] {
        let shape = NBitsShape {
            n,
            k,
            bits,
            block: 32,
        };
        let weight = random_weight(&mut random, shape, Points::Packed);
        for rows in [1, 512] {
            let a: Vec<f32> = (0..rows * k).map(|_| random.float()).collect();
            let mut out = vec![0.0; rows * n];
            for (isa, quantize) in Isa::available().into_iter().flat_map(|i| [(i, true), (i, false)]) {
                let runs = if rows == 1 { 200 } else { 5 };
                let fastest = (0..runs)
                    .map(|_| {
                        let start = std::time::Instant::now();
                        weight.matmul_with(isa, &a, quantize, &mut out);
                        start.elapsed()
                    })
                    .min();
                eprintln!(
                    "{bits} bits [{n}, {k}] · {rows} rows, {} {}: {fastest:?}",
                    isa.name(),
                    if quantize { "integers" } else { "floats" }
                );
            }
        }
    }
}

#[test]
fn every_instruction_set_and_number_of_rows_gives_the_same_bits_of_integer_products() {
    let mut random = Random(11);
    for bits in [4, 8] {
        for (block, k) in [(16, 208), (32, 512), (32, 4128), (64, 96), (128, 640), (256, 300)] {
            for points in [Points::Absent, Points::Packed] {
                let shape = NBitsShape {
                    n: 71,
                    k,
                    bits,
                    block,
                };
                let weight = random_weight(&mut random, shape, points);
                let rows = 23;
                let a: Vec<f32> = (0..rows * k).map(|_| random.float()).collect();
                let bits_of = |isa, rows: usize| {
                    let mut bits = Vec::new();
                    for a in a.chunks(rows * k) {
                        let mut out = vec![f32::NAN; a.len() / k * weight.n];
                        weight.matmul_with(isa, a, true, &mut out);
                        bits.extend(out.iter().map(|v| v.to_bits()));
                    }
                    bits
                };
                let want = bits_of(Isa::Scalar, 1);
                for isa in Isa::available() {
                    for rows in [1, 2, 5, rows] {
                        let same = want == bits_of(isa, rows);
                        assert!(
                            same,
                            "{isa:?} {bits} bits block {block} k {k} {points:?} rows {rows}"
                        );
                    }
                }
            }
        }
    }
}
