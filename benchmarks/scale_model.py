"""Measured on scale models against simulated, over a sweep of problems and topologies. Needs root and Linux.

    python benchmarks/scale_model.py                                # 24 configurations, two strategies each
    python benchmarks/scale_model.py --ranks 4 --tokens 8000 64000 --strategies ring ulysses --output figures.json

A configuration is a number of ranks, a number of key/value heads, a topology (a link for every pair, or one port per
device that all its traffic shares) and a length, from communication-bound to compute-bound. Compute is timed. Printed
are the error of every run, their median and 90th percentile, and how often the strategy that the simulator prefers
measures within 5 % of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
from datetime import date
from itertools import product
from pathlib import Path

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.load import parse_cluster
from counterpoint.emulation.emulate import emulate
from counterpoint.emulation.result import to_json
from counterpoint.strategies.sequence.attention import AttentionProblem, parse_choices
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

HEADS, HEAD_DIM = 32, 128
CLUSTER = """
name: {link}
devices:
  gpu:
    memory: {{hbm: {{size: 40 GB, bandwidth: 600 GB/s, attained: 500 GB/s}}}}
    rates: {{attention_forward: {{bfloat16: {{1 GFLOP: 30 TFLOP/s, 100 GFLOP: 90 TFLOP/s}}}}}}
    launch: 5 us
levels:
  - {{level: node, count: 4, link: {link}, bandwidth: 20 GB/s, latency: 10 us}}
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--ranks", type=int, nargs="+", default=[2, 3, 4])
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--links", nargs="+", choices=("mesh", "switch"), default=["mesh", "switch"])
    parser.add_argument("--tokens", type=int, nargs="+", default=[9_600, 48_000])
    parser.add_argument("--strategies", nargs="+", default=["ring", "tokenring"])
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward"])
    parser.add_argument("--compute", choices=("timed", "real"), default="timed")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()

    found, errors, chosen_well = [], [], []
    sweep = list(product(args.ranks, args.kv_heads, args.links, args.tokens))
    for ranks, kv_heads, link, tokens in sweep:
        cluster = parse_cluster(CLUSTER.format(link=link), link)
        times: dict[str, tuple[float, float]] = {}  # simulated and measured, on the cluster's clock
        for strategy in args.strategies:
            figures = run(cluster, strategy, ranks, kv_heads, tokens, args)
            found.append({"link": link, "kv_heads": kv_heads, **figures})
            passes = figures["passes"].values()
            errors += [abs(p["error"]) for p in passes]
            times[strategy] = (
                sum(p["cluster_simulated_seconds"] for p in passes),
                sum(p["cluster_measured_seconds"] for p in passes),
            )
        best, preferred = min(t[1] for t in times.values()), min(times.values())[1]
        chosen_well.append(preferred <= 1.05 * best)
        parts = [
            f"{s} {1e3 * measured:.2f} ms ({measured / simulated - 1:+.1%})"
            for s, (simulated, measured) in times.items()
        ]
        print(
            f"{ranks} ranks, {kv_heads:2} kv heads, {link:6} {tokens:6} tokens: {'; '.join(parts)}",
            flush=True,
        )
    tenths = statistics.quantiles(errors, n=10) if len(errors) > 1 else errors * 9
    summary = {
        "configurations": len(sweep),
        "runs": len(errors),
        "median_error": statistics.median(errors),
        "percentile_90_error": tenths[-1],
        "chosen_within_5_percent": sum(chosen_well),
    }
    print(
        f"{len(errors)} runs of {len(sweep)} configurations: median error {summary['median_error']:.1%}, "
        f"90th percentile {summary['percentile_90_error']:.1%}; the strategy that the simulator prefers is within "
        f"5 % of the best measured in {sum(chosen_well)} of {len(sweep)}"
    )
    if args.output:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        args.output.write_text(json.dumps({**machine, **summary, "results": found}, indent=1) + "\n")


def run(cluster: Cluster, strategy: str, ranks: int, kv_heads: int, tokens: int, args) -> dict:
    choices = parse_choices(strategy)
    problem = AttentionProblem(
        AttentionShape(1, HEADS, kv_heads, HEAD_DIM, "bfloat16"),
        SequenceLayout("zigzag", tokens, ranks),
        (ranks,),
        choices,
        choices,
    )
    result = emulate(
        cluster,
        problem,
        passes=tuple(args.passes),
        compute=args.compute,
        repetitions=args.repetitions,
        environ=os.environ,
    )
    return to_json(result)


if __name__ == "__main__":
    main()
