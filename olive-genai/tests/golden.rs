//! Folders that onnxruntime-genai's own builder made, against what onnxruntime-genai answered.
#![allow(clippy::unwrap_used, missing_docs)]

use std::path::PathBuf;

use olive_genai::{Adapters, FinishReason, Generator, GeneratorParams, Model, Tokenizer};
use serde_json::Value;

fn shared(path: &str) -> Option<PathBuf> {
    let root = std::env::var_os("OLIVE_SHARED").map_or_else(
        || PathBuf::from(env!("CARGO_MANIFEST_DIR")).join("../../shared"),
        PathBuf::from,
    );
    let path = root.join(path);
    if !path.exists() {
        eprintln!("SKIPPED: `{}` is not there", path.display());
        return None;
    }
    Some(path)
}

fn ids(value: &Value) -> Vec<u32> {
    value
        .as_array()
        .unwrap()
        .iter()
        .map(|id| id.as_u64().unwrap() as u32)
        .collect()
}

fn greedy(model: &Model, set: impl Fn(&mut GeneratorParams)) -> GeneratorParams {
    let mut params = GeneratorParams::new(model);
    params.set("do_sample", false).unwrap();
    set(&mut params);
    params
}

/// Greedy tokens, the end token included, as the recording has them.
fn answer(generator: &mut Generator) -> Vec<u32> {
    let mut tokens = Vec::new();
    while !generator.is_done() {
        generator.generate_next_token().unwrap();
        tokens.push(generator.get_next_tokens()[0]);
    }
    tokens
}

fn check_folder(name: &str, tolerance: f32) {
    let Some(folder) = shared(&format!("golden/genai/{name}")) else {
        return;
    };
    let recorded: Value =
        serde_json::from_str(&std::fs::read_to_string(folder.with_extension("greedy.json")).unwrap())
            .unwrap();
    let model = Model::open(&folder).unwrap();
    let tokenizer = Tokenizer::new(&model).unwrap();
    for (kind, prompt) in recorded["prompts"].as_object().unwrap() {
        let text = prompt["text"].as_str().unwrap();
        let (prompt_ids, want) = (ids(&prompt["ids"]), ids(&prompt["tokens"]));
        assert_eq!(
            tokenizer.encode(text).unwrap(),
            ids(&prompt["hf_ids_no_special"]),
            "{name} {kind}"
        );
        let params = greedy(&model, |p| {
            p.set("max_length", prompt_ids.len() + want.len()).unwrap();
        });
        let mut generator = Generator::new(&model, &params).unwrap();
        generator.append_tokens(&prompt_ids).unwrap();
        let logits = generator.get_logits().unwrap();
        let first = prompt["first_logits"].as_array().unwrap();
        let worst = logits
            .iter()
            .zip(first)
            .map(|(a, b)| (a - b.as_f64().unwrap() as f32).abs())
            .fold(0.0, f32::max);
        eprintln!("{name} {kind}: first logits differ by at most {worst:e}");
        assert!(worst <= tolerance, "{name} {kind}: {worst}");
        assert_eq!(answer(&mut generator), want, "{name} {kind}");
        assert_eq!(
            generator.token_count(),
            prompt["sequence_len"].as_u64().unwrap() as usize
        );
    }
}

#[test]
fn llama_fp32() {
    check_folder("llama/fp32-cpu", 1e-4);
}

#[test]
fn phi3_fp32() {
    check_folder("phi3/fp32-cpu", 1e-4);
}

#[test]
fn qwen2_fp32() {
    check_folder("qwen2/fp32-cpu", 1e-4);
}

#[test]
fn llama_int4() {
    check_folder("llama/int4-cpu", 5e-2);
}

#[test]
fn phi3_int4() {
    check_folder("phi3/int4-cpu", 5e-2);
}

#[test]
fn qwen2_int4() {
    check_folder("qwen2/int4-cpu", 5e-2);
}

#[test]
fn an_inactive_adapter_is_the_base_and_an_active_one_is_not() {
    let (Some(base), Some(folder)) = (
        shared("golden/genai/llama/fp32-cpu"),
        shared("golden/genai/llama/fp32-cpu-adapters"),
    ) else {
        return;
    };
    let base = Model::open(base).unwrap();
    let model = Model::open(&folder).unwrap();
    let mut adapters = Adapters::new(&model);
    adapters
        .load(folder.join("adapter_weights.onnx_adapter"), "travel")
        .unwrap();
    // Made by Olive's convert-adapters, with names that the builder's graphs do not have.
    let error = adapters
        .load(folder.join("../poem.onnx_adapter"), "poem")
        .unwrap_err()
        .to_string();
    assert!(
        error.contains("lora_A.weight") && error.contains("did you mean"),
        "{error}"
    );
    assert_eq!(adapters.names().collect::<Vec<_>>(), ["travel"]);
    let prompt = [5, 17, 300, 42, 8];
    let logits = |model: &Model, adapter: Option<&str>| {
        let mut generator = Generator::new(model, &greedy(model, |_| {})).unwrap();
        if let Some(name) = adapter {
            generator.set_active_adapter(&adapters, name).unwrap();
        }
        generator.append_tokens(&prompt).unwrap();
        generator.get_logits().unwrap().to_vec()
    };
    let differ = |a: &[f32], b: &[f32]| a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    let plain = logits(&base, None);
    assert!(differ(&plain, &logits(&model, None)) < 1e-5);
    assert!(differ(&plain, &logits(&model, Some("travel"))) > 1e-3);
    assert!(
        adapters
            .load(folder.join("adapter_weights.onnx_adapter"), "travel")
            .is_err()
    );
    adapters.unload("travel").unwrap();
    assert!(adapters.unload("travel").is_err());
    assert!(
        Adapters::new(&base)
            .load(folder.join("adapter_weights.onnx_adapter"), "x")
            .is_err()
    );
}

fn models() -> Vec<Model> {
    let names = [
        "llama/fp32-cpu",
        "llama/int4-cpu",
        "phi3/fp32-cpu",
        "qwen2/int4-cpu",
    ];
    let folders = names
        .into_iter()
        .filter_map(|name| shared(&format!("golden/genai/{name}")));
    folders.map(|folder| Model::open(folder).unwrap()).collect()
}

const PROMPT: [u32; 12] = [5, 17, 300, 42, 8, 900, 33, 61, 700, 12, 4, 77];

fn near(a: &[f32], b: &[f32]) {
    let worst = a.iter().zip(b).map(|(a, b)| (a - b).abs()).fold(0.0, f32::max);
    assert!(a.len() == b.len() && worst < 1e-4, "{worst}");
}

#[test]
fn appending_rewinding_and_chunks_equal_a_fresh_run() {
    // Rounded activations turn the last bits of a sum into steps, so only float models are compared this closely.
    let floats = |model: &Model| !model.folder().ends_with("int4-cpu");
    for model in models().into_iter().filter(floats) {
        let params = greedy(&model, |p| {
            p.set("max_length", 40).unwrap();
        });
        let fresh = |ids: &[u32], chunk: Option<usize>| {
            let mut params = params.clone();
            params.options_mut().chunk_size = chunk;
            let mut generator = Generator::new(&model, &params).unwrap();
            generator.append_tokens(ids).unwrap();
            (generator.get_logits().unwrap().to_vec(), generator)
        };
        let (want, mut generator) = fresh(&PROMPT, None);
        near(&want, &fresh(&PROMPT, Some(5)).0);
        near(&want, &fresh(&PROMPT, Some(1)).0);
        let (_, mut grown) = fresh(&PROMPT[..7], None);
        grown.append_tokens(&PROMPT[7..]).unwrap();
        near(&want, grown.get_logits().unwrap());
        let tokens = answer(&mut generator);
        generator.rewind_to(12).unwrap();
        near(&want, generator.get_logits().unwrap());
        assert_eq!(answer(&mut generator), tokens);
        generator.rewind_to(7).unwrap();
        generator.append_tokens(&PROMPT[7..]).unwrap();
        assert_eq!(answer(&mut generator), tokens);
        generator.rewind_to(0).unwrap();
        assert!(generator.generate_next_token().is_err());
        generator.append_tokens(&PROMPT).unwrap();
        assert_eq!(answer(&mut generator), tokens);
        let continued = generator.get_sequence(0).unwrap();
        let mut params = params.clone();
        params.set("max_length", 60).unwrap();
        let mut older = Generator::new(&model, params.set_input_ids(&PROMPT)).unwrap();
        older.compute_logits().unwrap();
        assert_eq!(
            older.tokens().take(8).collect::<Result<Vec<_>, _>>().unwrap(),
            continued[12..].iter().copied().take(8).collect::<Vec<_>>()
        );
    }
}

#[test]
fn padded_rows_answer_as_they_do_alone() {
    for model in models() {
        let pad = model.config().model.pad_token_id;
        let rows: [&[u32]; 3] = [&PROMPT, &PROMPT[3..9], &PROMPT[6..]];
        let alone: Vec<Vec<u32>> = rows
            .iter()
            .map(|row| {
                let params = greedy(&model, |p| {
                    p.set("max_length", row.len() + 10).unwrap();
                });
                let mut generator = Generator::new(&model, &params).unwrap();
                generator.append_tokens(row).unwrap();
                answer(&mut generator)
            })
            .collect();
        let params = greedy(&model, |p| {
            p.set("max_length", 22).unwrap().set("batch_size", 3).unwrap();
        });
        let mut generator = Generator::new(&model, &params).unwrap();
        let padded = rows.iter().flat_map(|row| {
            row.iter()
                .copied()
                .chain(std::iter::repeat_n(pad, 12 - row.len()))
        });
        generator.append_tokens(&padded.collect::<Vec<_>>()).unwrap();
        let mut together = vec![Vec::new(); 3];
        while !generator.is_done() {
            generator.generate_next_token().unwrap();
            for (row, token) in generator.get_next_tokens().iter().enumerate() {
                together[row].push(*token);
            }
        }
        for (alone, together) in alone.iter().zip(&together) {
            assert_eq!(alone, &together[..alone.len()]);
            assert!(together[alone.len()..].iter().all(|id| *id == pad));
        }
    }
}

#[test]
fn threads_and_seeds_decide_nothing_else() {
    let Some(folder) = shared("golden/genai/llama/int4-cpu") else {
        return;
    };
    let run = |threads: usize, seed: usize| {
        let model = Model::open_with_threads(&folder, Some(threads)).unwrap();
        let mut params = GeneratorParams::new(&model);
        params
            .set("do_sample", true)
            .unwrap()
            .set("random_seed", seed)
            .unwrap()
            .set("max_length", 300)
            .unwrap();
        params.set("min_length", 300).unwrap();
        let mut generator = Generator::new(&model, &params).unwrap();
        generator.append_tokens(&PROMPT.repeat(10)).unwrap();
        let bits: Vec<u32> = generator
            .get_logits()
            .unwrap()
            .iter()
            .map(|v| v.to_bits())
            .collect();
        (bits, answer(&mut generator))
    };
    let one = run(1, 7);
    assert_eq!(one, run(2, 7));
    assert_eq!(one, run(3, 7));
    assert_ne!(one.1, run(2, 8).1);
}

#[test]
fn crossing_the_rope_border_computes_again() {
    let Some(folder) = shared("golden/genai/phi3/fp32-cpu") else {
        return;
    };
    let model = Model::open(folder).unwrap();
    let border = model.info().rope_threshold.unwrap();
    assert_eq!(border, 128);
    let ids: Vec<u32> = (0..140).map(|i| 3 + i * 37 % 900).collect();
    let params = greedy(&model, |_| {});
    let mut whole = Generator::new(&model, &params).unwrap();
    whole.append_tokens(&ids).unwrap();
    let mut grown = Generator::new(&model, &params).unwrap();
    grown.append_tokens(&ids[..120]).unwrap();
    let short = grown.get_logits().unwrap().to_vec();
    grown.append_tokens(&ids[120..]).unwrap();
    near(whole.get_logits().unwrap(), grown.get_logits().unwrap());
    grown.rewind_to(120).unwrap();
    near(&short, grown.get_logits().unwrap());
    let mut chunked = Generator::new(
        &model,
        &greedy(&model, |p| {
            p.set("chunk_size", 50).unwrap();
        }),
    )
    .unwrap();
    chunked.append_tokens(&ids).unwrap();
    near(whole.get_logits().unwrap(), chunked.get_logits().unwrap());
}

#[test]
fn one_beam_of_many_is_no_worse_than_greedy() {
    for model in models() {
        let params = greedy(&model, |p| {
            p.set("max_length", 20)
                .unwrap()
                .set("num_beams", 4)
                .unwrap()
                .set("num_return_sequences", 2)
                .unwrap();
        });
        let mut generator = Generator::new(&model, &params).unwrap();
        generator.append_tokens(&PROMPT).unwrap();
        while !generator.is_done() {
            generator.generate_next_token().unwrap();
        }
        let (first, second) = (
            generator.get_sequence(0).unwrap(),
            generator.get_sequence(1).unwrap(),
        );
        assert!(first.starts_with(&PROMPT) && second.starts_with(&PROMPT) && first != second);
        assert!(generator.get_sequence(2).is_err());
    }
}

#[test]
fn pieces_of_a_stream_join_to_the_text() {
    for model in models() {
        let tokenizer = Tokenizer::new(&model).unwrap();
        for text in [
            "Käyttö: 日本語のモデル — naïve café 🙂 test",
            " two  spaces\n\n and lines",
            "🙂🙂",
        ] {
            let ids = tokenizer.encode(text).unwrap();
            let mut stream = tokenizer.stream();
            let mut pieces: Vec<String> = ids.iter().map(|id| stream.decode(*id).unwrap()).collect();
            pieces.push(stream.finish().unwrap());
            assert!(
                pieces.iter().all(|piece| !piece.contains('\u{fffd}')),
                "{pieces:?}"
            );
            assert_eq!(pieces.concat(), tokenizer.decode(&ids).unwrap());
        }
    }
}

#[test]
fn reasons_to_end_and_wrong_calls() {
    for model in models().into_iter().take(1) {
        let params = greedy(&model, |p| {
            p.set("max_length", 13).unwrap();
        });
        let mut generator = Generator::new(&model, &params).unwrap();
        assert!(generator.get_logits().is_err());
        assert!(generator.append_tokens(&[5000]).is_err());
        assert!(generator.append_tokens(&[1; 14]).is_err());
        generator.append_tokens(&PROMPT).unwrap();
        let mut logits = vec![0.0; 1024];
        assert!(generator.set_logits(&logits[1..]).is_err());
        logits[model.config().model.eos_token_id[0] as usize] = 1.0;
        generator.set_logits(&logits).unwrap();
        generator.generate_next_token().unwrap();
        assert_eq!(
            (generator.finish_reason(), generator.token_count()),
            (Some(FinishReason::Stop), 12)
        );
        assert!(generator.generate_next_token().is_err());
        generator.rewind_to(12).unwrap();
        generator.generate_next_token().unwrap();
        assert_eq!(generator.finish_reason(), Some(FinishReason::Length));
        assert!(generator.rewind_to(14).is_err());
        assert!(Generator::new(&model, &greedy(&model, |p| p.options_mut().max_length = 4096)).is_err());
    }
}

/// Prints the perplexity of a folder on the first 60 × 512 tokens of `data/wikitext2-test.txt`:
/// `OLIVE_PERPLEXITY=<folder> cargo test --release -- --ignored --nocapture perplexity`.
#[test]
#[ignore = "measures, checks nothing"]
fn perplexity() {
    let Some(folder) = std::env::var_os("OLIVE_PERPLEXITY").map(PathBuf::from) else {
        return;
    };
    let Some(text) = shared("data/wikitext2-test.txt") else {
        return;
    };
    let model = Model::open(&folder).unwrap();
    let ids = Tokenizer::new(&model)
        .unwrap()
        .encode(&std::fs::read_to_string(text).unwrap())
        .unwrap();
    let blocks = ids.chunks_exact(512).take(60);
    let start = std::time::Instant::now();
    let measured = olive_genai::perplexity(&model, blocks, &Default::default(), |_| {}).unwrap();
    eprintln!("{}: {measured:?} in {:?}", folder.display(), start.elapsed());
}

/// Prints how fast folders answer: `OLIVE_SPEED=<folder> cargo test --release -- --ignored --nocapture speed`.
#[test]
#[ignore = "measures, checks nothing"]
fn speed() {
    let folder = std::env::var_os("OLIVE_SPEED").map(PathBuf::from);
    let Some(folder) = folder.or_else(|| shared("golden/genai/llama/int4-cpu")) else {
        return;
    };
    let model = Model::open(&folder).unwrap();
    let ids: Vec<u32> = (0..64).map(|i| 3 + i * 37 % 900).collect();
    let latency = olive_genai::latency(&model, &ids, 64, 3).unwrap();
    eprintln!(
        "{}: {latency:?}, loaded in {} s",
        folder.display(),
        model.load_seconds()
    );
}
