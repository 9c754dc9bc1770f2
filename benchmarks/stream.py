"""Does the STREAM of `counterpoint calibrate` reach a compiled one? Ratio of triads from one run, A B A B.

    python benchmarks/stream.py                    # all cores, arrays of 4 x the last-level cache, 8 rounds
    python benchmarks/stream.py --threads 1 --rounds 4

A: benchmarks/stream.c, compiled here with the system's compiler (-O3 -march=native -fopenmp). B: torch, as calibrate
measures. Every round runs both, one after the other. Compared are the best triads of the whole run, which is STREAM's
own measure; the range over rounds shows how much the machine was disturbed. Exit code 1 when the ratio leaves
0.95 - 1.05, 0 with a line when there is no compiler.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path

from counterpoint.calibration.machine import this_machine
from counterpoint.calibration.stream import WORDS, stream

SOURCE = Path(__file__).with_suffix(".c")
FLAGS = ("-O3", "-march=native", "-fopenmp", "-lm")


def main() -> int:
    machine = this_machine()
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--threads", type=int, default=machine.cores)
    parser.add_argument("--rounds", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=10, help="of every kernel in a round")
    parser.add_argument("--array-bytes", type=int, default=4 * machine.cache_bytes)
    args = parser.parse_args()
    compiler = next((found for name in ("cc", "gcc", "clang") if (found := shutil.which(name))), None)
    if compiler is None:
        print("skipped: no C compiler (cc, gcc or clang) on this machine")
        return 0
    with tempfile.TemporaryDirectory() as folder:
        program = Path(folder, "stream")
        build = subprocess.run(
            [compiler, str(SOURCE), *FLAGS, "-o", str(program)], capture_output=True, text=True
        )
        if build.returncode:
            print(
                f"skipped: {compiler} cannot compile {SOURCE.name}: {build.stderr.strip().splitlines()[-1]}"
            )
            return 0
        rows: dict[str, list[dict[str, float]]] = {"C": [], "torch": []}
        for i in range(args.rounds):
            rows["C"].append(compiled(program, args))
            rows["torch"].append(ours(args))
            print(f"round {i + 1} of {args.rounds}", file=sys.stderr, flush=True)
    return report(rows, args, f"{machine.processor}, {machine.cores} cores, torch {machine.torch}")


def compiled(program: Path, args: argparse.Namespace) -> dict[str, float]:
    """Best bytes/s of the C program's kernels in one start of it."""
    env = {**os.environ, "OMP_NUM_THREADS": str(args.threads)}
    command = [str(program), str(args.array_bytes // 8), str(args.repeats)]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
    return dict(zip(WORDS, map(float, done.stdout.split()), strict=True))


def ours(args: argparse.Namespace) -> dict[str, float]:
    """Best bytes/s of the kernels in torch."""
    found = stream(args.threads, args.array_bytes, args.repeats)
    return {name: s.points[0].size / s.points[0].best for name, s in found.items()}


def report(rows: dict[str, list[dict[str, float]]], args: argparse.Namespace, machine: str) -> int:
    print(
        f"{date.today()}, {machine}; {args.threads} threads, arrays of {args.array_bytes / 2**20:.0f} MiB, float64"
    )
    print(f"{'kernel':8}{'C best':>12}{'torch best':>12}{'ratio':>8}{'per round: median, range':>34}")
    ratio = 0.0
    for name in WORDS:
        best = {who: max(row[name] for row in found) for who, found in rows.items()}
        ratio = best["torch"] / best["C"]
        each = [b[name] / a[name] for a, b in zip(rows["C"], rows["torch"], strict=True)]
        spread = f"{statistics.median(each):.3f}, {min(each):.3f} - {max(each):.3f}"
        print(f"{name:8}{best['C'] / 1e9:9.2f} GB/s{best['torch'] / 1e9:7.2f} GB/s{ratio:8.3f}{spread:>34}")
    holds = 0.95 <= ratio <= 1.05
    print(f"triad: torch reaches {ratio:.1%} of C, {'within' if holds else 'OUTSIDE'} 5 %")
    return 0 if holds else 1


if __name__ == "__main__":
    sys.exit(main())
