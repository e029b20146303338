#!/usr/bin/env python3
"""`olive quantize --algorithm awq` on a trained model: CPU time, memory and perplexity, beside AutoAWQ.

    awq.py OLIVE MODEL CALIBRATION_TEXT TEST_TEXT [--repeats 5] [--threads 1 2]

Sixteen blocks of 512 tokens calibrate; sixty of the test text measure. AutoAWQ 0.2.9 corrupts a model on the CPU as it is
published, and needs packages of an older time; with `--autoawq PYTHON SCRIPT` a script of the reader's own that
quantizes `MODEL` to a folder (`SCRIPT MODEL CALIBRATION_TEXT FOLDER`) is run between ours, otherwise the figures of a
repaired run on such a machine stand in its place, marked as quoted.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import measure

# AutoAWQ 0.2.9 (torch 2.6, transformers 4.51.3), CPU path repaired, on this model and these blocks.
QUOTED = ["2", "AutoAWQ 0.2.9, repaired (quoted)", "504", "–", "2478", "61.746", "–"]
BLOCKS, LENGTH, TEST_BLOCKS = 16, 512, 60


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("olive")
    parser.add_argument("model")
    parser.add_argument("calibration")
    parser.add_argument("test")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--autoawq", nargs=2, metavar=("PYTHON", "SCRIPT"))
    args = parser.parse_args()
    rows = []
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        def perplexity(model):
            command = [args.olive, "evaluate", "-m", model, "--data_files", args.test, "--block_size", LENGTH,
                       "--max_blocks", TEST_BLOCKS, "--json", "--log_level", 3]
            output = subprocess.run(list(map(str, command)), check=True, capture_output=True, text=True).stdout
            return json.loads(output)["perplexity"]["perplexity"]

        def olive(search, threads):
            output = Path(tempfile.mkdtemp(dir=folder)) / "model"
            command = [args.olive, "quantize", "-m", args.model, "-o", output, "--algorithm", "awq", "--awq_search",
                       search, "-d", "text", "--data_files", args.calibration, "--max_seq_len", LENGTH,
                       "--max_samples", BLOCKS, "--log_level", 3]
            return measure.measure(command, threads), output

        def autoawq(threads):
            output = Path(tempfile.mkdtemp(dir=folder)) / "model"
            python, script = args.autoawq
            return measure.measure([python, script, args.model, args.calibration, output], threads), output

        for threads in args.threads:
            runs = {f"olive, {search}": lambda search=search: olive(search, threads) for search in ["exact", "hybrid", "fast"]}
            if args.autoawq:
                runs["AutoAWQ"] = lambda: autoawq(threads)
            found = {name: [] for name in runs}
            output = {}
            for _ in range(args.repeats):
                for name, run in runs.items():
                    own, output[name] = run()
                    found[name].append((own.cpu, own.wall, own.peak))
            theirs = [measure.median(column) for column in zip(*found["AutoAWQ"])] if args.autoawq else [504, None, 2478]
            for name, own in found.items():
                cpu, wall, peak = (measure.median(column) for column in zip(*own))
                rows.append([str(threads), name, f"{cpu:.1f}", f"{wall:.1f}", f"{peak:.0f}",
                             f"{perplexity(output[name]):.3f}", f"{theirs[0] / cpu:.1f}x"])
    if not args.autoawq:
        rows.append(QUOTED)
    title = f"AWQ, 4 bits in groups of 128, {BLOCKS} x {LENGTH} tokens"
    measure.table(title, ["threads", "", "CPU s", "wall s", "peak MB", "perplexity", "CPU time against AutoAWQ"], rows)


if __name__ == "__main__":
    sys.exit(main())
