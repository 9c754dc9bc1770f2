"""Checkpoints: written whole or not at all, verified before they are read, read on any number of processes.

Tensors go through torch.distributed.checkpoint, each rank writing what it holds. A checkpoint is a directory
`step-00000100`; it bears that name only once every file is on the disk and listed, with size and checksum,
in its manifest.json. Layout:

    state.json       step, data position, configuration, shape of the model
    .metadata, *.distcp   weights, moments of the optimizer, state of the random generator
    manifest.json    name, bytes and CRC-32 of each file
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import warnings
import zlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.filesystem import FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.state_dict_loader import load as load_tensors
from torch.distributed.checkpoint.state_dict_saver import save as save_tensors

from counterpoint.training.mesh import Processes

_STATE, _MANIFEST = "state.json", "manifest.json"
_MOMENTS = ("exp_avg", "exp_avg_sq")


class CheckpointError(OSError):
    """A checkpoint could not be written; those before it are untouched."""


@dataclass(frozen=True, slots=True)
class RunState:
    """Where a run stands after `step` steps, apart from its tensors; plain JSON values."""

    step: int
    tokens: int
    data: dict[str, Any]
    config: dict[str, Any]
    model: dict[str, Any]


def save(
    folder: Path,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    state: RunState,
    keep: int,
    processes: Processes,
) -> Path:
    """Writes the checkpoint of `state.step` into `folder`, then removes all but the `keep` newest.

    Called by all ranks. Raises CheckpointError on all of them when the disk is full or refuses; nothing of
    the checkpoint is left then.
    """
    target = folder / f"step-{state.step:08d}"
    partial = folder / f".partial-{target.name}"
    try:
        processes.first(lambda: _begin(folder, partial, state))
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "torch.distributed is disabled")  # one process: it is meant so
            save_tensors(
                tensors(model, optimizer),
                storage_writer=FileSystemWriter(partial),
                process_group=processes.patient,
                no_dist=processes.world_size == 1,
            )
        mine = [f for f in partial.iterdir() if _writer(f.name) == processes.rank]
        parts = processes.gather({f.name: _sum(f) for f in mine})
        processes.first(lambda: _finish(partial, target, parts, keep))
    except (CheckpointException, OSError) as error:
        cause, full = _cause(error), processes.first(lambda: _is_full(folder))
        processes.first(lambda: shutil.rmtree(partial, ignore_errors=True))
        if cause is None:
            raise
        full = " (the disk is full)" if full or cause.errno == errno.ENOSPC else ""
        kept = next((f"; {path.name} is intact" for path in list_checkpoints(folder)), "")
        raise CheckpointError(
            f"the checkpoint of step {state.step} could not be written to {folder}: "
            f"{cause.strerror or cause}{full}{kept}; make room, then start the same command again to resume"
        ) from None
    return target


def find(folder: Path, processes: Processes, warn: Callable[[str], None]) -> Path | None:
    """The newest undamaged checkpoint in `folder`, None when there is no checkpoint at all.

    `warn` is told of each damaged one before it, and which file was wrong; that one is renamed to end in
    `.damaged`. Called by all ranks. Raises ValueError on all of them when every checkpoint is damaged.
    """
    damaged: list[tuple[Path, str]] = []
    for path in processes.first(lambda: list_checkpoints(folder)):
        fault = check(path, processes)
        if fault is None:
            processes.first(lambda: _set_aside(damaged, warn))
            return path
        damaged.append((path, fault))
    if damaged:
        path, fault = damaged[0]
        raise ValueError(f"no checkpoint is whole, {path}: {fault}; move {folder} away to start from step 0")
    return None


def check(path: Path, processes: Processes) -> str | None:
    """What is wrong with a checkpoint, naming the file; None when sizes and checksums are right.

    The ranks share the reading.
    """
    fault = None
    try:
        files = json.loads((path / _MANIFEST).read_text())["files"]
        for name, (nbytes, checksum) in sorted(files.items())[processes.rank :: processes.world_size]:
            found = (path / name).stat().st_size
            if found != nbytes:
                fault = f"{name} has {found} bytes instead of {nbytes}"
            elif _sum(path / name) != [nbytes, checksum]:
                fault = f"{name} has a wrong checksum"
    except FileNotFoundError as error:
        fault = f"{Path(error.filename).name} is missing"
    except (OSError, ValueError, KeyError, TypeError) as error:
        fault = f"{_MANIFEST} is unreadable: {error}"
    faults = processes.gather(fault)
    return processes.first(lambda: next((f for f in faults if f is not None), None))


def read_state(path: Path) -> RunState:
    """The state of a checkpoint; ValueError when `path` is not one."""
    try:
        return RunState(**json.loads((path / _STATE).read_text()))
    except FileNotFoundError:
        raise ValueError(f"{path} is not a checkpoint: it has no {_STATE}") from None
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path / _STATE} is damaged: {error}") from None


def load(path: Path, model: nn.Module, optimizer: torch.optim.Optimizer | None, processes: Processes) -> None:
    """Fills weights, and with an optimizer its moments and the random generator, however they are sharded."""
    state = tensors(model, optimizer)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "torch.distributed is disabled")
        load_tensors(
            state,
            storage_reader=FileSystemReader(path),
            process_group=processes.patient,
            no_dist=processes.world_size == 1,
        )
    if optimizer is not None:
        torch.set_rng_state(state["random"])
        step = read_state(path).step
        for parameter in (p for group in optimizer.param_groups for p in group["params"]):
            optimizer.state[parameter]["step"].fill_(step)


def tensors(model: nn.Module, optimizer: torch.optim.Optimizer | None) -> dict[str, Tensor]:
    """All tensors of a run by name, sharing memory with model and optimizer: `model.` and AdamW's moments.

    Without an optimizer the weights only. Moments that do not exist before the first step are made, as zeros.
    """
    named = dict(model.named_parameters())
    state = {f"weights.{name}": p.detach() for name, p in named.items()}
    if optimizer is None:
        return state
    for name, p in named.items():
        if p not in optimizer.state or not optimizer.state[p]:
            zeros = {moment: torch.zeros_like(p.detach()) for moment in _MOMENTS}
            optimizer.state[p] = {"step": torch.tensor(0.0), **zeros}
        state |= {f"{moment}.{name}": optimizer.state[p][moment] for moment in _MOMENTS}
    return {**state, "random": torch.get_rng_state()}


def list_checkpoints(folder: Path) -> list[Path]:
    """Complete checkpoints by name, newest first; whether their files are whole is for `check` to say."""
    return sorted((p for p in folder.glob("step-*") if p.name[5:].isdecimal()), reverse=True)


# ---- writing, on rank 0 ------------------------------------------------------------------------------
def _begin(folder: Path, partial: Path, state: RunState) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for stale in folder.glob(".partial-*"):
        shutil.rmtree(stale)
    partial.mkdir()
    _write_synced(partial / _STATE, json.dumps(asdict(state), indent=1))


def _finish(partial: Path, target: Path, parts: list[dict[str, Any]], keep: int) -> None:
    files = {name: value for part in parts for name, value in part.items()}
    _write_synced(partial / _MANIFEST, json.dumps({"files": files}, indent=1))
    _sync_directory(partial)
    if target.exists():  # the same step, written by a run that was resumed from before it
        shutil.rmtree(target)
    partial.rename(target)
    _sync_directory(target.parent)
    for old in list_checkpoints(target.parent)[keep:]:
        shutil.rmtree(old)


def _writer(name: str) -> int:
    # torch.distributed.checkpoint names a rank's files __RANK_NUMBER.distcp; the rest is rank 0's
    parts = name.split("_")
    return int(parts[2]) if name.startswith("__") and parts[2].isdecimal() else 0


def _sum(path: Path) -> list[int]:
    nbytes, checksum = 0, 0
    with path.open("rb") as file:
        while block := file.read(1 << 20):
            nbytes, checksum = nbytes + len(block), zlib.crc32(block, checksum)
    return [nbytes, checksum]


def _write_synced(path: Path, text: str) -> None:
    with path.open("w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _cause(error: BaseException) -> OSError | None:
    """The system's error behind a failed write; torch reports a collective one per rank."""
    if isinstance(error, CheckpointException):
        return next((cause for e, _ in error.failures.values() if (cause := _cause(e))), None)
    for e in _chain(error):
        if isinstance(e, OSError):
            return e
        # torch's zip writer turns a failed write into a RuntimeError about its own bookkeeping
        if isinstance(e, RuntimeError) and ("write" in str(e) or "unexpected pos" in str(e)):
            return OSError(errno.EIO, "a file could not be written")
    return None


def _is_full(folder: Path) -> bool:
    # asked while the partial checkpoint still holds what it could get
    try:
        return shutil.disk_usage(folder).free < 1 << 20
    except OSError:
        return False


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__


def _set_aside(damaged: list[tuple[Path, str]], warn: Callable[[str], None]) -> None:
    for path, fault in damaged:
        warn(f"checkpoint {path} is damaged ({fault}); falling back to the one before")
        path.rename(_unused(path.with_name(path.name + ".damaged")))


def _unused(path: Path) -> Path:
    taken = (path.with_name(f"{path.name}{n}") for n in range(1, 1000))
    return path if not path.exists() else next(p for p in taken if not p.exists())
