"""FlashAttention-2: what must come out does, and the checks would notice a wrong merge."""

from __future__ import annotations

import pytest

from counterpoint.kernels import blocks
from counterpoint.kernels.mask import AttentionMask
from counterpoint.reproductions import flashattention_2 as fa
from counterpoint.reproductions import gpt
from counterpoint.reproductions.bench import Bench
from counterpoint.reproductions.check import run


def test_all_but_the_interpreter_comes_out() -> None:
    checks = [c for c in fa.REPRODUCTION.checks if "interpreter" not in c.claim and c.kind != "measured"]
    found = list(run(checks, Bench({})))
    assert [r for r in found if r.verdict not in ("holds", "reported")] == []
    assert sum(r.verdict == "reported" for r in found) == 9
    assert sum(r.check.kind == "exact" for r in found) == 7


def test_a_merge_that_forgets_the_logsumexp_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    def merge(out, lse, part, part_lse):
        out.lerp_(part, 0.5)

    assert fa.blockwise(AttentionMask(), 2) < 1e-6
    monkeypatch.setattr(blocks, "merge", merge)
    assert not fa.blockwise(AttentionMask(), 2) < 1e-2


def test_time_by_attention_kernel() -> None:
    """Longer sequences cost more per token, and the kernels keep their order."""
    short, long = (
        next(r for r in gpt.PUBLISHED if (r.parameters, r.tokens) == (2.7e9, n)) for n in (2048, 8192)
    )
    kernels: tuple[gpt.Attention, ...] = ("FlashAttention-2", "FlashAttention", "no FlashAttention")
    ours, first, none = ([gpt.seconds(r, k) for r in (short, long)] for k in kernels)
    assert all(a < b for a, b in (ours, first, none))
    assert all(a < b < c for a, b, c in zip(ours, first, none, strict=True))
