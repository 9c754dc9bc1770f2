"""Which attention kernel is fastest for a problem on this device: measured once, kept in a file, chosen from then."""

from __future__ import annotations

import json
import os
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from functools import lru_cache
from hashlib import sha256
from itertools import pairwise
from math import log
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor

from counterpoint.files import cache_directory, write_whole
from counterpoint.kernels import calls
from counterpoint.kernels.backends import CPU_FLASH, PLAIN, Backend, Problem, find, table
from counterpoint.kernels.mask import Area, AttentionMask, one_document

Pass = Literal["forward", "backward"]
FORMAT = 1  # raised when kernels, or how they are measured, change
LONGEST, MOST_HEADS = (
    2**13,
    32,
)  # tokens and heads of a measurement at most: rates rise little beyond, memory does
CHECKED = 1000  # tokens on which results are compared first: no multiple of a tile
# Largest difference from plain attention in float32, as a share of the result's norm
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 2e-2}
_SECONDS, _RUNS = 0.2, 20  # for timing one kernel


@dataclass(frozen=True, slots=True)
class Trial:
    """How one backend did: median seconds of a pass, or why there are none."""

    backend: str
    seconds: float | None
    why: str = ""


def choose(problem: Problem, which: Pass, deterministic: bool = False) -> Backend:
    """The fastest correct backend for a pass.

    On CPUs that is torch's flash attention, without measuring. On GPUs the backends are measured when a problem of
    this class first comes up, on this device and version of torch; see `cache_file` for where the figures are kept.
    """
    if problem.device != "cuda":
        return PLAIN if CPU_FLASH.refuses(problem) else CPU_FLASH
    return _chosen(bucket(problem), which, deterministic, torch.cuda.current_device())


def bucket(problem: Problem) -> Problem:
    """The problem that stands for all of its class: sizes rounded up to powers of two, one sequence of all heads."""
    group = problem.heads // problem.kv_heads
    kv_heads = min(_power(problem.batch * problem.kv_heads), max(1, MOST_HEADS // group))
    tokens = max(128, min(_power(problem.tokens), LONGEST))
    areas = min(_power(problem.areas), max(1, tokens // 128))
    return replace(problem, batch=1, heads=kv_heads * group, kv_heads=kv_heads, tokens=tokens, areas=areas)


@lru_cache(maxsize=1024)
def _chosen(problem: Problem, which: Pass, deterministic: bool, device: int) -> Backend:
    path = cache_file(device)
    trials = load(path).get(key(problem, which))
    if trials is None:
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError(
                "attention has not been measured yet, and cannot be in a CUDA graph: run it once before"
            )
        usual = (b for b in table() if b.device == "cuda" and not (b.variant or b.compiles))
        trials = measure(problem, which, usual)
        keep(path, key(problem, which), trials)
    return fastest(trials, deterministic)


def fastest(trials: Iterable[Trial], deterministic: bool) -> Backend:
    """The backend of the shortest time; plain attention when none is left."""
    timed = [(t.seconds, find(t.backend)) for t in trials if t.seconds is not None]
    allowed = [pair for pair in timed if pair[1].deterministic or not deterministic]
    return min(allowed, key=lambda pair: pair[0])[1] if allowed else PLAIN


def measure(
    problem: Problem, which: Pass, backends: Iterable[Backend], device: torch.device | str | None = None
) -> list[Trial]:
    """Every backend that takes the problem and computes it correctly, timed; for the others, why not."""
    device = torch.device(device or problem.device)
    data = Data(problem, device)
    checked = Data(replace(problem, tokens=min(problem.tokens, CHECKED)), device)
    trials = []
    for backend in backends:
        why = backend.refuses(problem) or wrong(backend, checked.args(which), which)
        seconds = None
        if not why:
            try:
                seconds = _seconds(lambda b=backend: run(b, which, data.args(which)), device)
            except RuntimeError as error:  # out of memory, above all
                why = failure(error)
        trials.append(Trial(backend.name, seconds, why))
    return trials


def wrong(backend: Backend, args: tuple, which: Pass) -> str:
    """What is wrong with a backend's results, compared with plain attention; empty when nothing is."""
    expected = run(PLAIN, which, args)
    try:
        got = run(backend, which, args)
    except Exception as error:  # whatever a kernel that is not made for this device says
        return failure(error)
    names = ("out", "lse") if which == "forward" else ("dq", "dk", "dv")
    dtype = args[0].dtype
    for name, a, b in zip(names, got, expected, strict=True):
        difference = float((a.double() - b.double()).norm() / b.double().norm().clamp_min(1e-30))
        if not difference <= TOLERANCE[dtype]:
            return f"wrong: {name} differs by {difference:.1e}, {TOLERANCE[dtype]:.0e} is allowed"
    return ""


def failure(error: Exception) -> str:
    return f"fails: {' '.join(str(error).split())[:120] or type(error).__name__}"


# ---- what is measured ----------------------------------------------------------------------------
class Data:
    """Random tensors for a problem. The backward's logsumexp is not the block's own: the rows saw other keys too."""

    def __init__(self, problem: Problem, device: torch.device, seen: tuple[Area, ...] | None = None) -> None:
        random = torch.Generator(device).manual_seed(0)
        heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
        self.q, self.k, self.v, self.dout = (
            torch.randn(
                problem.batch,
                problem.tokens,
                n,
                problem.head_dim,
                generator=random,
                device=device,
                dtype=problem.dtype,
            )
            for n in heads
        )
        self.areas, self.scale = areas(problem) if seen is None else seen, problem.head_dim**-0.5
        self.out = torch.randn_like(self.q)
        self.lse: Tensor | None = None

    def args(self, which: Pass) -> tuple:
        if which == "forward":
            return self.q, self.k, self.v, self.areas, self.scale
        if self.lse is None:
            if self.q.shape[1] <= CHECKED:
                self.lse = PLAIN.forward(self.q, self.k, self.v, self.areas, self.scale)[1] + 0.5
            else:  # about as large, for timing
                self.lse = torch.full(self.q.shape[:3], log(self.q.shape[1]) + 1.0, device=self.q.device)
        return self.dout, self.q, self.k, self.v, self.out, self.lse, self.areas, self.scale


def areas(problem: Problem) -> tuple[Area, ...]:
    """A mask of the problem's kind: as many documents as it has areas, and a window of a quarter of one."""
    count = min(problem.areas, problem.tokens)
    window = max(1, problem.tokens // count // 4) if problem.mask == "bands" else None
    return masked(problem.tokens, problem.mask != "full", window, count)


def masked(tokens: int, causal: bool, window: int | None = None, documents: int = 1) -> tuple[Area, ...]:
    """Areas of tokens that attend each other, in documents of equal length."""
    cuts = [tokens * i // documents for i in range(documents + 1)]
    lengths = tuple(b - a for a, b in pairwise(cuts)) if documents > 1 else ()
    mask = AttentionMask(causal, window, lengths)
    return mask.areas(one_document(tokens), one_document(tokens))


def run(backend: Backend, which: Pass, args: tuple) -> tuple[Tensor, ...]:
    return backend.forward(*args) if which == "forward" else backend.backward(*args)


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    """Median time (s) of a run on a GPU."""
    run()
    times: list[float] = []
    while len(times) < _RUNS and sum(times) < _SECONDS:
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        torch.cuda.synchronize(device)
        times.append(begin.elapsed_time(end) / 1e3)
    return statistics.median(times)


# ---- what is kept --------------------------------------------------------------------------------
def cache_file(device: int) -> Path:
    """The file of this kind of GPU and version of torch, in the user's cache directory."""
    what = json.dumps([FORMAT, torch.cuda.get_device_name(device), torch.__version__, calls.BAND_ROWS])
    return cache_directory(os.environ) / f"attention-{sha256(what.encode()).hexdigest()[:16]}.json"


def key(problem: Problem, which: Pass) -> str:
    """The problem in a line."""
    dtype = str(problem.dtype).removeprefix("torch.")
    return (
        f"{which} {dtype} {problem.heads}/{problem.kv_heads}x{problem.head_dim} {problem.tokens} tokens "
        f"{problem.mask} {problem.areas}"
    )


def load(path: Path) -> dict[str, list[Trial]]:
    """The trials kept in this file; none when it cannot be read."""
    try:
        rows = json.loads(path.read_text(encoding="utf-8"))
        found = {name: [Trial(*trial) for trial in trials] for name, trials in rows.items()}
        for trials in found.values():
            fastest(trials, False)
    except (OSError, ValueError, TypeError, AttributeError):
        return {}
    return found


def keep(path: Path, name: str, trials: list[Trial]) -> None:
    """Add trials to the file; a choice that cannot be kept is made again next time."""
    known = load(path) | {name: trials}
    rows = {name: [(t.backend, t.seconds, t.why) for t in trials] for name, trials in known.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(rows, indent=1))
    except OSError:
        return


def _power(n: int) -> int:
    return 1 << max(0, n - 1).bit_length()
