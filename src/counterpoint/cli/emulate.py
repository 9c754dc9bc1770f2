"""`counterpoint emulate`: the real program on a scale model of a cluster."""

from __future__ import annotations

import os
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Literal

import typer


class Passes(StrEnum):
    forward = "forward"
    backward = "backward"
    both = "both"


class Compute(StrEnum):
    timed = "timed"
    real = "real"


class Decay(StrEnum):
    none = "none"
    scalar = "scalar"
    vector = "vector"


_PASSES: dict[Passes, tuple[Literal["forward", "backward"], ...]] = {
    Passes.forward: ("forward",),
    Passes.backward: ("backward",),
    Passes.both: ("forward", "backward"),
}


def emulate(
    cluster: Annotated[str, typer.Option(help="A preset (counterpoint cluster list) or a YAML file.")],
    strategy: Annotated[
        str,
        typer.Option(
            "--strategy",
            "-s",
            help='tokenring, "ring/ulysses", ...; of linear attention: states, states_chain.',
        ),
    ] = "tokenring",
    backward: Annotated[
        str | None, typer.Option(help="Of the backward pass.", show_default="as --strategy")
    ] = None,
    tokens: Annotated[int, typer.Option(min=2)] = 24_000,
    heads: Annotated[int, typer.Option(min=1)] = 32,
    kv_heads: Annotated[int | None, typer.Option(min=1, show_default="as heads")] = None,
    head_dim: Annotated[int, typer.Option(min=1)] = 128,
    dtype: Annotated[str, typer.Option(help="On the cluster.")] = "bfloat16",
    ranks: Annotated[
        str | None, typer.Option(help="4, or a mesh: 2x4.", show_default="all of the cluster")
    ] = None,
    causal: Annotated[bool, typer.Option()] = True,
    layout: Annotated[
        str | None,
        typer.Option(help="contiguous, zigzag or striped", show_default="zigzag; contiguous for linear"),
    ] = None,
    decay: Annotated[
        Decay | None, typer.Option(help="Of linear attention: none, scalar or vector.", show_default="none")
    ] = None,
    which: Annotated[Passes, typer.Option("--pass", help="forward, backward or both")] = Passes.forward,
    compute: Annotated[
        Compute | None,
        typer.Option(
            help="timed: kernels are held for their time on the cluster. real: they compute here.",
            show_default="real if ranks <= cores and not linear, else timed",
        ),
    ] = None,
    factor: Annotated[
        float | None,
        typer.Option(min=1.0, help="How many times slower than the cluster.", show_default="chosen"),
    ] = None,
    repetitions: Annotated[
        int | None, typer.Option(min=1, help="Measured runs.", show_default="3, or 1 if real")
    ] = None,
    output: Annotated[
        Path | None, typer.Option("--output", "-o", help="A directory for the page, timelines and figures.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Figures as JSON, for programs.")] = False,
) -> None:
    """Run attention on a scale model of a cluster, and print what is measured beside what is simulated.

    The cluster's links are rebuilt on this machine as rate-limited links between Linux network namespaces, all
    slower by one factor. The program that would run on the cluster runs on them. Needs root.

        counterpoint emulate --cluster a10x4-pcie --strategy tokenring --tokens 24000
        counterpoint emulate --cluster a10x4-pcie --strategy states --tokens 32768 --heads 16
    """
    import json

    from rich.console import Console

    from counterpoint.cli.schedule import _numbers
    from counterpoint.cluster.presets import find_cluster
    from counterpoint.emulation.emulate import emulate as run
    from counterpoint.emulation.report import emulation_table, steps_table, write_directory
    from counterpoint.emulation.result import to_json
    from counterpoint.strategies.sequence.linear import LINEAR_STRATEGIES

    found = find_cluster(cluster)
    mesh = _numbers(ranks, "x", "--ranks", "4 or 2x4") if ranks else (found.world_size,)
    world_size = 1
    for n in mesh:
        world_size *= n
    linear = strategy.split("(")[0].strip() in LINEAR_STRATEGIES
    if linear:
        if kv_heads is not None:
            raise ValueError(
                f"--kv-heads {kv_heads} does not go with {strategy}: its heads have a state each"
            )
        problem = _linear(strategy, backward, tokens, heads, head_dim, dtype, mesh, causal, layout, decay)
    else:
        if decay is not None:
            raise ValueError(f"--decay is for states and states_chain; the strategy is {strategy}")
        problem = _softmax(strategy, backward, tokens, heads, kv_heads, head_dim, dtype, mesh, causal, layout)
    if compute is None and linear:
        compute = Compute.timed
    if compute is None:
        cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
        compute = Compute.real if world_size <= cores else Compute.timed
    console = Console(stderr=True)
    with console.status("") as status:
        result = run(
            found,
            problem,
            passes=_PASSES[which],
            compute="real" if compute is Compute.real else "timed",
            slowdown=factor,
            repetitions=repetitions or (1 if compute is Compute.real else 3),
            environ=os.environ,
            say=status.update,
        )
    if output is not None:
        page = write_directory(result, output)
        console.print(f"written to {page}")
    if as_json:
        typer.echo(json.dumps(to_json(result), indent=1))
    else:
        tables = (emulation_table(result), steps_table(result))
        Console().print(*(table for table in tables if table is not None), sep="\n")


def _softmax(strategy, backward, tokens, heads, kv_heads, head_dim, dtype, mesh, causal, layout):
    from math import prod

    from counterpoint.strategies.sequence.attention import AttentionProblem, parse_choices
    from counterpoint.strategies.sequence.blocks import AttentionShape
    from counterpoint.strategies.sequence.layout import SequenceLayout

    forward = parse_choices(strategy)
    return AttentionProblem(
        AttentionShape(1, heads, kv_heads or heads, head_dim, dtype),
        SequenceLayout(layout or "zigzag", tokens, prod(mesh)),
        mesh,
        forward,
        parse_choices(backward) if backward else forward,
        causal,
    )


def _linear(strategy, backward, tokens, heads, head_dim, dtype, mesh, causal, layout, decay):
    from counterpoint.strategies.sequence.layout import SequenceLayout
    from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
    from counterpoint.strategies.sequence.linear_builder import LinearShape

    if len(mesh) > 1:
        raise ValueError(f"{strategy} lies over one axis; give --ranks one number in the place of {mesh}")
    forward = parse_linear(strategy)
    return LinearProblem(
        LinearShape(1, heads, head_dim, head_dim, decay.value if decay else "none", dtype),
        SequenceLayout(layout or "contiguous", tokens, mesh[0]),
        forward,
        parse_linear(backward) if backward else forward,
        causal,
    )


def emulate_worker(job: Path) -> None:
    """One rank of `emulate`."""
    from counterpoint.emulation.worker import Job, work
    from counterpoint.training.launch import worker_from

    worker = worker_from(os.environ)
    if worker is None:
        raise ValueError("emulate-worker is started by emulate; run counterpoint emulate")
    work(Job.read(job), worker.rank)
