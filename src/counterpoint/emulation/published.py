"""Figures that others have published for a run that a scale model can repeat."""

from __future__ import annotations

from dataclasses import dataclass

from counterpoint.strategies.sequence.attention import AttentionProblem
from counterpoint.strategies.sequence.linear import LinearProblem


@dataclass(frozen=True, slots=True)
class Published:
    """Times (s) between the starts of a rank's attention kernels in the forward pass, and who says so."""

    cluster: str
    strategy: str
    tokens: int
    heads: tuple[int, int]
    head_dim: int
    step_seconds: tuple[float, ...]
    source: str


_TOKENRING = "TokenRing, arXiv 2412.20501, timeline published with the code"

PUBLISHED = (
    Published("a10x4-pcie", "tokenring", 24_000, (32, 32), 128, (3.5e-3, 3.5e-3, 4.6e-3), _TOKENRING),
    Published("a10x4-pcie", "ring", 24_000, (32, 32), 128, (7.6e-3, 7.6e-3, 7.6e-3), _TOKENRING),
)


def published(cluster: str, problem: AttentionProblem | LinearProblem) -> Published | None:
    """What is known of the forward pass of a problem on a cluster."""
    if isinstance(problem, LinearProblem):
        return None
    shape = problem.shape
    for known in PUBLISHED:
        same = (
            known.cluster == cluster
            and tuple(choice.name for choice in problem.forward) == (known.strategy,)
            and (problem.layout.kind, problem.layout.tokens) == ("zigzag", known.tokens)
            and problem.causal
            and (shape.heads, shape.kv_heads, shape.head_dim) == (*known.heads, known.head_dim)
            and len(known.step_seconds) == problem.layout.world_size - 1
        )
        if same:
            return known
    return None
