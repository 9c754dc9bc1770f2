"""The memory of a training step over time, one curve per policy: what each keeps, and what its time costs."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from counterpoint.planner.memory import Question, timeline
from counterpoint.report.figure import FAINT, INK, MUTED, check_path, new_figure, save
from counterpoint.report.lanes import PALETTE
from counterpoint.report.units import format_bytes, format_seconds
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy

WIDTH, HEIGHT = 10.0, 4.2


def draw_memory(question: Question, path: str | Path, chunks: int = 4) -> Path:
    """Draws the simulated memory of a step that keeps all, recomputes, and streams, with a line at the limit.

    Raises ValueError for a suffix other than .png and .svg, ImportError when matplotlib is missing.
    """
    path = check_path(path)
    policies = {
        "keep, all logits at once": MemoryPolicy((LayerPolicy("keep"),)),
        "recompute, all logits at once": MemoryPolicy((LayerPolicy("recompute"),)),
        f"stream({chunks}), logits of {question.head_tokens or 1024:,} tokens at a time": MemoryPolicy(
            (LayerPolicy("stream", chunks),), 1, question.head_tokens or 1024
        ),
    }
    curves = {name: timeline(question, policy) for name, policy in policies.items()}
    title = (
        f"Memory of a training step, {question.tokens:,} tokens, {question.config.num_hidden_layers} layers"
    )
    about = f"simulated on {question.cluster.device(0).name}, {question.dtype}"
    return draw_curves(curves, path, title, about, question.limit)


def draw_curves(
    curves: Mapping[str, Timeline], path: str | Path, title: str, about: str, limit: int | None = None
) -> Path:
    """Draws the live bytes of rank 0 of each timeline over seconds."""
    figure = new_figure(WIDTH, HEIGHT)
    axes = figure.add_axes((0.075, 0.13, 0.9, 0.68))
    for colour, (name, line) in zip(PALETTE, curves.items(), strict=False):
        events = sorted((m.time, m.live_bytes) for m in line.memory if m.rank == 0)
        times, levels = [t for t, _ in events], [n / 1e9 for _, n in events]
        note = f"{name}: peak {format_bytes(line.peak_bytes(0))}, {format_seconds(line.seconds)}"
        axes.step([*times, line.stop], [*levels, levels[-1]], where="post", color=colour, lw=1.3, label=note)
    if limit is not None:
        axes.axhline(limit / 1e9, color=MUTED, lw=0.8, ls="--")
        axes.text(0, limit / 1e9, f" {format_bytes(limit)}", size=8, color=MUTED, va="bottom")
    axes.set_ylim(bottom=0, top=1.35 * max(limit or 0, *(t.peak_bytes(0) for t in curves.values())) / 1e9)
    axes.set_xlim(left=0)
    axes.set_xlabel("seconds", size=8, color=MUTED)
    axes.set_ylabel("GB on the device", size=8, color=MUTED)
    axes.tick_params(labelsize=8, colors=MUTED, color=FAINT)
    axes.grid(color=FAINT, lw=0.5)
    for side, spine in axes.spines.items():
        spine.set_visible(side in ("left", "bottom"))
        spine.set_color(FAINT)
    axes.legend(loc="upper right", frameon=False, fontsize=8, labelcolor=INK)
    figure.text(0.018, 0.94, title, size=13, weight="bold", color=INK, va="center", parse_math=False)
    figure.text(0.018, 0.875, about, size=8.5, color=MUTED, va="center", parse_math=False)
    return save(figure, path)
