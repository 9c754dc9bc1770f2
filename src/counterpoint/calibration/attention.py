"""Attention kernels of one device side by side: rates, as shares of its matmul rate and of the fastest kernel.

Kernels take turns (A B A B), so that whatever else the machine does slows all of them. Rates count FLOPs as
FlashAttention does: 4 S^2 D H forward, half of it when causal, the visible pairs with a window or documents; 2.5 times
that backward.
"""

from __future__ import annotations

import platform
import re
import statistics
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date
from functools import partial
from typing import Any

import torch

from counterpoint.calibration.machine import this_machine
from counterpoint.calibration.timing import Stopwatch
from counterpoint.kernels import choice
from counterpoint.kernels.backends import Backend, Problem
from counterpoint.kernels.choice import Pass, Trial
from counterpoint.kernels.mask import Area

Advance = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class MaskKind:
    """A mask for any number of tokens: `documents` of them, equally long, are packed."""

    causal: bool = True
    window: int | None = None
    documents: int = 1

    def areas(self, tokens: int) -> tuple[Area, ...]:
        return choice.masked(tokens, self.causal, self.window, self.documents)

    def __str__(self) -> str:
        words = ["causal"] if self.causal else []
        words += [f"window {self.window}"] if self.window else []
        words += [f"{self.documents} documents"] if self.documents > 1 else []
        return ", ".join(words) or "no mask"


@dataclass(frozen=True, slots=True)
class Timed:
    """One kernel at one size. seconds: of every round.

    of_matmul, of_best: its rate over that of a large matmul, and of the fastest kernel, of the same round; medians.
    """

    tokens: int
    pass_: Pass
    backend: str
    flops: float
    seconds: tuple[float, ...]
    of_matmul: float
    of_best: float

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def flops_per_second(self) -> float:
        return self.flops / self.median


@dataclass(frozen=True, slots=True)
class LeftOut:
    """A kernel that does not take a problem, or does not compute it correctly."""

    tokens: int
    pass_: Pass
    backend: str
    why: str


@dataclass(frozen=True, slots=True)
class Comparison:
    """All figures of a run. peak: FLOP/s of the fastest square matmul, and its side."""

    device: str
    torch: str
    problem: Problem
    mask: MaskKind
    peak: tuple[float, int]
    timed: tuple[Timed, ...]
    left_out: tuple[LeftOut, ...]

    def to_json(self) -> dict[str, Any]:
        problem = asdict(self.problem) | {"dtype": str(self.problem.dtype).removeprefix("torch.")}
        del problem["tokens"]
        rate, side = self.peak
        return {
            "date": str(date.today()),
            "host": platform.node(),
            "device": self.device,
            "torch": self.torch,
            "problem": problem | {"mask": asdict(self.mask)},
            "matmul": {"flops_per_second": rate, "side": side},
            "kernels": [
                {
                    "tokens": t.tokens, "pass": t.pass_, "backend": t.backend, "flops": t.flops,
                    "seconds": t.median, "fastest": min(t.seconds), "slowest": max(t.seconds),
                    "flops_per_second": t.flops_per_second, "of_matmul": t.of_matmul,
                    "of_best": t.of_best,
                }
                for t in self.timed
            ],
            "left_out": [
                {"tokens": x.tokens, "pass": x.pass_, "backend": x.backend, "why": x.why} for x in self.left_out
            ],
        }  # fmt: skip


def compare(
    problem: Problem,
    tokens: Sequence[int],
    passes: Sequence[Pass],
    backends: Sequence[Backend],
    *,
    mask: MaskKind,
    seconds: float = 0.5,
    advance: Advance = lambda what: None,
) -> Comparison:
    """Time the backends on the problem at these lengths, each for about `seconds`, at least three rounds."""
    device = torch.device(problem.device)
    stopwatch = Stopwatch(wait=partial(torch.cuda.synchronize, device) if device.type == "cuda" else None)
    with torch.no_grad():
        advance("matmul")
        peak = matmul_peak(device, problem.dtype, stopwatch, seconds)
        timed: list[Timed] = []
        left_out: list[LeftOut] = []
        for count in tokens:
            sized = replace(problem, tokens=count)
            for which in passes:
                for found in _round_robin(sized, mask, which, backends, stopwatch, seconds, advance, peak[1]):
                    (timed if isinstance(found, Timed) else left_out).append(found)  # type: ignore[arg-type]
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _processor()
    return Comparison(name, torch.__version__, problem, mask, peak, tuple(timed), tuple(left_out))


def flops(problem: Problem, mask: MaskKind, which: Pass) -> float:
    """Of one pass, as FlashAttention counts them."""
    if mask.window is None and mask.documents == 1:
        pairs = problem.tokens**2 / (2 if mask.causal else 1)
    else:
        pairs = sum(a.pairs for a in mask.areas(problem.tokens))
    forward = 4.0 * pairs * problem.batch * problem.heads * problem.head_dim
    return forward * (1.0 if which == "forward" else 2.5)


def matmul_peak(
    device: torch.device, dtype: torch.dtype, stopwatch: Stopwatch, seconds: float
) -> tuple[float, int]:
    """(FLOP/s, side) of the fastest square matmul: sides double from 512 for as long as one takes little time."""
    best, side = (0.0, 0), 512
    while True:
        a, b = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
        run = partial(torch.mm, a, b)
        run()
        took = min(stopwatch(run, 3)[0] for _ in range(5))
        best = max(best, (2 * side**3 / took, side))
        if took * 8 * 18 > 4 * seconds or side >= 16384:
            return best
        side *= 2


def _round_robin(
    problem: Problem,
    mask: MaskKind,
    which: Pass,
    backends: Sequence[Backend],
    stopwatch: Stopwatch,
    seconds: float,
    advance: Advance,
    side: int,
) -> Iterator[Timed | LeftOut]:
    device = torch.device(problem.device)
    few = min(problem.tokens, max(choice.CHECKED, mask.documents))
    checked = choice.Data(replace(problem, tokens=few), device, mask.areas(few))
    data = choice.Data(problem, device, mask.areas(problem.tokens))
    a, b = (torch.randn(side, side, device=device).to(problem.dtype) for _ in range(2))
    product = partial(torch.mm, a, b)
    running: list[tuple[str, Callable[[], object], int]] = [("matmul", product, 1)]
    product()
    slowest = max(5e-3, stopwatch(product)[0])
    for backend in backends:
        advance(f"{problem.tokens} tokens, {which}, {backend.name}")
        why = backend.refuses(problem) or choice.wrong(backend, checked.args(which), which)
        if not why:
            run = partial(choice.run, backend, which, data.args(which))
            try:
                run()
                took = stopwatch(run)[0]
            except RuntimeError as error:
                why = choice.failure(error)
            else:
                slowest = max(slowest, took)
                running.append((backend.name, run, max(1, round(5e-3 / took))))
        if why:
            yield LeftOut(problem.tokens, which, backend.name, why)
    rounds = max(3, min(50, int(seconds / slowest)))
    times = [[stopwatch(run, repeats)[0] for _, run, repeats in running] for _ in range(rounds)]
    amount = flops(problem, mask, which)
    for i, (name, _, _) in enumerate(running[1:], 1):
        of_matmul = statistics.median(amount / row[i] / (2 * side**3 / row[0]) for row in times)
        of_best = statistics.median(min(row[1:]) / row[i] for row in times)
        yield Timed(problem.tokens, which, name, amount, tuple(row[i] for row in times), of_matmul, of_best)


def trials(comparison: Comparison, tokens: int, which: Pass) -> list[Trial]:
    """What was found at one length, as `kernels.choice` keeps it."""
    rows = [Trial(t.backend, t.median) for t in comparison.timed if (t.tokens, t.pass_) == (tokens, which)]
    others = [x for x in comparison.left_out if (x.tokens, x.pass_) == (tokens, which)]
    return rows + [Trial(x.backend, None, x.why) for x in others]


def keep(comparison: Comparison) -> None:
    """Let later runs on this GPU choose by these figures, for problems of the same classes."""
    path = choice.cache_file(torch.cuda.current_device())
    for t in comparison.timed:
        problem = choice.bucket(replace(comparison.problem, tokens=t.tokens))
        choice.keep(path, choice.key(problem, t.pass_), trials(comparison, t.tokens, t.pass_))


def file_name(device: str) -> str:
    """A device's name for a file."""
    return re.sub(r"[^a-z0-9]+", "-", device.lower()).strip("-")


def _processor() -> str:
    machine = this_machine()
    return f"{machine.processor}, {torch.get_num_threads()} threads"
