"""One block of attention with torch: forward with logsumexp, backward from a logsumexp computed elsewhere, merge.

Shapes, with B batch, S query tokens, T key tokens, H query heads, G key/value heads, D head dim:
q, out, dout (B, S, H, D); k, v (B, T, G, D); lse, delta (B, S, H). Tokens come before heads, so that a
range of tokens of one sequence is contiguous memory and can be sent as it is. Softmax statistics, partial outputs
that are merged, and gradients that are summed are float32 (float64 for float64 inputs).

Which kernel computes a block is a matter of device, dtype, mask and size: see `kernels.backends` and `kernels.choice`.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from counterpoint.kernels.backends import PLAIN, Backend, Problem, find
from counterpoint.kernels.choice import Pass, choose
from counterpoint.kernels.mask import Area, AttentionMask, one_document
from counterpoint.kernels.merge import merge, output_standing_in, row_delta

__all__ = ["attend", "attend_backward", "merge", "output_standing_in", "row_delta"]


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: AttentionMask | tuple[Area, ...],
    *,
    scale: float | None = None,
    groups: tuple[int, ...] = (),
    backend: str | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention of a block of queries over a block of keys: (out, logsumexp).

    mask: areas of the block, or a rule for tokens that start at position 0 on both sides. Queries that see no key
    get out 0 and logsumexp -inf. groups: query heads per key/value head, when they differ; empty means H / G each.
    out has q's dtype. backend: the name of a kernel of `kernels.backends`; None: the fastest that is correct.

    Raises ValueError for a backend that is unknown or cannot compute this.
    """
    areas = _areas(mask, q, k)
    if groups and len(set(groups)) > 1:
        parts = [
            attend(q[:, :, a], k[:, :, b], v[:, :, b], areas, scale=scale, backend=backend)
            for a, b in _head_parts(groups)
        ]
        return torch.cat([out for out, _ in parts], 2), torch.cat([lse for _, lse in parts], 2)
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    return _backend(q, k, areas, scale, backend, "forward").forward(q, k, v, areas, scale)


def attend_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    mask: AttentionMask | tuple[Area, ...],
    *,
    scale: float | None = None,
    groups: tuple[int, ...] = (),
    backend: str | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients (dq, dk, dv) of one block, in float32, given the whole row's out and logsumexp.

    out: the output, or delta = rowsum(dout * out) (B, S, H), which is all that is needed of it.
    Summed over the blocks of a row (dq) or a column (dk, dv) they are the gradients of the whole attention. dk and
    dv are summed over the query heads that share a key/value head. backend: as in `attend`. The same bits come out
    every time where torch.use_deterministic_algorithms is on.
    """
    areas = _areas(mask, q, k)
    if groups and len(set(groups)) > 1:
        parts = [
            attend_backward(
                dout[:, :, a], q[:, :, a], k[:, :, b], v[:, :, b], out[:, :, a], lse[:, :, a], areas,
                scale=scale, backend=backend,
            )
            for a, b in _head_parts(groups)
        ]  # fmt: skip
        dq, dk, dv = (torch.cat(grads, 2) for grads in zip(*parts, strict=True))
        return dq, dk, dv
    scale = float(q.shape[-1] ** -0.5) if scale is None else scale
    chosen = _backend(q, k, areas, scale, backend, "backward")
    if out.ndim == 3 and not chosen.takes_delta:
        out = output_standing_in(dout, out)
    return chosen.backward(dout, q, k, v, out, lse, areas, scale)


def _backend(
    q: Tensor, k: Tensor, areas: tuple[Area, ...], scale: float, name: str | None, which: Pass
) -> Backend:
    problem = Problem.of(q, k, areas)
    if name is not None:
        backend = find(name)
        why = backend.refuses(problem)
        if why:
            raise ValueError(f"attention backend '{name}' cannot compute this: it {why}")
        return backend
    if scale <= 0 and problem.device == "cuda":
        return PLAIN  # the others scale after taking the maximum
    return choose(problem, which, torch.are_deterministic_algorithms_enabled())


def _areas(mask: AttentionMask | tuple[Area, ...], q: Tensor, k: Tensor) -> tuple[Area, ...]:
    if isinstance(mask, AttentionMask):
        return mask.areas(one_document(q.shape[1]), one_document(k.shape[1]))
    return mask


def _head_parts(groups: tuple[int, ...]) -> Iterator[tuple[slice, slice]]:
    """Slices of query and key/value heads in which every key/value head serves equally many query heads."""
    q = start = 0
    for g in range(1, len(groups) + 1):
        if g == len(groups) or groups[g] != groups[start]:
            count = groups[start] * (g - start)
            yield slice(q, q + count), slice(start, g)
            q, start = q + count, g
