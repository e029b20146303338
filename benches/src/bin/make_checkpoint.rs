//! Writes a checkpoint of random bf16 weights in the shape of a published model, with a config and a tokenizer that its
//! peers can read: `make_checkpoint SHAPE FOLDER [--seed N] [--layers N]`.
//!
//! SHAPE is `qwen2.5-0.5b` or `phi-3.5-mini`. The same shape, seed and layers give the same bytes. Weights are scaled so
//! that activations stay finite; the text that the model writes means nothing.

use std::path::{Path, PathBuf};
use std::process::ExitCode;

use olive_core::arch::read_spec;
use olive_core::checkpoint::{CheckpointPlan, CheckpointWriter};
use olive_core::{DType, Error, Result, fsio};
use rayon::prelude::*;
use serde_json::{Map, Value, json};

/// Elements that one task makes.
const CHUNK: usize = 1 << 16;
const SHAPES: &str = "qwen2.5-0.5b, phi-3.5-mini";
const DEFAULT_SEED: u64 = 42;

struct Arguments {
    shape: String,
    folder: PathBuf,
    seed: u64,
    layers: Option<usize>,
}

fn main() -> ExitCode {
    let Some(arguments) = arguments() else {
        eprintln!("usage: make_checkpoint SHAPE FOLDER [--seed N] [--layers N]   (SHAPE: {SHAPES})");
        return ExitCode::from(2);
    };
    match make(&arguments) {
        Ok(bytes) => {
            println!("{}: {bytes} bytes of weights", arguments.folder.display());
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{error}");
            ExitCode::from(if error.is_usage() { 2 } else { 1 })
        }
    }
}

fn arguments() -> Option<Arguments> {
    let (mut seed, mut layers, mut places) = (DEFAULT_SEED, None, Vec::new());
    let mut given = std::env::args().skip(1);
    while let Some(argument) = given.next() {
        match argument.as_str() {
            "--seed" => seed = given.next()?.parse().ok()?,
            "--layers" => layers = Some(given.next()?.parse().ok()?),
            _ => places.push(argument),
        }
    }
    let [shape, folder] = <[String; 2]>::try_from(places).ok()?;
    Some(Arguments {
        shape,
        folder: folder.into(),
        seed,
        layers,
    })
}

fn make(arguments: &Arguments) -> Result<u64> {
    let mut config = match arguments.shape.as_str() {
        "qwen2.5-0.5b" => qwen(),
        "phi-3.5-mini" => phi(),
        other => {
            return Err(Error::config(
                "make_checkpoint",
                "SHAPE",
                SHAPES,
                format!("`{other}`"),
            ));
        }
    };
    if let Some(layers) = arguments.layers {
        config["num_hidden_layers"] = json!(layers);
    }
    let folder = &arguments.folder;
    fsio::create_dir(folder)?;
    fsio::write_json(folder.join("config.json"), &config, 2)?;
    write_tokenizer(folder, &config)?;
    let spec = read_spec(folder)?;
    let mut plan = CheckpointPlan::default();
    for (name, shape) in spec.dense_tensors() {
        plan.push(name, DType::BF16, shape);
    }
    let mut writer = CheckpointWriter::create(folder, &plan)?;
    for (number, (name, info)) in plan.tensors.iter().enumerate() {
        let seed = arguments.seed ^ (number as u64 + 1).wrapping_mul(0xA076_1D64_78BD_642F);
        let (mean, deviation) = match info.shape.as_slice() {
            [_] if name.ends_with(".bias") => (0.0, 0.2),
            [_] => (1.0, 0.1),
            _ if name.ends_with("embed_tokens.weight") && !spec.tie_word_embeddings => (0.0, 1.0),
            shape => (0.0, (shape[shape.len() - 1] as f32).powf(-0.5)),
        };
        writer.write(name, &random(info.len(), seed, mean, deviation))?;
    }
    writer.finish()?;
    Ok(plan.byte_len())
}

/// Bytes of `n` bf16 values around `mean`: the sum of four uniform parts of a splitmix64 word.
fn random(n: usize, seed: u64, mean: f32, deviation: f32) -> Vec<u8> {
    /// The deviation of the sum of four uniform 16-bit numbers.
    const WORD_DEVIATION: f32 = 37_837.0;
    const WORD_MEAN: f32 = 2.0 * 65_535.0;
    let mut bytes = vec![0u8; n * 2];
    bytes
        .par_chunks_mut(CHUNK * 2)
        .enumerate()
        .for_each(|(chunk, out)| {
            let mut values = vec![0f32; out.len() / 2];
            for (i, value) in values.iter_mut().enumerate() {
                let index = (chunk * CHUNK + i) as u64 + 1;
                let mut word = seed.wrapping_add(index.wrapping_mul(0x9E37_79B9_7F4A_7C15));
                word = (word ^ (word >> 30)).wrapping_mul(0xBF58_476D_1CE4_E5B9);
                word = (word ^ (word >> 27)).wrapping_mul(0x94D0_49BB_1331_11EB);
                word ^= word >> 31;
                let sum: u64 = (0..4).map(|part| (word >> (16 * part)) & 0xFFFF).sum();
                *value = mean + deviation * ((sum as f32 - WORD_MEAN) / WORD_DEVIATION);
            }
            if let Some(made) = DType::BF16.from_f32(&values) {
                out.copy_from_slice(&made);
            }
        });
    bytes
}

fn qwen() -> Value {
    json!({
        "architectures": ["Qwen2ForCausalLM"],
        "attention_dropout": 0.0,
        "bos_token_id": 151_643,
        "eos_token_id": 151_645,
        "hidden_act": "silu",
        "hidden_size": 896,
        "initializer_range": 0.02,
        "intermediate_size": 4864,
        "max_position_embeddings": 32_768,
        "max_window_layers": 21,
        "model_type": "qwen2",
        "num_attention_heads": 14,
        "num_hidden_layers": 24,
        "num_key_value_heads": 2,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1_000_000.0,
        "sliding_window": 32_768,
        "tie_word_embeddings": true,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "use_sliding_window": false,
        "vocab_size": 151_936,
    })
}

fn phi() -> Value {
    /// Half of a head of 96.
    const FREQUENCIES: usize = 48;
    let ramp = |last: f64| -> Vec<f64> {
        let step = |i: usize| 1.0 + (last - 1.0) * i as f64 / (FREQUENCIES - 1) as f64;
        (0..FREQUENCIES)
            .map(|i| (step(i) * 100.0).round() / 100.0)
            .collect()
    };
    json!({
        "architectures": ["Phi3ForCausalLM"],
        "attention_bias": false,
        "attention_dropout": 0.0,
        "bos_token_id": 1,
        "embd_pdrop": 0.0,
        "eos_token_id": 32_000,
        "hidden_act": "silu",
        "hidden_size": 3072,
        "initializer_range": 0.02,
        "intermediate_size": 8192,
        "max_position_embeddings": 131_072,
        "model_type": "phi3",
        "num_attention_heads": 32,
        "num_hidden_layers": 32,
        "num_key_value_heads": 32,
        "original_max_position_embeddings": 4096,
        "pad_token_id": 32_000,
        "resid_pdrop": 0.0,
        "rms_norm_eps": 1e-5,
        "rope_scaling": { "type": "longrope", "short_factor": ramp(2.8), "long_factor": ramp(64.0) },
        "rope_theta": 10_000.0,
        "sliding_window": 262_144,
        "tie_word_embeddings": false,
        "torch_dtype": "bfloat16",
        "use_cache": true,
        "vocab_size": 32_064,
    })
}

/// A byte-level BPE tokenizer with a token for every row of the embedding: the bytes, then each token so far with each
/// byte behind it. Ids from the model's own special tokens on are special.
fn write_tokenizer(folder: &Path, config: &Value) -> Result<()> {
    let size = config["vocab_size"].as_u64().unwrap_or(0) as usize;
    let end = config["eos_token_id"].as_u64().unwrap_or(0) as usize;
    let start = config["bos_token_id"].as_u64().unwrap_or(0) as usize;
    let first_special = if start > 256 { start } else { end };
    let bytes = byte_letters();
    let mut tokens: Vec<String> = bytes.iter().map(char::to_string).collect();
    let mut merges = Vec::new();
    let mut stem = 0;
    while tokens.len() < first_special {
        for letter in bytes.iter().take(first_special - tokens.len()) {
            merges.push(json!([tokens[stem], letter.to_string()]));
            tokens.push(format!("{}{letter}", tokens[stem]));
        }
        stem += 1;
    }
    let special = |id: usize| match id {
        _ if id == end => "<|end|>".to_owned(),
        _ if id == start => "<|start|>".to_owned(),
        _ => format!("<|special_{id}|>"),
    };
    let added: Vec<Value> = (first_special..size)
        .map(|id| {
            json!({
                "id": id, "content": special(id), "single_word": false, "lstrip": false, "rstrip": false,
                "normalized": false, "special": true,
            })
        })
        .collect();
    let mut vocabulary = Map::new();
    for (id, token) in tokens.into_iter().enumerate() {
        vocabulary.insert(token, id.into());
    }
    let byte_level = json!({
        "type": "ByteLevel", "add_prefix_space": false, "trim_offsets": false, "use_regex": true,
    });
    let tokenizer = json!({
        "version": "1.0",
        "truncation": null,
        "padding": null,
        "added_tokens": added,
        "normalizer": null,
        "pre_tokenizer": byte_level,
        "post_processor": null,
        "decoder": byte_level,
        "model": {
            "type": "BPE", "dropout": null, "unk_token": null, "continuing_subword_prefix": null,
            "end_of_word_suffix": null, "fuse_unk": false, "byte_fallback": false, "ignore_merges": false,
            "vocab": vocabulary, "merges": merges,
        },
    });
    fsio::write_json(folder.join("tokenizer.json"), &tokenizer, 0)?;
    let settings = json!({
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": special(end),
        "pad_token": special(end),
        "add_bos_token": false,
        "clean_up_tokenization_spaces": false,
        "model_max_length": config["max_position_embeddings"],
        "chat_template": "{% for message in messages %}{{ message['content'] }}{% endfor %}",
    });
    fsio::write_json(folder.join("tokenizer_config.json"), &settings, 2)?;
    let generation = json!({
        "bos_token_id": config["bos_token_id"], "eos_token_id": config["eos_token_id"], "do_sample": false,
    });
    fsio::write_json(folder.join("generation_config.json"), &generation, 2)
}

/// The letters that stand for the 256 bytes in byte-level BPE: printable ones for themselves, the others from U+0100 on.
fn byte_letters() -> Vec<char> {
    let mut next = 0x100u32;
    let letter = |byte: u8| {
        let printable = matches!(byte, b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF);
        if printable {
            return char::from(byte);
        }
        let letter = char::from_u32(next).unwrap_or(' ');
        next += 1;
        letter
    };
    (0..=u8::MAX).map(letter).collect()
}
