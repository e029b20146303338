#!/usr/bin/env python3
"""A checkpoint to an int4 ONNX folder: olive's builder against onnxruntime-genai's, run in turns.

    builder.py OLIVE CHECKPOINT [--rounds 5] [--threads N] [--scratch DIR] [--python PYTHON]

OLIVE is the example `build_folder` of olive-onnx or the binary `olive`; CHECKPOINT a folder, such as `make_checkpoint
qwen2.5-0.5b` writes. PYTHON has onnxruntime-genai 0.18.0, onnx_ir, torch and transformers; without it a scratch
environment is made from the registry. Prints wall and CPU seconds and peak memory, the median of the rounds, and how
many times less ours takes; exits with 1 if the two folders do not hold the same integers and scales.
"""

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

PINNED = ["onnxruntime-genai==0.18.0", "onnxruntime==1.31.1", "onnx==1.23.2", "onnx_ir==1.1.0", "torch==2.15.0", "transformers==5.23.0"]


def environment(scratch):
    """A Python with the peer, from the registry."""
    folder = scratch / "venv"
    python = folder / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "-q", *PINNED], check=True)
    return python


def measure(command, threads):
    """Wall and CPU seconds and peak MB of a command, measured by the kernel."""
    variables = {**os.environ, "RAYON_NUM_THREADS": str(threads), "OMP_NUM_THREADS": str(threads)}
    begin = time.monotonic()
    process = subprocess.Popen([str(part) for part in command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, env=variables)
    errors = process.stderr.read()
    _, status, usage = os.wait4(process.pid, 0)
    if status != 0:
        raise SystemExit(f"{command[0]}: {errors.decode()[-500:]}")
    return time.monotonic() - begin, usage.ru_utime + usage.ru_stime, usage.ru_maxrss / 1024


def compare(python, ours, theirs):
    """Whether both folders hold the same constants; names them where they differ."""
    script = """
import sys, onnx
def constants(folder):
    model = onnx.load(folder + "/model.onnx")
    return {t.name: (t.data_type, tuple(t.dims), t.raw_data) for t in model.graph.initializer}
ours, theirs = map(constants, sys.argv[1:])
tables = {"cos_cache", "sin_cache"}
wrong = sorted(name for name in ours.keys() | theirs.keys() if name not in tables and ours.get(name) != theirs.get(name))
print(len(ours), "constants,", len(wrong), "differ", *wrong[:5])
sys.exit(1 if wrong else 0)
"""
    return subprocess.run([str(python), "-c", script, str(ours), str(theirs)]).returncode == 0


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("olive", type=Path)
    parser.add_argument("checkpoint", type=Path)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch", type=Path)
    parser.add_argument("--python", type=Path, help="a Python that has the peer")
    arguments = parser.parse_args()
    scratch = arguments.scratch or Path(tempfile.mkdtemp(prefix="builder-"))
    scratch.mkdir(parents=True, exist_ok=True)
    python = arguments.python or environment(scratch)
    ours, theirs = scratch / "ours", scratch / "theirs"
    if arguments.olive.name == "olive":
        mine = [arguments.olive, "capture-onnx-graph", "-m", arguments.checkpoint, "--use_model_builder", "--precision", "int4", "-o", ours]
        ours = ours / "model"
    else:
        mine = [arguments.olive, arguments.checkpoint, ours, "int4"]
    peer = [python, "-m", "onnxruntime_genai.models.builder", "-m", "model", "-i", arguments.checkpoint, "-o", theirs, "-p", "int4", "-e", "cpu", "-c", scratch / "cache"]
    results = {"olive": [], "onnxruntime-genai": []}
    # Once for the page cache.
    subprocess.run(f"cat '{arguments.checkpoint}'/*.safetensors > /dev/null", shell=True, check=True)
    for _ in range(arguments.rounds):
        for name, command, output in (("olive", mine, ours), ("onnxruntime-genai", peer, theirs)):
            shutil.rmtree(output, ignore_errors=True)
            results[name].append(measure(command, arguments.threads))
    medians = {name: [statistics.median(column) for column in zip(*rows)] for name, rows in results.items()}
    print(f"{'':20}{'wall s':>10}{'CPU s':>10}{'peak MB':>10}   {arguments.threads} threads, median of {arguments.rounds}")
    for name, row in medians.items():
        print(f"{name:20}" + "".join(f"{value:10.2f}" for value in row))
    ratios = [theirs_ / ours_ for ours_, theirs_ in zip(*medians.values())]
    print(f"{'times less':20}" + "".join(f"{value:10.2f}" for value in ratios))
    return 0 if compare(python, ours, theirs) else 1


if __name__ == "__main__":
    sys.exit(main())
