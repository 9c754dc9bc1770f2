"""`counterpoint calibrate`: measure this machine, and describe it as a cluster."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated

import typer


def calibrate(
    output: Annotated[Path, typer.Option("--output", "-o", help="The cluster file to write.")] = Path(
        "this-machine.yaml"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Fewer sizes and repeats; under 90 s.")] = False,
    refresh: Annotated[
        bool, typer.Option("--refresh", help="Measure again, even if this machine has been measured before.")
    ] = False,
    ranks: Annotated[
        int | None,
        typer.Option(
            min=1, max=1024, help="Processes of one thread to measure together.", show_default="cores"
        ),
    ] = None,
    cpu: Annotated[
        bool, typer.Option("--cpu", help="Describe the processor even if there are GPUs.")
    ] = False,
    check: Annotated[
        bool, typer.Option("--check", help="Compare what the simulator predicts with a fresh measurement.")
    ] = False,
    plan: Annotated[Path | None, typer.Option(hidden=True)] = None,
) -> None:
    """Measure this machine and write it down as a cluster file.

    Rates of matmul and attention over sizes, memory bandwidth in the manner of STREAM, launch cost, messages between
    local processes one way and both ways at once, and collectives; every figure with its spread. What has been
    measured once is kept and used again, until torch or the machine changes.

        counterpoint calibrate --quick && counterpoint cluster show this-machine.yaml
    """
    from counterpoint.training.launch import worker_from

    worker = worker_from(os.environ)
    if plan is not None and worker is not None:
        from counterpoint.calibration.worker import measure_ranks

        measure_ranks(worker, plan)
        return
    check_writable(output)

    from rich.console import Console

    from counterpoint.calibration.cache import cache_file, load_cached
    from counterpoint.calibration.calibrate import calibrate as measure
    from counterpoint.calibration.machine import this_machine
    from counterpoint.calibration.show import show
    from counterpoint.calibration.text import cluster_text
    from counterpoint.calibration.timing import Effort
    from counterpoint.files import write_whole

    console, machine = Console(), this_machine()
    gpus = bool(machine.accelerators) and not cpu
    if gpus and ranks is not None:
        raise ValueError("--ranks counts processes of one thread, but the GPUs are measured; add --cpu")
    count = len(machine.accelerators) if gpus else ranks or machine.cores
    kept = cache_file(machine, count, gpus, quick, os.environ)
    calibration = None if refresh else load_cached(kept)
    if calibration is not None:
        console.print(f"this machine was measured on {calibration.date}; --refresh measures it again")
    else:
        calibration = measure(machine, count, Effort.of(quick), os.environ, gpus=gpus, quick=quick)
        keep(kept, calibration.to_json(), console)
    text, cluster = cluster_text(calibration)
    write_whole(output, text)
    show(calibration, cluster, console)
    console.print(f"written to {output}")
    if check and not gpus:
        from counterpoint.calibration.check import compare, comparison_table

        rows = compare(cluster, Effort.of(True), os.environ)
        console.print(comparison_table(rows))
        raise typer.Exit(0 if all(row.holds for row in rows) else 1)


def check_writable(output: Path) -> None:
    """Fail before measuring rather than after it.

    Raises:
        ValueError: the output is a directory, lies in a missing one, or is a file that calibrate did not write.
        OSError: it cannot be written.
    """
    from counterpoint.calibration.text import FIRST_LINE

    if output.is_dir():
        raise ValueError(
            f"--output {output} is a directory; give a file, such as {output / 'this-machine.yaml'}"
        )
    if not output.parent.is_dir():
        raise ValueError(
            f"--output {output}: there is no directory {output.parent}; make it or choose another"
        )
    if output.exists():
        with output.open(encoding="utf-8", errors="replace") as file:
            ours = file.readline().startswith(FIRST_LINE)
        if not ours:
            raise ValueError(
                f"--output {output} exists and was not written by calibrate; choose another or remove it"
            )
    trial = output.with_name(f".{output.name}.{os.getpid()}.part")
    try:
        trial.touch()
    except OSError as error:
        raise ValueError(f"--output {output} cannot be written ({error.strerror}); choose another") from None
    finally:
        trial.unlink(missing_ok=True)


def keep(path: Path, text: str, console) -> None:
    """Into the cache, if it can be written; a calibration that cannot be kept is still one."""
    from counterpoint.files import write_whole

    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, text)
    except OSError as error:
        console.print(f"[yellow]not kept for the next time: {path}: {error.strerror}")
