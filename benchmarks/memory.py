"""The longest context that a memory policy can train in so much memory, measured from outside as peak resident size.

    python benchmarks/memory.py                          # Llama of 110M parameters, 4 GiB, five policies
    python benchmarks/memory.py --hidden 1024 --layers 6 --heads 16 --kv-heads 4 --limit-gib 4
    python benchmarks/memory.py --policies recompute:null stream(16):256 --confirm

Each measurement is a process of its own that takes one training step (forward, backward, AdamW) on one sequence, all
in float32; its parent reads its peak resident size from the kernel (ru_maxrss), so everything counts: weights,
gradients, both moments of the optimizer, Python and torch. A policy is LAYERS:HEAD_TOKENS, null for all logits at
once. "recompute:null" is per-layer recomputation, the baseline of StreamBP (arXiv 2506.03077).

Peak memory is a line over the number of tokens once activations outweigh the optimizer's step: it is measured at
lengths that fit, and the longest context follows from the line through the last two. --times 3 then trains at so
many times the baseline's longest context and shows whether that fits; --confirm trains at the context found for
every policy (slow: attention is quadratic).

The allocator is told to give blocks of 1 MiB and more back at once, for every policy alike (--malloc default leaves
glibc as it is, which keeps some freed blocks).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from datetime import date
from pathlib import Path

BASELINE = "recompute:null"
POLICIES = ["keep:null", BASELINE, "recompute:256", "stream(8):256", "stream(32):256"]
RETURNING = {"MALLOC_MMAP_THRESHOLD_": str(1 << 20), "MALLOC_TRIM_THRESHOLD_": str(1 << 20)}


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--hidden", type=int, default=768)
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--heads", type=int, default=12)
    parser.add_argument("--kv-heads", type=int, default=4)
    parser.add_argument("--inner", type=int, default=0, help="feed-forward size; 0: 8/3 of hidden")
    parser.add_argument("--vocabulary", type=int, default=32000)
    parser.add_argument(
        "--documents",
        type=int,
        default=0,
        help="pack documents of so many tokens: the same memory, less time",
    )
    parser.add_argument("--limit-gib", type=float, default=4.0)
    parser.add_argument("--policies", nargs="+", default=POLICIES)
    parser.add_argument("--lengths", type=int, nargs="+", default=[2048, 4096])
    parser.add_argument(
        "--times", type=float, default=3.0, help="train at so many times the baseline; 0: not"
    )
    parser.add_argument("--confirm", action="store_true", help="train at the longest context of each policy")
    parser.add_argument("--malloc", choices=["returning", "default"], default="returning")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--output", type=Path, help="write the results as JSON")
    parser.add_argument("--child", nargs=2, metavar=("POLICY", "TOKENS"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        step(args, args.child[0], int(args.child[1]))
        return

    limit = int(args.limit_gib * (1 << 30))
    print(f"{parameters(args) / 1e6:.0f}M parameters, limit {args.limit_gib:g} GiB; peak resident MiB")
    print(f"{'policy':>16} " + " ".join(f"{n:>7,}" for n in args.lengths) + "   KiB/token   longest context")
    rows = [measured(args, policy, limit) for policy in args.policies]
    base = next((row["longest"] for row in rows if row["policy"] == BASELINE), None)
    if base:
        for row in rows:
            row["times"] = round(row["longest"] / base, 2)
        print("\n" + "  ".join(f"{row['policy']} {row['times']:.2f}x" for row in rows))
    if base and args.times:
        train_at(args, rows[-1], int(args.times * base), limit)
    if args.confirm:
        for row in rows:
            train_at(args, row, int(row["longest"] * 0.98), limit)
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "child")}
        machine = f"{platform.machine()}, {os.cpu_count()} cores, glibc {platform.libc_ver()[1]}"
        result = {"date": str(date.today()), "machine": machine, "settings": settings, "rows": rows}
        args.output.write_text(json.dumps(result, indent=1) + "\n")
        print(f"written to {args.output}")


def measured(args: argparse.Namespace, policy: str, limit: int) -> dict:
    """Peaks at the lengths that fit, and the longest context on the line through the last two."""
    peaks: list[tuple[int, int]] = []
    print(f"{policy:>16}", end="", flush=True)
    for tokens in args.lengths:
        peaks.append((tokens, peak_bytes(args, policy, tokens)[0]))
        print(f" {peaks[-1][1] / 2**20:7,.0f}", end="", flush=True)
    (a, low), (b, high) = peaks[-2:]
    slope = (high - low) / (b - a)
    longest = int(b + (limit - high) / slope)
    print(f"   {slope / 1024:9.1f}   {longest:15,}", flush=True)
    return {"policy": policy, "peaks": peaks, "bytes_per_token": round(slope), "longest": longest}


def train_at(args: argparse.Namespace, row: dict, tokens: int, limit: int) -> None:
    peak, seconds = peak_bytes(args, row["policy"], tokens)
    fits = "fits" if peak <= limit else "does not fit"
    print(f"{row['policy']} trained at {tokens:,} tokens: {peak / 2**20:,.0f} MiB, {fits} ({seconds:.0f} s)")
    row.setdefault("trained", []).append({"tokens": tokens, "peak": peak, "fits": peak <= limit})


def peak_bytes(args: argparse.Namespace, policy: str, tokens: int) -> tuple[int, float]:
    """Peak resident bytes of a process that takes one step, and its seconds."""
    shape = ["hidden", "layers", "heads", "kv-heads", "inner", "vocabulary", "threads", "documents"]
    options = [f"--{name}={getattr(args, name.replace('-', '_'))}" for name in shape]
    env = {**os.environ, **(RETURNING if args.malloc == "returning" else {})}
    began = time.perf_counter()
    process = subprocess.Popen([sys.executable, __file__, *options, "--child", policy, str(tokens)], env=env)
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"{policy} at {tokens:,} tokens: the process ended with {process.returncode}")
    return usage.ru_maxrss * 1024, time.perf_counter() - began


def config_of(args: argparse.Namespace, tokens: int = 4096):
    from counterpoint.model.config import ModelConfig

    inner = args.inner or -(-8 * args.hidden // 3 // 64) * 64
    return ModelConfig.from_dict(
        {
            "model_type": "llama",
            "vocab_size": args.vocabulary,
            "hidden_size": args.hidden,
            "intermediate_size": inner,
            "num_hidden_layers": args.layers,
            "num_attention_heads": args.heads,
            "num_key_value_heads": args.kv_heads,
            "max_position_embeddings": tokens,
            "tie_word_embeddings": True,
        }
    )


def parameters(args: argparse.Namespace) -> int:
    return config_of(args).parameters()


def step(args: argparse.Namespace, policy: str, tokens: int) -> None:
    """One step of training on one sequence, in this process."""
    from functools import partial

    import torch

    from counterpoint import SequenceLayout, attention
    from counterpoint.kernels.mask import AttentionMask
    from counterpoint.model.decoder import Decoder
    from counterpoint.model.loss import token_loss
    from counterpoint.runtime.memory.layers import layer_runs
    from counterpoint.strategies.memory.policy import MemoryPolicy, parse_layers

    torch.set_num_threads(args.threads)
    layers, _, head_tokens = policy.rpartition(":")
    memory = MemoryPolicy(parse_layers(layers), 1, None if head_tokens == "null" else int(head_tokens))
    model = Decoder(config_of(args, tokens))
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    for (
        p
    ) in model.parameters():  # as after a first step, so that its moments are there beside the activations
        moments = {name: torch.full_like(p, 1e-12) for name in ("exp_avg", "exp_avg_sq")}
        optimizer.state[p] = {"step": torch.tensor(0.0), **moments}
    whole, rest = divmod(tokens, args.documents or tokens)
    documents = (args.documents or tokens,) * whole + ((rest,) if rest else ())
    layout = SequenceLayout("contiguous", tokens, 1, documents)
    ids, labels = torch.randint(args.vocabulary, (2, 1, tokens))
    loss = model(
        ids,
        layout.position_ids(0),
        partial(attention, layout=layout),
        run=layer_runs(memory, args.layers, [AttentionMask(documents=documents)] * args.layers),
        use=lambda hidden, head: token_loss(hidden, head.weight, labels, memory.head_tokens)[0],
    )
    (loss / tokens).backward()
    optimizer.step()


if __name__ == "__main__":
    main()
