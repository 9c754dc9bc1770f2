"""FlashAttention-2 (arXiv 2307.08691): blocks that merge exactly, its FLOPs, and training on 8 A100 from kernel rates.

S queries, T keys, H heads of D; L = logsumexp of a row. Blocks are computed by the kernels that strategies run.
"""

from __future__ import annotations

import random
from functools import lru_cache
from importlib.util import find_spec
from itertools import pairwise

import torch
from torch import Tensor

from counterpoint.kernels import blocks, plain, triton_attention
from counterpoint.kernels.attention import Attend, AttendBackward
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.mask import AttentionMask, one_document
from counterpoint.reproductions import gpt
from counterpoint.reproductions.check import EXACTLY, Check, Reproduction, Tolerance

SPLIT = Tolerance(absolute=1e-6, side="at most")
TOKENS = 600
MASKS = {
    "no mask": AttentionMask(False),
    "causal": AttentionMask(),
    "causal, window 150": AttentionMask(window=150),
    "causal, documents of 70, 330 and 200": AttentionMask(documents=(70, 330, 200)),
}
HEADS = {"8 heads over 8": 8, "8 heads over 2": 2, "8 heads over 1": 1}


# ---- exactness -----------------------------------------------------------------------------------
def _tensors(tokens: int, kv_heads: int, dim: int = 32, heads: int = 8) -> list[Tensor]:
    source = torch.Generator().manual_seed(0)
    return [torch.randn(1, tokens, n, dim, generator=source) for n in (heads, kv_heads, kv_heads, heads)]


def _whole(q: Tensor, k: Tensor, v: Tensor, dout: Tensor, mask: AttentionMask) -> list[Tensor]:
    """out, lse, dq, dk, dv by materialised scores in float64."""
    tokens = one_document(q.shape[1])
    seen = torch.zeros(q.shape[1], q.shape[1], dtype=torch.bool)
    for a in mask.areas(tokens, tokens):
        block = torch.ones(a.rows, a.columns, dtype=torch.bool)
        block = block if a.hi is None else block.tril(a.hi)
        seen[a.q_start : a.q_stop, a.k_start : a.k_stop] |= block if a.lo is None else block.triu(a.lo)
    bias = torch.zeros(seen.shape, dtype=torch.float64).masked_fill_(~seen, -torch.inf)
    q, k, v, dout = (x.double().transpose(1, 2) for x in (q, k, v, dout))
    scale = float(q.shape[3] ** -0.5)
    out, lse = plain.forward(q, k, v, False, bias, scale)
    grads = plain.backward(dout, q, k, v, out, lse, False, bias, scale)
    return [x.transpose(1, 2) for x in (out, lse, *grads)]


def _difference(got: list[Tensor], expected: list[Tensor]) -> float:
    """The worst of the five, relative to its norm."""
    pairs = zip(got, expected, strict=True)
    return max(float((a.double() - b).norm() / b.norm()) for a, b in pairs)


def _cuts(source: random.Random, tokens: int, parts: int) -> list[tuple[int, int]]:
    borders = [0, *sorted(source.sample(range(1, tokens), parts - 1)), tokens]
    return list(pairwise(borders))


def blockwise(mask: AttentionMask, kv_heads: int, seed: int = 0, parts: int = 4) -> float:
    """Queries and keys cut anywhere: blocks merged forward, their gradients added backward, against the whole."""
    q, k, v, dout = _tensors(TOKENS, kv_heads)
    source, tokens = random.Random(seed), one_document(TOKENS)
    rows, columns = (_cuts(source, TOKENS, parts) for _ in range(2))
    out, lse = torch.zeros_like(q), torch.full(q.shape[:3], -torch.inf)
    dq, dk, dv = (torch.zeros_like(x) for x in (q, k, v))
    grid = [
        (slice(*r), slice(*c), areas)
        for r in rows
        for c in columns
        if (areas := mask.areas(tokens.pick([r]), tokens.pick([c])))
    ]
    source.shuffle(grid)
    for r, c, areas in grid:
        blocks.merge(out[:, r], lse[:, r], *blocks.attend(q[:, r], k[:, c], v[:, c], areas))
    for r, c, areas in grid:
        args = (dout[:, r], q[:, r], k[:, c], v[:, c], out[:, r], lse[:, r], areas)
        for total, place, grad in zip((dq, dk, dv), (r, c, c), blocks.attend_backward(*args), strict=True):
            total[:, place] += grad
    return _difference([out, lse, dq, dk, dv], _whole(q, k, v, dout, mask))


def interpreted(kv_heads: int, mask: AttentionMask) -> float:
    """The Triton kernels, in Triton's interpreter, against the whole. Runs in a process of the interpreter."""
    q, k, v, dout = _tensors(44, kv_heads, 16, 2)
    tiles = triton_attention.Tiles(32, 16)
    plan = triton_attention.Plan(tiles, tiles, triton_attention.Tiles(16, 32))
    areas, scale = mask.areas(one_document(44), one_document(44)), 0.25
    out, lse = triton_attention.forward(q, k, v, areas, scale, plan)
    grads = triton_attention.backward(dout, q, k, v, out, lse, areas, scale, plan)
    return _difference([out, lse, *grads], _whole(q, k, v, dout, mask))


INTERPRETED = {
    "causal, 2 heads over 1": (1, AttentionMask()),
    "causal, window 9, documents of 15 and 29": (2, AttentionMask(window=9, documents=(15, 29))),
}


@lru_cache(maxsize=1)
def _all_interpreted() -> dict[str, float]:
    from counterpoint.kernels.interpreter import interpreter

    with interpreter() as pool:
        found = {name: pool.submit(interpreted, *case) for name, case in INTERPRETED.items()}
        return {name: result.result() for name, result in found.items()}


def exact_checks() -> list[Check]:
    cases = [(m, h) for m in MASKS for h in HEADS if h == "8 heads over 2" or m == "causal"]
    checks = [
        Check(
            f"4 x 4 blocks cut anywhere, {m}, {h}: out, L, dQ, dK, dV", 0.0, "", "section 3.1", "exact", SPLIT,
            lambda bench, m=m, h=h: blockwise(MASKS[m], HEADS[h]),
        )
        for m, h in cases
    ]  # fmt: skip
    checks.append(
        Check(
            "12 random partitions into 1 to 7 blocks a side, causal: the worst", 0.0, "", "section 3.1", "exact",
            SPLIT, lambda bench: max(blockwise(MASKS["causal"], 2, n, 1 + n % 7) for n in range(12)),
        )
    )  # fmt: skip
    if find_spec("triton") is not None:
        checks += [
            Check(
                f"Triton kernels in the interpreter, {name}: out, L, dQ, dK, dV", 0.0, "", "algorithms 1 and 2",
                "exact", SPLIT, lambda bench, name=name: _all_interpreted()[name],
            )
            for name in INTERPRETED
        ]  # fmt: skip
    return checks


# ---- work ----------------------------------------------------------------------------------------
def _specs(tokens: int) -> tuple[TensorSpec, TensorSpec]:
    return TensorSpec((1, tokens, 16, 128), "bfloat16"), TensorSpec((1, tokens, 16), "float32")


def _forward_work(tokens: int, causal: bool = True):
    areas = AttentionMask(causal).areas(one_document(tokens), one_document(tokens))
    x, _ = _specs(tokens)
    return Attend(areas, 0.1).work(x, x, x)


def _backward_work(tokens: int):
    areas = AttentionMask().areas(one_document(tokens), one_document(tokens))
    x, row = _specs(tokens)
    return AttendBackward(areas, 0.1).work(x, x, row, row, x, x)


def work_checks() -> list[Check]:
    full = 4 * 8192**2 * 128 * 16
    return [
        Check(
            "FLOPs forward, no mask, S = 8,192: 4 S^2 D H", float(full), "FLOPs", "section 4.1", "bytes", EXACTLY,
            lambda bench: _forward_work(8192, False).flops,
        ),
        Check(
            "FLOPs forward, causal, over no mask: 1/2", 0.5, "x", "section 4.1", "bytes", Tolerance(relative=1e-3),
            lambda bench: _forward_work(8192).flops / full, "counted pair by pair: the diagonal is seen",
        ),
        Check(
            "FLOPs backward over forward: 5 products for 2", 2.5, "x", "section 4.1", "bytes", EXACTLY,
            lambda bench: _backward_work(8192).flops / _forward_work(8192).flops,
        ),
        Check(
            "bytes read and written when S doubles: linear", 2.0, "x", "section 3.1", "bytes", EXACTLY,
            lambda bench: _forward_work(16384).nbytes / _forward_work(8192).nbytes,
        ),
    ]  # fmt: skip


# ---- training, from rates of kernels ---------------------------------------------------------------
ROUGHLY = Tolerance(relative=0.15)


def training_checks() -> list[Check]:
    """Rates with FlashAttention-2, and how much faster it is. What others attain is assumed in part, and reported."""
    checks = []
    for run, row in gpt.PUBLISHED.items():
        label = f"{run.name}, {run.tokens // 1024}k tokens, 8x A100"
        for kernel, claimed in row.items():
            tolerance = ROUGHLY if kernel == "FlashAttention-2" else None
            checks.append(
                Check(
                    f"{label}, {kernel}: TFLOP/s per GPU", claimed, "TFLOP/s", "table 1", "simulated", tolerance,
                    lambda bench, run=run, kernel=kernel: gpt.teraflops(run, kernel), gpt.NOTES[kernel],
                )
            )  # fmt: skip
        for other in gpt.OTHERS:
            checks.append(
                Check(
                    f"{label}: FlashAttention-2 over {other}", round(row["FlashAttention-2"] / row[other], 3), "x",
                    "table 1", "simulated", ROUGHLY if other == "FlashAttention" else None,
                    lambda bench, run=run, other=other: gpt.faster(run, other), gpt.NOTES[other],
                )
            )  # fmt: skip
    return checks


# ---- a GPU, where there is one ---------------------------------------------------------------------
def gpu_checks() -> list[Check]:
    """On this machine's GPU; none without one. The Triton kernels' part of the fastest kernel, and its rate."""
    if not torch.cuda.is_available():
        return []
    checks = []
    for which, share, rate in (("forward", 0.6, 306.0), ("backward", 0.5, 166.0)):
        checks += [
            Check(
                f"causal, S = 8,192, 16 heads of 128, bfloat16: Triton's rate over the fastest kernel's, {which}",
                share, "x", "aim of this project, on an H200", "measured", Tolerance(side="at least"),
                lambda bench, which=which: _on_gpu()[which, "triton"],
            ),
            Check(
                f"causal, S = 8,192, 16 heads of 128, bfloat16: the fastest kernel, {which}", rate, "TFLOP/s",
                "an H100, from the kernels' repository", "measured", None,
                lambda bench, which=which: _on_gpu()[which, "best"],
                "FlashAttention-2 on an H100 is the claim; this machine's GPU may be another",
            ),
        ]  # fmt: skip
    return checks


@lru_cache(maxsize=1)
def _on_gpu() -> dict[tuple[str, str], float]:
    from counterpoint.calibration.attention import MaskKind, compare
    from counterpoint.kernels.backends import Problem, table

    problem = Problem("cuda", torch.bfloat16, 16, 16, 128, "causal", 1, 1, 8192)
    chosen = [b for b in table() if b.device == "cuda" and not b.compiles]
    timed = compare(problem, [8192], ["forward", "backward"], chosen, mask=MaskKind()).timed
    found: dict[tuple[str, str], float] = {}
    for t in timed:
        rate = t.flops_per_second / 1e12
        found[t.pass_, "best"] = max(found.get((t.pass_, "best"), 0.0), rate)
        if t.backend.startswith("triton"):
            found[t.pass_, "triton"] = max(found.get((t.pass_, "triton"), 0.0), t.of_best)
    return found


REMARKS = tuple(
    text
    for needed, text in (
        (find_spec("triton") is None, "not run here: the Triton kernels, since triton is not installed"),
        (
            not torch.cuda.is_available(),
            "not run here: rates on a GPU (Triton at least 60 % of the fastest kernel forward, 50 % backward, on an "
            "H200; 306 and 166 TFLOP/s on an H100), since this machine has none",
        ),
    )
    if needed
)

REPRODUCTION = Reproduction(
    "flashattention-2",
    "blocks cut anywhere merge to plain attention, forward and backward; the Triton kernels; FLOPs and bytes; "
    "training of GPT on 8x A100 from rates of attention kernels and matrix products",
    (*exact_checks(), *work_checks(), *training_checks(), *gpu_checks()),
    REMARKS,
)
