"""Runs commands side by side and measures them; a scratch environment for pinned packages."""

import hashlib
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path


def environment(*requirements):
    """The interpreter of an environment with these packages. OLIVE_PEERS_PYTHON names one that has them already."""
    given = os.environ.get("OLIVE_PEERS_PYTHON")
    if given:
        return given
    key = hashlib.sha256("\n".join(requirements).encode()).hexdigest()[:16]
    folder = Path.home() / ".cache" / f"olive-bench-{key}"
    python = folder / "bin" / "python"
    if not (folder / "complete").is_file():
        subprocess.run([sys.executable, "-m", "venv", "--clear", folder], check=True)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *requirements], check=True)
        (folder / "complete").touch()
    return str(python)


class Measured:
    """Wall and CPU seconds, peak memory in MB, and what was printed."""

    def __init__(self, command, threads, extra_env=None):
        names = ["RAYON_NUM_THREADS", "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"]
        env = {**os.environ, **{name: str(threads) for name in names}, **(extra_env or {})}
        started = time.perf_counter()
        process = subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        self.output, errors = process.communicate()
        if process.returncode != 0:
            sys.exit(f"{command} failed:\n{self.output}\n{errors}")
        self.wall = time.perf_counter() - started
        # GNU time is the only thing that tells the peak of one child; its line is the last one.
        user, system, peak = errors.strip().splitlines()[-1].split()
        self.cpu = float(user) + float(system)
        self.peak = float(peak) / 1024


def measure(command, threads, extra_env=None):
    """Runs a command to its end."""
    return Measured(["/usr/bin/time", "-f", "%U %S %M", *map(str, command)], threads, extra_env)


def machine():
    """One line about this machine."""
    model = platform.processor() or "?"
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            model = line.split(":", 1)[1].strip()
            break
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{model}, {os.cpu_count()} cores, {memory:.0f} GiB, Linux {platform.release()}"


def median(values):
    return statistics.median(values)


def table(title, columns, rows):
    """Prints a Markdown table."""
    print(f"\n{title} ({machine()})\n")
    print("| " + " | ".join(columns) + " |")
    print("|" + "---|" * len(columns))
    for row in rows:
        print("| " + " | ".join(row) + " |")
