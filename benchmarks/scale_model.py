"""Measured on scale models against simulated, over a sweep of problems and topologies. Needs root and Linux.

    python benchmarks/scale_model.py                           # 24 configurations, compute timed
    python benchmarks/scale_model.py --real                    # 2 ranks, kernels compute, results checked
    python benchmarks/scale_model.py --seed 7                  # other sizes, drawn from that seed
    python benchmarks/scale_model.py --cluster mine.yaml --ranks 3 4 --sizes 8000 64000 --output figures.json

A configuration is a number of ranks, a number of key/value heads, a topology (a link for every pair, one port per
device that all its traffic shares, or a cluster of your own) and a length in tokens, from communication-bound to
compute-bound. Every strategy runs on it, and what `plan attention` chooses. Printed are the error of every run with
its spread, their median and 90th percentile, and how often the choice measures within 5 % of the best.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import date
from math import exp, log
from pathlib import Path

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import find_cluster
from counterpoint.emulation.emulate import emulate, emulate_all
from counterpoint.emulation.result import LATE, to_json
from counterpoint.planner.attention import Question, plan_attention
from counterpoint.strategies.sequence.attention import AttentionProblem, parse_choices
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

SIZES = (9_600, 48_000)  # tokens: on these links communication-bound, and compute-bound
CLUSTER = """
name: {link}
devices:
  gpu:
    memory: {{hbm: {{size: 40 GB, bandwidth: 600 GB/s, attained: 500 GB/s}}}}
    rates: {{attention_forward: {{bfloat16: {{1 GFLOP: 30 TFLOP/s, 100 GFLOP: 90 TFLOP/s}}}},
             attention_backward: {{bfloat16: {{1 GFLOP: 20 TFLOP/s, 100 GFLOP: 65 TFLOP/s}}}}}}
    launch: 5 us
levels:
  - {{level: node, count: 4, link: {link}, bandwidth: 20 GB/s, latency: 10 us}}
"""


@dataclass(frozen=True, slots=True)
class Configuration:
    link: str
    ranks: int
    kv_heads: int
    tokens: int

    def __str__(self) -> str:
        return f"{self.ranks} ranks, {self.kv_heads:2} kv heads, {self.link}, {self.tokens:6} tokens"


def main() -> None:
    args = parse_arguments()
    compute = "real" if args.real else "timed"
    clusters = (
        [find_cluster(args.cluster)]
        if args.cluster
        else [parse_cluster(CLUSTER.format(link=link), link) for link in args.links]
    )
    found, errors, calm, spreads, late, chosen_well, sweep = [], [], [], [], [], [], []
    for cluster, ranks in ((c, n) for c in clusters for n in args.ranks):
        configurations = [
            Configuration(cluster.name, ranks, kv_heads, size)
            for kv_heads in args.kv_heads
            for size in sizes_of(args, cluster, ranks, kv_heads)
        ]
        sweep += configurations
        for configuration, chosen, runs in measure(cluster, configurations, args):
            parts, times = [], {}
            for run in runs:
                name = name_of(run.target, args)
                seconds = sum(p.seconds for p in run.passes)
                simulated = sum(p.simulated for p in run.passes)
                late.append(max(x for p in run.passes for x in p.late))
                spread = sum(max(p.measured) - min(p.measured) for p in run.passes) / seconds
                errors += [abs(p.error) for p in run.passes]
                calm += [abs(p.error) for p in run.passes if max(p.late) <= LATE]
                spreads.append(spread)
                times[name] = seconds / run.scale.slowdown
                parts.append(
                    f"{name} {1e3 * times[name]:.2f} ms ({seconds / simulated - 1:+.1%}, spread {spread:.1%}, "
                    f"kernels late {late[-1]:.1%})"
                )
                found.append({"link": cluster.name, "kv_heads": configuration.kv_heads, **to_json(run)})
            chosen_well.append(times[chosen] <= 1.05 * min(times.values()))
            print(f"{configuration}, planned {chosen}: {'; '.join(parts)}", flush=True)
    calm = calm or errors
    summary = {
        "compute": compute,
        "configurations": len(sweep),
        "runs": len(errors),
        "repetitions": args.repetitions,
        "median_error": statistics.median(errors),
        "percentile_90_error": statistics.quantiles(errors, n=10)[-1] if len(errors) > 1 else errors[0],
        "largest_error": max(errors),
        "undisturbed_runs": len(calm),
        "undisturbed_median_error": statistics.median(calm),
        "undisturbed_percentile_90_error": statistics.quantiles(calm, n=10)[-1] if len(calm) > 1 else calm[0],
        "median_spread": statistics.median(spreads),
        "largest_spread": max(spreads),
        "median_kernels_late": statistics.median(late),
        "largest_kernels_late": max(late),
        "chosen_within_5_percent": sum(chosen_well),
    }
    print(
        f"{len(errors)} runs of {len(sweep)} configurations, compute {compute}: median error "
        f"{summary['median_error']:.1%}, 90th percentile {summary['percentile_90_error']:.1%}, largest "
        f"{max(errors):.1%}; spread of {args.repetitions} repetitions: median {summary['median_spread']:.1%}, largest "
        f"{max(spreads):.1%}; kernels that took longer than they should cost up to {max(late):.1%} of a pass "
        f"(median {statistics.median(late):.1%}), which shows what other programs on this machine did"
    )
    print(
        f"of the {len(calm)} runs in which that is at most {LATE:.0%}: median error "
        f"{summary['undisturbed_median_error']:.1%}, 90th percentile {summary['undisturbed_percentile_90_error']:.1%}"
    )
    print(
        f"the strategy that plan attention chooses is within 5 % of the best measured in {sum(chosen_well)} "
        f"of {len(sweep)}"
    )
    if args.output:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        args.output.write_text(json.dumps({**machine, **summary, "results": found}, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--real", action="store_true", help="kernels compute; as many ranks as cores (default 2)"
    )
    parser.add_argument("--ranks", type=int, nargs="+", help="default 2 3 4, or 2 with --real")
    parser.add_argument("--kv-heads", type=int, nargs="+", default=[32, 8])
    parser.add_argument("--heads", type=int, default=32)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--links", nargs="+", choices=("mesh", "switch"), default=["mesh", "switch"])
    parser.add_argument("--cluster", help="a preset or a YAML file instead of --links")
    parser.add_argument(
        "--sizes", "--tokens", type=int, nargs="+", help=f"tokens, default {' '.join(map(str, SIZES))}"
    )
    parser.add_argument(
        "--seed", type=int, help="draw two sizes for every configuration instead, 6,000 to 64,000 tokens"
    )
    parser.add_argument("--strategies", nargs="+", default=["ring", "tokenring"])
    parser.add_argument("--passes", nargs="+", choices=("forward", "backward"), default=["forward"])
    parser.add_argument("--repetitions", type=int, default=3)
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    args.ranks = args.ranks or ([2] if args.real else [2, 3, 4])
    return args


def sizes_of(args: argparse.Namespace, cluster: Cluster, ranks: int, kv_heads: int) -> Sequence[int]:
    if args.seed is None:
        return args.sizes or SIZES
    draw = random.Random(f"{args.seed} {cluster.name} {ranks} {kv_heads}")
    return sorted(round(exp(draw.uniform(log(6e3), log(64e3)))) for _ in range(2))


def name_of(problem: AttentionProblem, args: argparse.Namespace) -> str:
    names = ["/".join(map(str, getattr(problem, which))) for which in args.passes]
    return " and ".join(dict.fromkeys(names))


def measure(cluster: Cluster, configurations: Sequence[Configuration], args: argparse.Namespace):
    """(configuration, name of what the planner chooses, runs of all strategies) for configurations of as many ranks."""
    rows = []
    for c in configurations:
        shape = AttentionShape(1, args.heads, c.kv_heads, args.head_dim, "bfloat16")
        layout = SequenceLayout("zigzag", c.tokens, c.ranks)
        question = Question(
            shape, cluster.subset(c.ranks), c.ranks, c.tokens, phase="train" if "backward" in args.passes else "prefill"
        )  # fmt: skip
        best = plan_attention(question).answers[0]
        wanted: list[tuple] = [((c.ranks,), s, s) for s in args.strategies]
        wanted.append((best.mesh, best.forward.strategies, (best.backward or best.forward).strategies))
        problems = [
            AttentionProblem(shape, layout, mesh, parse_choices(forward), parse_choices(backward))
            for mesh, forward, backward in wanted
        ]
        rows.append(
            (c, name_of(problems[-1], args), {name_of(problem, args): problem for problem in problems})
        )
    given: dict = {"passes": tuple(args.passes), "repetitions": args.repetitions, "environ": os.environ}
    if args.real:
        for c, chosen, problems in rows:
            yield c, chosen, [emulate(cluster, p, compute="real", **given) for p in problems.values()]
        return
    runs = iter(emulate_all(cluster, [p for _, _, problems in rows for p in problems.values()], **given))
    for c, chosen, problems in rows:
        yield c, chosen, [next(runs) for _ in problems]


if __name__ == "__main__":
    main()
