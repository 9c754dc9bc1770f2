"""Sequence-parallel attention on this machine's CPU, as a share of the ideal, next to peers. Ratios from one run.

    python benchmarks/attention.py                 # 2 processes of 1 thread, 16,384 tokens, 8 heads of 64, causal
    python benchmarks/attention.py --tokens 4096 --rounds 3 --methods tokenring ring peer:torch

Ideal: each process does the same amount of work with torch's own attention kernel and no communication (all
tokens, its share of the heads). Every round runs all methods one after the other (A B C A B C ...), so a noisy
machine slows all of them; "+timeline" records one. Reported are the median and the range of the ratio to the
ideal of the same round.

Peers, each on its best terms (causal, balanced): "peer:torch", torch's private templated ring attention around the
CPU flash kernels, zigzag shards; "peer:rap", the package ring-attention-pytorch, striped shards (pip install
ring-attention-pytorch to include it).
"""

from __future__ import annotations

import argparse
import json
import platform
import socket
import statistics
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch.distributed.device_mesh import init_device_mesh

from counterpoint import SequenceLayout, Timeline, attention

OURS = ("tokenring", "tokenring+timeline", "ring", "bidirectional_ring", "allgather", "ulysses")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--tokens", type=int, default=16384)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--kv-heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=64)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--methods", nargs="+", default=[*OURS, "peer:torch", "peer:rap"])
    parser.add_argument("--forward-only", action="store_true")
    parser.add_argument("--output", type=Path, help="also write the figures to this JSON file")
    args = parser.parse_args()
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, (args, port), nprocs=args.processes)


def worker(rank: int, args: argparse.Namespace, port: int) -> None:
    torch.set_num_threads(1)
    address = f"tcp://127.0.0.1:{port}"
    dist.init_process_group("gloo", init_method=address, rank=rank, world_size=args.processes)
    torch.manual_seed(rank)
    methods = {"ideal": ideal(args)}
    for name in args.methods:
        try:
            methods[name] = {"peer:torch": peer_torch, "peer:rap": peer_rap}.get(name, ours)(args, rank, name)
        except ImportError as error:
            if rank == 0:
                print(f"{name} left out: {error}")
    passes = ["forward"] if args.forward_only else ["forward", "forward+backward"]
    seconds: dict[tuple[str, str], list[float]] = {(p, m): [] for p in passes for m in methods}
    for round_ in range(-1, args.rounds):  # the first round warms up
        for p in passes:
            for name, run in methods.items():
                seconds[p, name] += [timed(run, p)] if round_ >= 0 else []
                if round_ < 0:
                    timed(run, p)
        if rank == 0 and round_ >= 0:
            print(f"round {round_ + 1} of {args.rounds}", flush=True)
    if rank == 0:
        report(args, passes, list(methods), seconds)
    dist.destroy_process_group()


def timed(run: Callable[[bool], None], which: str) -> float:
    """Seconds from a common start until the last process is done."""
    dist.barrier()
    started = time.perf_counter()
    run(which != "forward")
    took = torch.tensor(time.perf_counter() - started)
    dist.all_reduce(took, dist.ReduceOp.MAX)
    return float(took)


def report(args: argparse.Namespace, passes: list[str], names: list[str], seconds) -> None:
    rows = []
    print(
        f"\n{args.tokens} tokens, {args.heads}/{args.kv_heads} heads of {args.head_dim}, {args.processes} processes"
    )
    for p in passes:
        print(f"\n{p:22}{'seconds':>10}{'share of ideal':>16}{'range':>18}")
        for name in names:
            ratios = [i / s for i, s in zip(seconds[p, "ideal"], seconds[p, name], strict=True)]
            middle = statistics.median(ratios)
            took = statistics.median(seconds[p, name])
            print(f"{name:22}{took:10.3f}{middle:16.1%}{min(ratios):11.1%} - {max(ratios):.1%}")
            rows.append({"pass": p, "method": name, "seconds": seconds[p, name], "share_of_ideal": middle})
    if args.output:
        settings = {k: v for k, v in vars(args).items() if k not in ("output", "methods")}
        machine = (
            f"{platform.machine()}, {torch.get_num_threads()} thread per process, torch {torch.__version__}"
        )
        args.output.write_text(
            json.dumps(
                {"date": str(date.today()), "machine": machine, "settings": settings, "rows": rows}, indent=1
            )
        )
        print(f"\nwritten to {args.output}")


# ---- methods: each returns run(backward: bool) -----------------------------------------------------
def shard(args: argparse.Namespace, heads: int, tokens: int) -> list[torch.Tensor]:
    """q, k, v, dout of one process: (1, heads, tokens, head_dim), memory ordered as after a projection."""
    kv = max(1, heads * args.kv_heads // args.heads)
    return [
        torch.randn(1, tokens, h, args.head_dim).transpose(1, 2).requires_grad_(i < 3)
        for i, h in enumerate((heads, kv, kv, heads))
    ]


def with_backward(q, k, v, dout, call: Callable[[], torch.Tensor]) -> Callable[[bool], None]:
    def run(backward: bool) -> None:
        if backward:
            q.grad = k.grad = v.grad = None
            call().backward(dout)
        else:
            with torch.no_grad():
                call()

    return run


def ideal(args: argparse.Namespace) -> Callable[[bool], None]:
    q, k, v, dout = shard(args, args.heads // args.processes, args.tokens)
    sdpa = torch.nn.functional.scaled_dot_product_attention
    return with_backward(
        q, k, v, dout, lambda: sdpa(q, k, v, is_causal=True, enable_gqa=k.shape[1] != q.shape[1])
    )


def ours(args: argparse.Namespace, rank: int, name: str) -> Callable[[bool], None]:
    mesh = init_device_mesh("cpu", (args.processes,))
    layout = SequenceLayout("zigzag", args.tokens, args.processes)
    q, k, v, dout = shard(args, args.heads, layout.local_tokens(rank))
    strategy, _, recorded = name.partition("+")

    def call() -> torch.Tensor:
        timeline = Timeline() if recorded else None
        return attention(q, k, v, mesh=mesh, layout=layout, forward=strategy, timeline=timeline)

    return with_backward(q, k, v, dout, call)


def peer_torch(args: argparse.Namespace, rank: int, name: str) -> Callable[[bool], None]:
    from torch.distributed.tensor.experimental import _context_parallel
    from torch.distributed.tensor.experimental._context_parallel import _attention as peer

    del _context_parallel
    if args.heads != args.kv_heads:
        raise ImportError("the CPU path of torch's ring attention was set up for equal head counts")
    peer._cp_options.enable_load_balance = True
    q, k, v, dout = shard(args, args.heads, args.tokens // args.processes)
    flash = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    flash_backward = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    group = dist.group.WORLD

    def forward_op(q, k, v, is_causal, **_):
        return flash(q, k, v, 0.0, is_causal)

    def backward_op(grad_out, query, key, value, out, logsumexp, is_causal, **_):
        return flash_backward(grad_out, query, key, value, out, logsumexp, 0.0, is_causal)

    def run(backward: bool) -> None:
        with torch.no_grad():
            out, lse = peer._templated_ring_attention(group, 2, forward_op, q, k, v, is_causal=True)[:2]
            if backward:
                peer._templated_ring_attention_backward(
                    group, 2, backward_op, dout, "grad_out", q, k, v, out, lse, is_causal=True
                )

    return run


def peer_rap(args: argparse.Namespace, rank: int, name: str) -> Callable[[bool], None]:
    from ring_attention_pytorch import ring_flash_attn

    q, k, v, dout = (
        x.detach().transpose(1, 2).contiguous()
        for x in shard(args, args.heads, args.tokens // args.processes)
    )
    for x in (q, k, v):
        x.requires_grad_()

    def call() -> torch.Tensor:
        return ring_flash_attn(
            q, k, v, causal=True, bucket_size=1024, ring_reduce_col=True, striped_ring_attn=True,
            ring_size=args.processes,
        )  # fmt: skip

    return with_backward(q, k, v, dout, call)


if __name__ == "__main__":
    main()
