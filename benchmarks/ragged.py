"""FlexSP's plan of a long-tail batch against the best static one, on a scale model of two nodes. Needs root and Linux.

    python benchmarks/ragged.py --output benchmarks/results/ragged.json

Both plans run in turn (A B A B) with the real schedules of their groups, over sockets and rate-limited links between
namespaces. Kernels are held for the time they take on the device, so the speed of this machine plays no part.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import sys
from dataclasses import asdict
from datetime import date
from pathlib import Path

from counterpoint.reproductions.ragged_batch import RANKS, Setting, emulate_plans

DEFAULT = Setting()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--network", type=float, nargs="+", default=[DEFAULT.network], help="GB/s of a device's port"
    )
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of the lengths")
    parser.add_argument("--sequences", type=int, default=DEFAULT.sequences)
    parser.add_argument("--repetitions", type=int, default=2, help="of A B")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()

    found = []
    for network in args.network:
        for seed in args.seeds:
            setting = Setting(sequences=args.sequences, network=network, seed=seed)
            plans, result = emulate_plans(
                setting,
                os.environ,
                repetitions=args.repetitions,
                say=lambda text: print(text, file=sys.stderr),
            )
            ratio = result.ratio("static", "flexsp")
            found.append(
                {
                    "setting": asdict(setting),
                    "tokens": sum(setting.lengths),
                    "ratio": ratio,
                    "groups": {
                        name: [[len(g.ranks) for g in row.groups] for row in plan.micro_batches]
                        for name, plan in plans.items()
                    },
                    "planned_seconds": {name: plan.seconds for name, plan in plans.items()},
                    **result.to_json(),
                }
            )
            for name, m in result.plans.items():
                runs = ", ".join(f"{seconds:.2f}" for seconds in m.measured)
                print(
                    f"{network:g} GB/s, seed {seed}, {name:6}: {runs} s measured, {m.simulated:.2f} s simulated"
                )
            print(f"flexsp is {ratio:.2f} times as fast, {sum(setting.lengths):,} tokens", flush=True)
    if args.output:
        machine = {"machine": platform.machine(), "cores": os.cpu_count(), "date": date.today().isoformat()}
        figures = {**machine, "ranks": RANKS, "results": found}
        args.output.write_text(json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
