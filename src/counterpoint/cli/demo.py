"""`counterpoint demo`: the main job, small enough for a laptop, with something to look at in the end."""

from __future__ import annotations

import os
import shutil
import time
from pathlib import Path
from typing import Annotated

import typer

PROMPT = "def "


def demo(
    directory: Annotated[Path, typer.Option("--directory", "-d", help="Where the run goes.")] = Path(
        "demo-run"
    ),
    steps: Annotated[int, typer.Option(min=2, help="Optimizer steps.")] = 40,
    tokens: Annotated[int, typer.Option(min=64, help="Tokens of a sequence.")] = 8192,
    processes: Annotated[int, typer.Option(min=1, help="Processes that share a sequence.")] = 4,
    strategy: Annotated[str, typer.Option(help="Attention strategy.")] = "tokenring",
) -> None:
    """Train a small Llama-shaped model with TokenRing attention over four processes on real text.

    Proves that loss and gradients equal those of one process, trains for a few minutes on Python's own standard
    library, samples from the model, and writes a report page with the predicted and the measured timeline beside each
    other, and a picture.
    """
    from rich.console import Console

    from counterpoint.cli.verify import prove
    from counterpoint.training.config import load_config

    console, began = Console(), time.monotonic()
    if directory.exists():
        if not (directory / "config.yaml").is_file() and any(directory.iterdir()):
            raise ValueError(f"{directory} exists and is not an earlier run; choose another --directory")
        shutil.rmtree(directory)
    settings = load_config(
        None,
        [
            f"directory={directory}",
            f"data.sequence_length={tokens}",
            "data.document_masking=false",
            "data.tokenizer=bpe",
            "data.vocabulary=2048",
            f"parallel.sequence={processes}",
            f"parallel.forward={strategy}",
            f"training.steps={steps}",
            "training.global_batch=1",
            f"training.evaluate_every={max(2, steps // 4)}",
            "training.evaluate_batches=1",
            "optimizer.lr=3.0e-3",
            f"optimizer.warmup={min(5, steps)}",
            "checkpoint.every=0",
            f"metrics.timeline_steps=[{steps}]",
        ],
    )
    console.rule("[bold]1. Is it exact? Loss and gradients of the first batch, sharded and not")
    directory.mkdir(parents=True)
    (directory / "config.yaml").write_text(settings.to_yaml())
    if not prove(settings):
        raise typer.Exit(1)
    console.rule("[bold]2. How long will a step take? Its parts are measured, the step is simulated")
    prediction = _predicted(settings)
    console.rule(f"[bold]3. Training on {processes} processes, {tokens:,} tokens of context, {strategy}")
    _train(settings, processes)
    console.rule("[bold]4. A sample")
    text = _sample(directory)
    console.print(text, markup=False, highlight=False)
    console.rule("[bold]5. What was predicted, and what happened")
    page, picture = write_pages(directory, text, processes, prediction)
    console.print(f"report   {page.resolve()}\npicture  {picture.resolve()}")
    console.print(f"all of it took {time.monotonic() - began:.0f} s; open the report in a browser")


def _predicted(settings):
    """The prediction of a step on this machine; None where GPUs train, whose kernels are not measured one by one."""
    from rich.console import Console

    from counterpoint.calibration.machine import this_machine
    from counterpoint.training.predict import predict_here

    if this_machine().accelerators:
        Console().print(
            "not on GPUs: counterpoint plan step --cluster FILE predicts by the figures of a cluster"
        )
        return None
    found = predict_here(settings, os.environ, refresh=True)  # machines are not equally fast every day
    Console().print(f"a step will take {found.seconds:.3g} s, {found.tokens_per_second:,.0f} tokens/s")
    return found


def compared(prediction, directory: Path):
    """Predicted and measured seconds of a step and of its phases, as a section of the page and for the terminal."""
    from statistics import median

    from counterpoint.planner.step import phase_seconds
    from counterpoint.report.run import recorded_timelines
    from counterpoint.report.sections import Section, Table
    from counterpoint.schedule.timeline import Timeline
    from counterpoint.training.metrics import read_metrics

    speeds = [
        m["tokens_per_second"]
        for m in read_metrics(directory / "metrics.jsonl")
        if m.get("tokens_per_second")
    ]
    steps = sorted(prediction.step.tokens_per_step / speed for speed in speeds[1:] or speeds)
    middle = median(steps)
    recorded = phase_seconds(Timeline.read(max(recorded_timelines(directory).items())[1]))
    rows = [("a step, the median", prediction.seconds, middle)]
    rows += [
        (f"{name}, in the recorded step", prediction.phases.get(name, 0.0), recorded[name])
        for name in recorded
    ]
    cells = [(n, f"{p:.4f}", f"{m:.4f}", f"{p - m:+.4f}", f"{p / m - 1:+.0%}") for n, p, m in rows if m > 0]
    said = (
        f"predicted {prediction.seconds:.3g} s, measured {middle:.3g} s ({steps[0]:.3g} to {steps[-1]:.3g} s), "
        f"error {prediction.seconds / middle - 1:+.0%}"
    )
    columns = ["seconds", "predicted", "measured", "difference", "error"]
    return said, Section("Predicted and measured", said, Table(columns, cells), before_timelines=True)


def _train(settings, processes: int) -> None:
    from counterpoint.training.launch import launch

    file = Path(settings.directory, "config.yaml")
    code = launch(["-m", "counterpoint", "train", str(file)], processes, os.environ)
    if code:
        raise typer.Exit(code)


def _sample(directory: Path) -> str:
    from counterpoint.training.generate import generate
    from counterpoint.training.trained import load_trained

    model, tokenizer = load_trained(directory)
    pieces = generate(model, model.config, tokenizer, PROMPT, max_new_tokens=300, temperature=0.7)
    return PROMPT + "".join(pieces)


def write_pages(directory: Path, text: str, processes: int, prediction=None) -> tuple[Path, Path]:
    """The report page, and the picture of one layer's attention, forward and backward."""
    from rich.console import Console

    from counterpoint.cli.tables import shown
    from counterpoint.report.picture import draw_timeline
    from counterpoint.report.run import recorded_timelines, report_run
    from counterpoint.report.sections import Section, Table
    from counterpoint.report.tables import category_table
    from counterpoint.schedule.timeline import Timeline
    from counterpoint.training.verify import Verification

    result = Verification.read(directory / "verification.json")
    rows = [(d.name, f"{d.sharded:.7f}", f"{d.single:.7f}", f"{d.relative:.1e}") for d in shown(result)]
    columns = ["quantity", f"{processes} processes", "1 process", "relative difference"]
    caption = f"the loss and the five gradients, of {len(result.differences) - 1}, that differ most"
    exact = Section(
        "Sharded equals single-process",
        f"One batch of {result.tokens:,} tokens on the initial weights; all within {result.tolerance:g} relative.",
        Table(columns, rows, caption),
        before_timelines=True,
    )
    sections = [exact, Section("Sample", preformatted=text)]
    if prediction is not None:
        said, section = compared(prediction, directory)
        Console().print(said, highlight=False)
        sections.insert(0, section)
    predicted = prediction.timeline if prediction is not None else None
    page = report_run(directory, sections=sections, predicted=predicted)
    timeline = Timeline.read(max(recorded_timelines(directory).items())[1])
    Console().print(category_table(timeline))
    picture = directory / "timeline.png"
    if predicted is None:
        draw_timeline(
            timeline, picture, title="Attention of one layer, measured", window=first_layer(timeline)
        )
    else:
        window = (0.0, max(first_layer(timeline)[1], first_layer(predicted)[1]))
        title = "Attention of one layer: above predicted, below measured"
        draw_timeline(predicted, picture, other=timeline, title=title, window=window, max_ranks=2)
    return page, picture


def first_layer(timeline) -> tuple[float, float]:
    """The forward attention of the first layer on all ranks, in seconds from the start of the timeline."""
    stop = timeline.start
    for rank in timeline.ranks:
        spans = sorted((s for s in timeline.spans if s.rank == rank), key=lambda s: s.start)
        attends = [s for s in spans if s.name.startswith("attend ")]
        # a layer ends where a rank attends to its own block again, as it does first in every layer
        later = next((s.start for s in attends[1:] if s.name == attends[0].name), timeline.stop)
        stop = max(stop, *(s.stop for s in spans if s.kind == "compute" and s.stop <= later))
    return 0.0, stop - timeline.start
