"""How fast the simulator is: one attention layer, forward and backward, on 1,024 devices.

    python benchmarks/simulator.py [--ranks 1024] [--tokens 1048576] [--rounds 3] [--output FILE]

Prints, per strategy and mask, the seconds to load the compiled event loop, to write the schedules of all ranks that are
not alike, to simulate them, and all of these; and steps per second of the event loop, of simulating and end to end (a
schedule of a rank that stands for others counts as often as the cluster needs it told apart). Every round starts a new
process, so nothing is remembered. The loop is compiled before the first round, once for a machine: some twenty seconds.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from statistics import median
from time import perf_counter

CASES = (
    ("ring/ulysses", False),
    ("ring/tokenring", False),
    ("ring/ulysses", True),
    ("tokenring/ulysses", True),
)


def measure(strategy: str, causal: bool, ranks: int, tokens: int) -> dict:
    from functools import partial

    from counterpoint.cluster.presets import find_cluster
    from counterpoint.simulator import engine
    from counterpoint.simulator.fold import fold
    from counterpoint.simulator.simulate import simulate
    from counterpoint.strategies.sequence.attention import (
        AttentionProblem,
        backward_schedule,
        forward_schedule,
        parse_choices,
    )
    from counterpoint.strategies.sequence.blocks import AttentionShape
    from counterpoint.strategies.sequence.layout import SequenceLayout

    def load() -> float:
        """Seconds until the compiled loop is at hand: a step on one device is enough to ask for it."""
        start = perf_counter()
        engine.WORTH_LOADING = engine.WORTH_COMPILING = 0
        alone = AttentionProblem(shape, SequenceLayout("contiguous", 16, 1), (1,), ring, ring)
        simulate([forward_schedule(alone, 0)], cluster)
        return perf_counter() - start

    loops: list[tuple[int, float]] = []
    run = engine.run

    def timed(program):
        start = perf_counter()
        state = run(program)
        loops.append((program.rank.size, perf_counter() - start))
        return state

    choices, ring = parse_choices(strategy), parse_choices("ring")
    layout = SequenceLayout("zigzag" if causal else "contiguous", tokens, ranks)
    shape = AttentionShape(1, 32, 8, 128, "bfloat16")
    problem = AttentionProblem(shape, layout, (ranks // 8, 8), choices, choices, causal)
    cluster = find_cluster("dgx-h100-pod")
    loading = load()
    engine.run = timed
    writing = simulating = 0.0
    layer = 0.0
    for write in (forward_schedule, backward_schedule):
        start = perf_counter()
        schedules, symmetry = fold(partial(write, problem), problem.mesh)
        middle = perf_counter()
        layer += simulate(schedules, cluster, symmetry=symmetry).seconds
        writing, simulating = writing + middle - start, simulating + perf_counter() - middle
    steps, looping = sum(n for n, _ in loops), sum(t for _, t in loops)
    return {
        "load_seconds": loading, "write_seconds": writing, "simulate_seconds": simulating,
        "seconds": loading + writing + simulating, "steps": steps,
        "loop_steps_per_second": steps / looping, "simulated_steps_per_second": steps / simulating,
        "steps_per_second": steps / (loading + writing + simulating), "layer_seconds": layer,
    }  # fmt: skip


def _run(case: tuple[str, bool], ranks: int, tokens: int) -> dict:
    """What a new process measures."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    command += ["--ranks", str(ranks), "--tokens", str(tokens)]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, default=1024, help="a multiple of 8, at most 1,024")
    parser.add_argument("--tokens", type=int, default=1 << 20)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--case", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.case:
        strategy, causal = json.loads(arguments.case)
        print(json.dumps(measure(strategy, causal, arguments.ranks, arguments.tokens)))
        return
    rows: dict[str, list[dict]] = {}
    _run(CASES[0], 8, 8192)  # compiles the loop if no earlier run did
    for round_ in range(arguments.rounds):
        for strategy, causal in CASES:
            print(f"round {round_ + 1}: {strategy}", end="\r", file=sys.stderr, flush=True)
            made = _run((strategy, causal), arguments.ranks, arguments.tokens)
            rows.setdefault(f"{strategy}, {'causal' if causal else 'no mask'}", []).append(made)
    heads = ("load", "write", "simulate", "all: median (range)", "steps", "loop/s", "simulate/s", "all/s")
    print(
        f"{'strategy':26} "
        + " ".join(f"{head:>{n}}" for head, n in zip(heads, (6, 7, 9, 24, 9, 9, 10, 8), strict=True))
    )
    for name, runs in rows.items():
        middle = {key: median(run[key] for run in runs) for key in runs[0]}
        both = [run["seconds"] for run in runs]
        spread = f"{middle['seconds']:.2f} s ({min(both):.2f}-{max(both):.2f})"
        print(
            f"{name:26} {middle['load_seconds']:4.2f} s {middle['write_seconds']:5.2f} s "
            f"{middle['simulate_seconds']:7.2f} s {spread:>24} {middle['steps']:9,.0f} "
            f"{middle['loop_steps_per_second']:9,.0f} {middle['simulated_steps_per_second']:10,.0f} "
            f"{middle['steps_per_second']:8,.0f}"
        )
    if arguments.output:
        about = {"machine": platform.processor() or platform.machine(), "python": platform.python_version()}
        arguments.output.write_text(
            json.dumps({**about, "ranks": arguments.ranks, "rows": rows}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
