"""Attention over any areas of a block with the kernels of `triton_kernels`, forward and backward, in one launch each.

Triton is imported at the first call; on a CPU it runs in Triton's interpreter (see `interpreter`). Shapes as in
`kernels.blocks`. Nothing here rounds partial results: the statistics, and gradients, are float32.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.kernels.mask import Area

Precision = Literal["ieee", "tf32", "tf32x3"]
_FAR = 2**29  # a limit that no token reaches
MOST_PLANS, ATOMIC = 5, 1  # how many `plans` there are at most, and which of them adds dq atomically
_PROGRAMS = 256  # tiles that keep a large GPU busy; with fewer, the query heads of a group are spread


@dataclass(frozen=True, slots=True)
class Tiles:
    """How a kernel is cut up: queries and keys of a block, warps, and how many blocks are loaded ahead."""

    queries: int
    keys: int
    warps: int = 4
    stages: int = 2

    def __str__(self) -> str:
        return f"{self.queries}x{self.keys}, {self.warps} warps, {self.stages} stages"


@dataclass(frozen=True, slots=True)
class Plan:
    """Tiles of the three kernels, and whether one kernel adds up dq too.

    dq None: `dkv` also makes dq, in five products a block rather than seven, with atomic additions, whose order and
    rounding differ from run to run. precision: of products of float32 inputs; "ieee" is exact and without tensor
    cores, "tf32x3" nearly exact.
    """

    forward: Tiles
    dq: Tiles | None
    dkv: Tiles
    precision: Precision = "ieee"

    @property
    def deterministic(self) -> bool:
        return self.dq is not None


def plans(head_dim: int, dtype: torch.dtype = torch.bfloat16) -> tuple[Plan, ...]:
    """Tiles worth trying: the usual ones, atomic additions, others. Chosen by registers and spills on Hopper."""
    if dtype == torch.float32:
        tiles, dkv = Tiles(64, 32, 4, 2), Tiles(32, 64, 4, 2)
        return Plan(tiles, tiles, dkv), Plan(tiles, None, dkv), Plan(tiles, tiles, dkv, "tf32x3")
    if head_dim > 128:
        tiles = Tiles(64, 64, 8, 1)
        return Plan(tiles, tiles, Tiles(32, 64, 8, 1)), Plan(tiles, None, Tiles(32, 64, 8, 1))
    wide, dq, dkv = Tiles(128, 128, 8, 2), Tiles(128, 64, 8, 2), Tiles(64, 128, 8, 2)
    return (
        Plan(wide, dq, dkv),
        Plan(wide, None, dkv),
        Plan(Tiles(128, 64, 8, 3), Tiles(64, 64, 4, 2), dkv),
        Plan(Tiles(128, 64, 4, 2), Tiles(128, 64, 8, 3), Tiles(64, 64, 8, 2)),
        Plan(Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 3), Tiles(64, 64, 4, 2)),
    )


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    areas: Sequence[Area],
    scale: float,
    plan: Plan,
    out_dtype: torch.dtype | None = None,
) -> tuple[Tensor, Tensor]:
    """(out, logsumexp) of queries over the keys they see in any of the areas, which must not overlap. scale > 0."""
    kernels = _kernels()
    out_dtype = out_dtype or q.dtype
    q, k, v = (_dense(x) for x in (q, k, v))
    batch, queries, heads, dim = q.shape
    out = torch.empty(q.shape, dtype=out_dtype, device=q.device)
    lse = torch.empty(q.shape[:3], dtype=torch.float32, device=q.device)
    if not lse.numel():
        return out, lse
    tiles = plan.forward
    lists = tile_lists(tuple(areas), "queries", queries, tiles.queries, q.device)
    with torch.cuda.device_of(q):
        kernels.forward[len(lists.order), batch * heads](
            q, k, v, out, lse, lists.areas, lists.first, lists.order, queries, heads, heads // k.shape[2],
            scale * kernels.LOG2E.value, *_strides(q, k, v, out),
            **_shape(dim, tiles), BANDED=lists.banded, PRECISION=plan.precision,
        )  # fmt: skip
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    row: Tensor,
    lse: Tensor,
    areas: Sequence[Area],
    scale: float,
    plan: Plan,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) in float32 from the whole rows' logsumexp. row: out, or delta = rowsum(dout * out). scale > 0."""
    kernels = _kernels()
    dout, q, k, v = (_dense(x) for x in (dout, q, k, v))
    batch, queries, heads, dim = q.shape
    keys, kv_heads = k.shape[1:3]
    new = {"dtype": torch.float32, "device": q.device}
    if not q.numel() or not k.numel():
        return torch.zeros(q.shape, **new), torch.zeros(k.shape, **new), torch.zeros(k.shape, **new)
    l2, delta = row_statistics(dout, row, lse)
    dq = torch.zeros(q.shape, **new) if plan.dq is None else torch.empty(q.shape, **new)
    inputs = (q, k, v, dout, l2, delta)
    strides, scales = _strides(q, k, v, dout), (scale, scale * kernels.LOG2E.value)
    areas = tuple(areas)
    with torch.cuda.device_of(q):
        if plan.dq is not None:
            lists = tile_lists(areas, "queries", queries, plan.dq.queries, q.device)
            kernels.backward_dq[len(lists.order), batch * heads](
                *inputs, dq, lists.areas, lists.first, lists.order, queries, heads, heads // kv_heads, *scales,
                *strides, **_shape(dim, plan.dq), BANDED=lists.banded, PRECISION=plan.precision,
            )  # fmt: skip
        lists = tile_lists(areas, "keys", keys, plan.dkv.keys, q.device)
        parts = _parts(heads // kv_heads, len(lists.order) * batch * kv_heads)
        dk, dv = (torch.empty(parts, *k.shape, **new) for _ in range(2))
        kernels.backward_dkv[len(lists.order), batch * kv_heads, parts](
            *inputs, dq, dk, dv, lists.areas, lists.first, lists.order, queries, keys, heads, kv_heads, batch,
            heads // kv_heads // parts, *scales, *strides, **_shape(dim, plan.dkv), ATOMIC=plan.dq is None,
            PRECISION=plan.precision,
        )  # fmt: skip
    dk, dv = (x[0] if parts == 1 else x.sum(0) for x in (dk, dv))
    return dq, dk, dv


def row_statistics(dout: Tensor, row: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """(L log2(e), D), both (B, H, S) float32, from the logsumexp (B, S, H) and either out or D = rowsum(dout out)."""
    kernels = _kernels()
    batch, queries, heads, dim = dout.shape
    from_out = row.ndim == 4
    dout, row = _dense(dout), _dense(row) if from_out else row.unsqueeze(-1)
    made = [torch.empty(batch, heads, queries, dtype=torch.float32, device=dout.device) for _ in range(2)]
    block = 64
    with torch.cuda.device_of(dout):
        kernels.row_statistics[-(-queries // block), batch * heads](
            row, dout, lse, *made, queries, heads, *_strides(row, dout), *lse.stride(),
            D=dim, D_PAD=_padded(dim), BLOCK_M=block, FROM_OUT=from_out,
        )  # fmt: skip
    return made[0], made[1]


@dataclass(frozen=True, slots=True)
class TileLists:
    """Which areas every tile meets, as the kernels read it. banded: rows may not see the first keys of an area."""

    areas: Tensor
    first: Tensor
    order: Tensor
    banded: bool


@lru_cache(maxsize=256)
def tile_lists(
    areas: tuple[Area, ...], side: Literal["queries", "keys"], tokens: int, block: int, device: torch.device
) -> TileLists:
    """Lists for tiles of `block` queries or keys; tiles that take longest come first in `order`."""
    count = -(-tokens // block)
    met: list[list[Area]] = [[] for _ in range(count)]
    for a in areas:
        start, stop = (a.q_start, a.q_stop) if side == "queries" else (a.k_start, a.k_stop)
        for tile in range(start // block, -(-stop // block) if stop > start else 0):
            met[tile].append(a)
    cost = [sum(_span(a, side, t * block, block) for a in here) for t, here in enumerate(met)]
    order = sorted(range(count), key=lambda t: -cost[t])
    first = [0]
    for here in met:
        first.append(first[-1] + len(here))
    rows = [limits(a) for here in met for a in here] or [(0,) * 6]

    def ints(values: object) -> Tensor:
        return torch.tensor(values, dtype=torch.int32, device=device)

    return TileLists(ints(rows), ints(first), ints(order), any(a.lo is not None for a in areas))


def limits(a: Area) -> tuple[int, ...]:
    """(q0, q1, k0, k1, lo, hi) with the limits of j - i for indices of the whole block."""
    shift = a.k_start - a.q_start
    lo = -_FAR if a.lo is None else a.lo + shift
    hi = _FAR if a.hi is None else a.hi + shift
    return a.q_start, a.q_stop, a.k_start, a.k_stop, lo, hi


def _span(a: Area, side: str, start: int, block: int) -> int:
    """How many keys (or queries) the part of the tile that lies in the area meets."""
    q0, q1, k0, k1, lo, hi = limits(a)
    if side == "queries":
        r0, r1 = max(start, q0), min(start + block, q1)
        return max(0, min(k1, r1 + hi) - max(k0, r0 + lo))
    c0, c1 = max(start, k0), min(start + block, k1)
    return max(0, min(q1, c1 - lo) - max(q0, c0 - hi))


def _parts(group: int, programs: int) -> int:
    """Into how many launches' worth of programs a group of query heads is spread, so that the device is busy."""
    return next((n for n in range(1, group) if group % n == 0 and n * programs >= _PROGRAMS), group)


def _kernels() -> Any:  # a launch, kernel[grid](...), is beyond a type checker
    from counterpoint.kernels import triton_kernels

    return triton_kernels


def _dense(x: Tensor) -> Tensor:
    if x.device.type == "cpu" and x.dtype == torch.bfloat16:
        return x.float()  # Triton's interpreter multiplies bfloat16 as if it were integers
    return x if x.stride(-1) == 1 else x.contiguous()


def _strides(*tensors: Tensor) -> list[int]:
    return [n for x in tensors for n in x.stride()[:3]]


def _padded(dim: int) -> int:
    return max(16, 1 << (dim - 1).bit_length())


def _shape(dim: int, tiles: Tiles) -> dict[str, int]:
    return {
        "D": dim, "D_PAD": _padded(dim), "BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys,
        "num_warps": tiles.warps, "num_stages": tiles.stages,
    }  # fmt: skip
