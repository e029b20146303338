//! Measures a model folder in one process, for comparisons with other runtimes: prints one line of JSON.
//!
//! `measure FOLDER --threads N --prompt 512 --contexts 128,2048 --new 64 [--adapter FILE]`
//!
//! - `load_s`: from the start of opening to the first token of a short text, tokenizer included;
//! - `prefill_s`: a prompt of `--prompt` tokens to the scores of the next one;
//! - `decode_s` by context: seconds for each of `--new` tokens behind a prompt of so many tokens.
//!
//! `*_cpu_s` is the time of all threads, `peak_bytes` the most memory that the process held.
#![allow(missing_docs, reason = "a program")]

use std::time::Instant;

use olive_genai::{Adapters, Generator, GeneratorParams, Model, peak_memory_bytes};

type Failure = Box<dyn std::error::Error>;

/// Seconds that the threads of this process have run.
fn cpu_seconds() -> f64 {
    let threads = std::fs::read_dir("/proc/self/task")
        .into_iter()
        .flatten()
        .flatten();
    let nanoseconds = threads.filter_map(|thread| {
        let line = std::fs::read_to_string(thread.path().join("schedstat")).ok()?;
        line.split(' ').next()?.parse::<f64>().ok()
    });
    nanoseconds.sum::<f64>() / 1e9
}

/// The same pseudo-random ids as `benches/peers/generate.py` makes.
fn ids(count: usize) -> Vec<u32> {
    (0..count as u64)
        .map(|i| ((i * 7919 + 17) % 4000 + 100) as u32)
        .collect()
}

struct Options {
    folder: String,
    threads: usize,
    prompt: usize,
    contexts: Vec<usize>,
    new: usize,
    adapter: Option<String>,
}

fn options() -> Result<Options, Failure> {
    let mut arguments = std::env::args().skip(1);
    let mut options = Options {
        folder: arguments.next().ok_or("a folder is missing")?,
        threads: 1,
        prompt: 512,
        contexts: vec![128, 2048],
        new: 64,
        adapter: None,
    };
    while let Some(name) = arguments.next() {
        let value = arguments.next().ok_or_else(|| format!("{name} needs a value"))?;
        match name.as_str() {
            "--threads" => options.threads = value.parse()?,
            "--prompt" => options.prompt = value.parse()?,
            "--contexts" => {
                let contexts = value.split(',').filter(|c| !c.is_empty()).map(str::parse);
                options.contexts = contexts.collect::<Result<_, _>>()?;
            }
            "--new" => options.new = value.parse()?,
            "--adapter" => options.adapter = Some(value),
            _ => return Err(format!("unknown option {name}").into()),
        }
    }
    Ok(options)
}

fn generator(model: &Model, adapters: Option<&Adapters>, length: usize) -> Result<Generator, Failure> {
    let mut params = GeneratorParams::new(model);
    params.set("do_sample", false)?;
    params.set("max_length", length)?.set("min_length", length)?;
    let mut generator = Generator::new(model, &params)?;
    if let Some(adapters) = adapters {
        generator.set_active_adapter(adapters, "adapter")?;
    }
    Ok(generator)
}

/// Seconds and seconds of all threads that `work` takes.
fn timed(work: impl FnOnce() -> Result<(), Failure>) -> Result<(f64, f64), Failure> {
    let (start, cpu) = (Instant::now(), cpu_seconds());
    work()?;
    Ok((start.elapsed().as_secs_f64(), cpu_seconds() - cpu))
}

fn main() -> Result<(), Failure> {
    let options = options()?;
    let mut out = serde_json::Map::new();
    let mut put = |name: String, value: f64| out.insert(name, value.into());
    let mut model = None;
    let mut opened_in = 0.0;
    let (load, cpu) = timed(|| {
        let (opened, tokenizer) = Model::open_with_tokenizer(&options.folder, Some(options.threads))?;
        opened_in = opened.load_seconds();
        let prompt = tokenizer.encode("What is the best thing to see in Chicago?")?;
        let mut generator = generator(&opened, None, prompt.len() + 2)?;
        generator.append_tokens(&prompt)?;
        generator.generate_next_token()?;
        model = Some(opened);
        Ok(())
    })?;
    let model = model.ok_or("no model")?;
    put("load_s".into(), load);
    put("load_cpu_s".into(), cpu);
    put("load_model_s".into(), opened_in);
    let adapters = match &options.adapter {
        None => None,
        Some(file) => {
            let mut adapters = Adapters::new(&model);
            adapters.load(file, "adapter")?;
            Some(adapters)
        }
    };
    if options.prompt > 0 {
        let mut generator = generator(&model, adapters.as_ref(), options.prompt + 1)?;
        let (wall, cpu) = timed(|| Ok(generator.append_tokens(&ids(options.prompt))?))?;
        put("prefill_s".into(), wall);
        put("prefill_cpu_s".into(), cpu);
    }
    for context in &options.contexts {
        // One token more: the first comes from the prompt's own run.
        let mut generator = generator(&model, adapters.as_ref(), context + options.new + 2)?;
        generator.append_tokens(&ids(*context))?;
        generator.generate_next_token()?;
        let (wall, cpu) = timed(|| {
            for _ in 0..options.new {
                generator.generate_next_token()?;
            }
            Ok(())
        })?;
        put(format!("decode_{context}_s"), wall / options.new as f64);
        put(format!("decode_{context}_cpu_s"), cpu / options.new as f64);
    }
    put("peak_bytes".into(), peak_memory_bytes() as f64);
    println!("{}", serde_json::Value::Object(out));
    Ok(())
}
