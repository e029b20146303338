#!/usr/bin/env python3
"""`olive quantize --algorithm rtn` against `cp` of the same checkpoint, in turns.

    round.py OLIVE CHECKPOINT [--repeats 5] [--threads N] [--scratch DIR]

Prints wall and CPU seconds and peak memory, the median of the repeats. `cp` leaves its bytes to the system, olive waits
until the disk has them; a third row is `cp` with `sync` of the copy.
"""

import argparse
import os
import shutil
import tempfile
from pathlib import Path

import measure


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("olive")
    parser.add_argument("checkpoint")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--scratch")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=args.scratch) as scratch:
        target = Path(scratch) / "out"
        commands = {
            "olive": [args.olive, "quantize", "--algorithm", "rtn", "-m", args.checkpoint, "-o", target, "--log_level", 3],
            "cp": ["cp", "-r", args.checkpoint, target],
            "cp, sync": ["sh", "-c", f"cp -r '{args.checkpoint}' '{target}' && sync '{target}'/*"],
        }
        found = {name: [] for name in commands}
        for _ in range(args.repeats):
            for name, command in commands.items():
                # What the command before has left to be written is not on its account.
                os.sync()
                own = measure.measure(command, args.threads)
                found[name].append((own.wall, own.cpu, own.peak))
                size = sum(path.stat().st_size for path in target.rglob("*") if path.is_file())
                shutil.rmtree(target)
                found[name][-1] += (size / 1e6,)
    rows, base = [], None
    for name in ["cp", "cp, sync", "olive"]:
        wall, cpu, peak, size = (measure.median(column) for column in zip(*found[name]))
        base = base or wall
        rows.append([name, f"{size:.0f}", f"{wall:.2f}", f"{cpu:.2f}", f"{peak:.0f}", f"{wall / base:.2f}"])
    measure.table(f"Round to nearest, {args.threads} threads", ["", "MB written", "wall s", "CPU s", "peak MB", "times cp"], rows)


if __name__ == "__main__":
    main()
