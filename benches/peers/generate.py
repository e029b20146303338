#!/usr/bin/env python3
"""Generation with olive and with onnxruntime-genai: the same model folders, threads and tokens, in turns.

    generate.py --olive PATH [--venv PATH] [--runs 5] [--threads 1,2] [--adapter NAME=FILE] NAME=FOLDER...

`--olive` is the program `measure` (`cargo build --release --workspace --example measure`). Without `--venv` the pinned
peers of requirements-generate.txt are installed into `.peers` beside this file; a virtual environment that has them
may be given instead. Every run is a process of its own; olive and the peer take turns. Rows are medians; the ratio is
the peer's time over olive's, so above 1 olive is faster.

What is measured, in this order, in every process:
- load: from opening the folder to the first token of a short text, tokenizer included;
- prefill: a prompt of 512 tokens to the scores of the next token;
- decode: the mean of 64 greedy tokens behind prompts of 128 and 2,048 tokens.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import time
import venv
from pathlib import Path

HERE = Path(__file__).resolve().parent


def ids(count):
    """The same pseudo-random ids as olive's program makes."""
    return [(i * 7919 + 17) % 4000 + 100 for i in range(count)]


def cpu_seconds():
    usage = resource.getrusage(resource.RUSAGE_SELF)
    return usage.ru_utime + usage.ru_stime


class Clock:
    def __enter__(self):
        self.wall, self.cpu = time.perf_counter(), cpu_seconds()
        return self

    def __exit__(self, *_):
        self.wall, self.cpu = time.perf_counter() - self.wall, cpu_seconds() - self.cpu


def peer(options):
    """One process of the peer: prints what olive's program prints."""
    import onnxruntime_genai as og

    out = {}

    def put(name, clock, count=1):
        out[f"{name}_s"], out[f"{name}_cpu_s"] = clock.wall / count, clock.cpu / count

    def generator(model, length, adapters=None):
        params = og.GeneratorParams(model)
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = og.Generator(model, params)
        if adapters:
            generator.set_active_adapter(adapters, "adapter")
        return generator

    with Clock() as clock:
        config = og.Config(options.folder)
        session = {"intra_op_num_threads": options.threads}
        config.overlay(json.dumps({"model": {"decoder": {"session_options": session}}}))
        model = og.Model(config)
        tokenizer = og.Tokenizer(model)
        prompt = tokenizer.encode("What is the best thing to see in Chicago?")
        first = generator(model, len(prompt) + 2)
        first.append_tokens(prompt)
        first.generate_next_token()
    put("load", clock)
    del first
    adapters = None
    if options.adapter:
        adapters = og.Adapters(model)
        adapters.load(options.adapter, "adapter")
    if options.prompt:
        prompted = generator(model, options.prompt + 1, adapters)
        with Clock() as clock:
            prompted.append_tokens(ids(options.prompt))
        put("prefill", clock)
        del prompted
    for context in options.contexts:
        running = generator(model, context + options.new + 2, adapters)
        running.append_tokens(ids(context))
        running.generate_next_token()
        with Clock() as clock:
            for _ in range(options.new):
                running.generate_next_token()
        put(f"decode_{context}", clock, options.new)
        del running
    out["peak_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps(out))


def peer_python(given):
    if given:
        return Path(given) / "bin" / "python"
    folder = HERE / ".peers"
    python = folder / "bin" / "python"
    if not python.exists():
        venv.create(folder, with_pip=True)
        requirements = HERE / "requirements-generate.txt"
        subprocess.run([python, "-m", "pip", "install", "-q", "-r", requirements], check=True)
    return python


def run(command):
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True)
    if done.returncode != 0:
        sys.exit(f"{' '.join(map(str, command))}\n{done.stderr.strip()}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def machine():
    text = Path("/proc/cpuinfo").read_text()
    fields = dict(line.split(":", 1) for line in text.split("\n\n")[0].splitlines() if ":" in line)
    fields = {key.strip(): value.strip() for key, value in fields.items()}
    flags = [flag for flag in ("avx2", "avx512f", "avx512_vnni", "amx_int8") if flag in fields.get("flags", "").split()]
    return f"{fields.get('model name', '?')}, {os.cpu_count()} cores, {' '.join(flags)}"


def median(runs, key):
    return statistics.median(run[key] for run in runs)


def table(name, threads, ours, theirs):
    for key in [key for key in ours[0] if key.endswith("_s") and f"{key[:-2]}_cpu_s" in ours[0]]:
        what, cpu = key[:-2], f"{key[:-2]}_cpu_s"
        wall = (median(ours, key), median(theirs, key))
        work = (median(ours, cpu), median(theirs, cpu))
        cells = [name, str(threads), what]
        cells += [f"{v * 1e3:.2f}" for v in (*wall, *work)]
        cells += [f"{wall[1] / wall[0]:.2f}", f"{work[1] / work[0]:.2f}"]
        print("| " + " | ".join(cells) + " |", flush=True)
    peak = (median(ours, "peak_bytes") / 1e6, median(theirs, "peak_bytes") / 1e6)
    print(f"| {name} | {threads} | peak MB | {peak[0]:.0f} | {peak[1]:.0f} | | | {peak[1] / peak[0]:.2f} | |", flush=True)


def adapter_rows(name, threads, contexts, base, adapted):
    """What an active adapter costs: the time of a token with it over that without."""
    for context in contexts:
        key = f"decode_{context}_s"
        cells = [name, str(threads), f"decode_{context}, adapter over base"]
        cells += [f"{median(with_it, key) / median(without, key):.2f}" for without, with_it in zip(base, adapted)]
        print("| " + " | ".join(cells) + " | | | | |", flush=True)


def number_list(text):
    return [int(part) for part in text.split(",") if part]


def named(text):
    name, separator, path = text.partition("=")
    if not separator or not name or not path:
        raise argparse.ArgumentTypeError(f"{text!r} is not of the form name=path")
    return name, path


def compare(options):
    python = peer_python(options.venv)
    adapters = dict(options.adapter)
    print(f"Machine: {machine()}. Median of {options.runs} runs in turns; times in ms (decode: of a token).\n")
    print("| model | threads | what | olive | peer | olive CPU | peer CPU | ratio | CPU ratio |")
    print("|---|---|---|---|---|---|---|---|---|", flush=True)
    for name, folder in options.folders:
        for threads in options.threads:
            common = [folder, "--threads", threads, "--prompt", options.prompt, "--new", options.new]
            common += ["--contexts", ",".join(map(str, options.contexts))]
            variants = {name: common}
            if name in adapters:
                variants[f"{name} with adapter"] = [*common, "--adapter", adapters[name]]
            runs = {variant: ([], []) for variant in variants}
            for _ in range(options.runs):
                for variant, arguments in variants.items():
                    runs[variant][0].append(run([options.olive, *arguments]))
                    runs[variant][1].append(run([python, __file__, "--child", *arguments]))
            for variant, (ours, theirs) in runs.items():
                table(variant, threads, ours, theirs)
            if name in adapters:
                adapter_rows(name, threads, options.contexts, *runs.values())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--contexts", type=number_list, default=[128, 2048])
    parser.add_argument("--new", type=int, default=64)
    if "--child" in sys.argv:
        parser.add_argument("--child", action="store_true")
        parser.add_argument("folder")
        parser.add_argument("--threads", type=int, default=1)
        parser.add_argument("--adapter")
        return peer(parser.parse_args())
    parser.add_argument("--olive", required=True, help="the program `measure`")
    parser.add_argument("--venv", help="a virtual environment with the peers")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--threads", type=number_list, default=[1, 2])
    parser.add_argument("--adapter", type=named, action="append", default=[], help="an adapter for a folder, NAME=FILE")
    parser.add_argument("folders", nargs="+", type=named, help="NAME=FOLDER")
    compare(parser.parse_args())


if __name__ == "__main__":
    main()
