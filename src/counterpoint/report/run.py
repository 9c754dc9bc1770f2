"""The report page of a training run's directory: loss, speed, the last timelines, the configuration."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from counterpoint.planner.batch import BatchPlan
from counterpoint.report.chart import LineChart
from counterpoint.report.page import write_report
from counterpoint.report.sections import Section, Table
from counterpoint.schedule.timeline import Timeline
from counterpoint.training.metrics import read_metrics


def report_run(
    directory: str | Path,
    path: str | Path | None = None,
    *,
    title: str = "",
    sections: Sequence[Section] = (),
    timelines: int = 1,
    predicted: Timeline | None = None,
) -> Path:
    """Writes the page of a run directory (default: `report.html` in it), and returns its path.

    It shows what the directory holds: `metrics.jsonl`, the last `timelines` of `timelines/step-*.json`,
    `config.yaml`; `sections` are added to it, and a `predicted` timeline beside the last. FileNotFoundError: no such
    directory. ValueError: the directory is not that of a run, or a timeline file is damaged.
    """
    directory = Path(directory)
    if not directory.is_dir():
        raise FileNotFoundError(f"{directory} is not a directory: give the directory of a training run")
    metrics = read_metrics(directory / "metrics.jsonl")
    found = recorded_timelines(directory)
    if not metrics and not found:
        raise ValueError(
            f"{directory} holds neither metrics.jsonl nor timelines/step-*.json: "
            "give the directory of a training run"
        )
    shown = {f"step {step}": _read(file) for step, file in sorted(found.items())[-timelines:]}
    if predicted is not None:
        shown = {"predicted": predicted, **shown}
    config = directory / "config.yaml"
    settings = [Section("Configuration", preformatted=config.read_text())] if config.exists() else []
    groups = [section for name, line in shown.items() for section in group_sections(name, line)]
    about = [*training_sections(metrics), *groups, *sections, *settings]
    title = title or f"Training run {directory.resolve().name}"
    return write_report(path or directory / "report.html", shown, title=title, sections=about)


def recorded_timelines(directory: Path) -> dict[int, Path]:
    """Timeline files of a run directory by step, without those written for Perfetto."""
    found = {}
    for file in (directory / "timelines").glob("step-*.json"):
        step = file.stem.removeprefix("step-")
        if step.isdecimal():
            found[int(step)] = file
    return found


def training_sections(metrics: Sequence[dict[str, Any]]) -> list[Section]:
    """Loss and speed over the steps of a run, from the lines of its metrics.jsonl."""
    losses = {"training": _series(metrics, "loss"), "validation": _series(metrics, "validation_loss")}
    losses = {name: line for name, line in losses.items() if line}
    if not losses:
        return []
    rows = []
    for name, line in losses.items():
        lowest = min(line, key=lambda point: point[1])
        rows.append(
            (name, f"{line[0][1]:.4f}", f"{line[-1][1]:.4f}", f"{lowest[1]:.4f}", f"{lowest[0]:,.0f}")
        )
    table = Table(["loss", "first", "last", "lowest", "at step"], rows)
    chart = LineChart(losses, "step", "loss (nats per token)")
    made = [Section("Loss", table=table, chart=chart, before_timelines=True)]
    speed = _series(metrics, "tokens_per_second")
    if speed:
        speed_chart = LineChart({"tokens per second": speed}, "step", "tokens per second", from_zero=True)
        made.append(Section("Speed", chart=speed_chart))
    return made


def group_sections(name: str, timeline: Timeline) -> list[Section]:
    """Who shared which sequences in a step with ragged batches; empty for other steps."""
    if "plan" not in timeline.meta:
        return []
    plan = BatchPlan.from_json(timeline.meta["plan"])
    rows = []
    for number, row in enumerate(plan.micro_batches, 1):
        for group in row.groups:
            lengths = [plan.lengths[i] for i in group.sequences]
            ranks = ", ".join(map(str, group.ranks))
            cells = (len(lengths), sum(lengths), max(lengths), sum(lengths) / len(group.ranks))
            rows.append((str(number), ranks, *(f"{n:,.0f}" for n in cells), f"{group.offload:.0%}"))
    header = ["micro-batch", "ranks", "sequences", "tokens", "longest", "tokens per rank", "offloaded"]
    return [Section(f"Groups of {name}, planned by {plan.solver}", table=Table(header, rows))]


def _series(metrics: Sequence[dict[str, Any]], name: str) -> list[tuple[float, float]]:
    return [(line["step"], line[name]) for line in metrics if line.get(name) is not None]


def _read(file: Path) -> Timeline:
    try:
        return Timeline.read(file)
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{file} is not a timeline ({error}): record it again or remove it") from error
