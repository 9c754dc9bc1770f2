"""Rates of one device at its kinds of work: matmul, attention, merging, memory; and the cost of a launch."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch

from counterpoint.calibration.measurement import Series
from counterpoint.calibration.stream import kernel
from counterpoint.calibration.timing import Advance, Effort, Stopwatch, sample, spaced
from counterpoint.kernels import blocks
from counterpoint.kernels.mask import Area

HEADS, HEAD_DIM = 8, 64
MERGE_FLOPS = 3  # per element of the output: lerp subtracts, multiplies and adds


def measure_device(
    device: torch.device,
    dtype: torch.dtype,
    largest_bytes: int,
    effort: Effort,
    advance: Advance,
    together: Callable[[], None] = lambda: None,
    stopwatch: Stopwatch | None = None,
) -> dict[str, Series]:
    """Series of every kind of work in one number format, and of memory traffic up to `largest_bytes` a pass.

    together: called before every point, so that the ranks of a machine are measured while all are at work.
    """
    if device.type == "cuda":
        stopwatch = Stopwatch(wait=partial(torch.cuda.synchronize, device))
    found: dict[str, Series] = {}
    with torch.inference_mode():
        for name, unit, cases in _cases(device, dtype, largest_bytes, effort):
            points = []
            for size, label, make in cases:
                advance(f"{name}, {label}")
                run = make()
                together()
                points.append(sample(run, size, label, effort, stopwatch))
            found[name] = Series(unit, tuple(points))
    return found


def _cases(device: torch.device, dtype: torch.dtype, largest_bytes: int, effort: Effort):
    """(name, unit, [(size, label, make)]) of every series; make allocates and returns what is timed."""
    new = partial(torch.randn, device=device, dtype=dtype)
    gpu = device.type == "cuda"
    widest = (8192 if gpu else 1024) * (1 if effort.sizes < 8 else 2)
    longest = (8192 if gpu else 1024) * (1 if effort.sizes < 8 else 2)
    widths = spaced(64, widest, effort.sizes)
    tokens = spaced(64, longest, effort.sizes)
    item = dtype.itemsize
    yield "launch", "seconds", [(1, "one element", partial(_launch, new))]
    yield "matmul", "flops", [(2 * n**3, f"{n} x {n} x {n}", partial(_matmul, new, n)) for n in widths]
    shape = f"{HEADS} heads of {HEAD_DIM}"
    pairs = HEADS * HEAD_DIM
    for name, per_pair, make in (
        ("attention_forward", 4, _attend),
        ("attention_backward", 10, _attend_backward),
    ):
        cases = [(per_pair * t * t * pairs, f"{t} tokens, {shape}", partial(make, new, t)) for t in tokens]
        yield name, "flops", cases
    cases = [
        (MERGE_FLOPS * t * pairs, f"merge of {t} tokens, {shape}", partial(_merge, new, t)) for t in tokens
    ]
    yield "elementwise", "flops", cases
    smallest = 2**16 if not gpu else 2**20
    total = 3 * (1 << max(0, (largest_bytes // 3).bit_length() - 1))
    sizes = [3 * n for n in spaced(smallest, max(2 * smallest, total // 3), effort.sizes)]
    yield (
        "memory",
        "bytes",
        [(n, f"triad, {n / 2**20:.3g} MiB", partial(_triad, new, n // 3 // item)) for n in sizes],
    )


def _launch(new):
    a, b = new(1), new(1)
    return partial(torch.add, a, b, out=torch.empty_like(a))


def _matmul(new, n: int):
    a, b = new(n, n), new(n, n)
    return partial(torch.mm, a, b, out=torch.empty_like(a))


def _block(new, tokens: int):
    q, k, v, dout = (new(1, tokens, HEADS, HEAD_DIM) for _ in range(4))
    return q, k, v, dout, (Area(0, tokens, 0, tokens),)


def _attend(new, tokens: int):
    q, k, v, _, areas = _block(new, tokens)
    return partial(blocks.attend, q, k, v, areas)


def _attend_backward(new, tokens: int):
    q, k, v, dout, areas = _block(new, tokens)
    out, lse = blocks.attend(q, k, v, areas)
    return partial(blocks.attend_backward, dout, q, k, v, out, lse, areas)


def _merge(new, tokens: int):
    out, part = (new(1, tokens, HEADS, HEAD_DIM).float() for _ in range(2))
    lse, part_lse = (new(1, tokens, HEADS).float() for _ in range(2))
    return partial(blocks.merge, out, lse, part, part_lse)


def _triad(new, elements: int):
    a, b, c = new(elements), new(elements), new(elements)
    return partial(kernel, "triad", a, b, c)
