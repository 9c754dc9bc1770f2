"""`counterpoint bench`: kernels of this machine side by side."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from counterpoint.calibration.attention import Comparison

bench = typer.Typer(help="Time kernels of this machine side by side.", no_args_is_help=True)


class Dtype(StrEnum):
    bfloat16 = "bfloat16"
    float16 = "float16"
    float32 = "float32"
    float64 = "float64"


class On(StrEnum):
    cpu = "cpu"
    cuda = "cuda"


@bench.callback()
def _bench() -> None:
    """Time kernels of this machine side by side."""


@bench.command()
def attention(
    device: Annotated[On | None, typer.Option(help="Where.", show_default="cuda if there is a GPU")] = None,
    tokens: Annotated[
        list[int] | None,
        typer.Option("--tokens", "-t", min=1, help="Sequence lengths (repeatable).", show_default="a few"),
    ] = None,
    heads: Annotated[int, typer.Option(min=1, help="Query heads.")] = 16,
    kv_heads: Annotated[
        int | None, typer.Option(min=1, help="Key/value heads.", show_default="as many")
    ] = None,
    head_dim: Annotated[int, typer.Option(min=1, max=1024, help="Elements of a head.")] = 128,
    batch: Annotated[int, typer.Option(min=1, help="Sequences.")] = 1,
    dtype: Annotated[
        Dtype | None, typer.Option(help="Number format.", show_default="bfloat16 on a GPU, else float32")
    ] = None,
    causal: Annotated[bool, typer.Option(help="Queries see no later keys.")] = True,
    window: Annotated[int | None, typer.Option(min=1, help="Keys less than so many positions away.")] = None,
    documents: Annotated[int, typer.Option(min=1, help="Packed documents of equal length.")] = 1,
    backward: Annotated[bool, typer.Option(help="The backward pass too.")] = False,
    backend: Annotated[
        list[str] | None,
        typer.Option("--backend", "-b", help="Only these (repeatable).", show_default="all that fit"),
    ] = None,
    tune: Annotated[
        bool, typer.Option("--tune", help="All tiles of the Triton kernels, and keep what is fastest.")
    ] = False,
    quick: Annotated[bool, typer.Option("--quick", help="Fewer lengths and rounds.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="As JSON, for programs.")] = False,
    record: Annotated[
        Path | None,
        typer.Option(help="Also write the figures into this folder, in a file of the machine's name."),
    ] = None,
) -> None:
    """Compare attention kernels: time, rate, share of this device's matmul rate and of the fastest kernel.

    Every kernel's results are compared with plain attention before it is timed. Rates count FLOPs as FlashAttention
    does: 4 S^2 D H forward, half of it when causal, 2.5 times that backward. Kernels take turns, and the spread of
    their times is shown.

        counterpoint bench attention --quick --backward --tokens 512 --heads 4 --head-dim 64
    """
    kv_heads = kv_heads or heads
    if heads % kv_heads:
        raise ValueError(f"--kv-heads {kv_heads} does not divide --heads {heads}")
    if record is not None and not record.is_dir():
        raise ValueError(f"--record {record} is not a folder; make it or choose another")

    import json

    import torch
    from rich.console import Console

    from counterpoint.calibration import attention as bench
    from counterpoint.calibration.progress import Bar
    from counterpoint.files import write_whole
    from counterpoint.kernels import backends as known
    from counterpoint.kernels.choice import Pass

    gpu = torch.cuda.is_available()
    if device == "cuda" and not gpu:
        raise ValueError("--device cuda: torch finds no CUDA device here; leave it out to measure the CPU")
    where = str(device or ("cuda" if gpu else "cpu"))
    number = getattr(torch, dtype or ("bfloat16" if where == "cuda" else "float32"))
    kind: known.Mask = "bands" if window is not None else "causal" if causal else "full"
    lengths = tokens or ([1024, 4096, 16384] if where == "cuda" else [512, 2048])[: 2 if quick else None]
    if documents > min(lengths):
        raise ValueError(f"--documents {documents} do not fit into {min(lengths)} tokens")
    problem = known.Problem(where, number, heads, kv_heads, head_dim, kind, documents, batch, max(lengths))
    if backend:
        chosen = [known.find(name) for name in backend]
    else:
        chosen = [
            b for b in known.table() if b.device in (where, "any") and (tune or not (b.variant or b.compiles))
        ]
    mask = bench.MaskKind(causal, window, documents)
    passes: list[Pass] = ["forward", "backward"] if backward else ["forward"]
    steps = 1 + len(lengths) * len(passes) * len(chosen)
    with Bar("attention", steps, Console(stderr=True)) as bar:
        found = bench.compare(
            problem, lengths, passes, chosen, mask=mask, seconds=0.3 if quick else 2.0, advance=bar.advance
        )
    if tune and where == "cuda":
        bench.keep(found)
    console = Console() if Console().is_terminal else Console(width=140)
    if as_json:
        typer.echo(json.dumps(found.to_json(), indent=1))
    else:
        show(found, console)
    if record is not None:
        path = record / f"attention-{bench.file_name(found.device)}.json"
        write_whole(path, json.dumps(found.to_json(), indent=1) + "\n")
        typer.echo(f"written to {path}", err=True)
    if not found.timed:
        raise typer.Exit(1)


def show(found: Comparison, console: Any) -> None:
    """A table of the kernels, and why others are not in it."""
    from rich.table import Table

    p = found.problem
    rate, side = found.peak
    table = Table(
        title=f"{found.device}, torch {found.torch}\n{p.batch} x {p.heads} heads over {p.kv_heads}, head dim "
        f"{p.head_dim}, {str(p.dtype).removeprefix('torch.')}, {found.mask}",
        caption=f"matmul: {rate / 1e12:.3g} TFLOP/s at {side} x {side}, timed again in every round; times are medians, "
        "with the fastest and slowest round in percent of them",
        title_justify="left",
        caption_justify="left",
    )
    for column in ("tokens", "pass", "kernel", "ms", "spread", "TFLOP/s", "of matmul", "of best"):
        table.add_column(column, justify="left" if column in ("pass", "kernel") else "right")
    last = None
    for t in found.timed:
        if last not in (None, (t.tokens, t.pass_)):
            table.add_section()
        last = t.tokens, t.pass_
        low, high = ((f(t.seconds) / t.median - 1) * 100 for f in (min, max))
        table.add_row(
            f"{t.tokens:,}", t.pass_, t.backend, f"{t.median * 1e3:.3g}", f"{low:+.0f} {high:+.0f} %",
            f"{t.flops_per_second / 1e12:.3g}", f"{t.of_matmul:.1%}", f"{t.of_best:.1%}",
        )  # fmt: skip
    console.print(table)
    for name, why in dict.fromkeys((x.backend, x.why) for x in found.left_out):
        console.print(f"not run: {name}: {why}", highlight=False)
