"""How long sequences of ragged batches may be, and what can be known of that before a run starts. No torch here."""

from __future__ import annotations

from pathlib import Path

from counterpoint.model.config import ModelConfig
from counterpoint.training.config import TrainConfig


def read_lengths(path: str | Path) -> dict[int, int]:
    """The lengths in a file by line number, one a line; blank lines are passed over.

    Raises ValueError for no such file, none in it, and, naming the line, for what is no length of at least 1.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise ValueError(f"batching.lengths = {path}: no such file; give a text file with one length a line")
    found: dict[int, int] = {}
    for number, line in enumerate(path.read_text(encoding="utf-8", errors="replace").splitlines(), 1):
        text = line.strip()
        if not text:
            continue
        if not (text.isascii() and text.isdigit()) or int(text) < 1:
            raise ValueError(
                f"{path} line {number}: {text[:40]!r} is no length; lengths are whole numbers of at least 1"
            )
        found[number] = int(text)
    if not found:
        raise ValueError(f"{path}: the file holds no lengths; write one a line")
    return found


def tokens_per_rank(config: TrainConfig) -> int:
    """How many tokens a process can hold at a time."""
    return config.batching.tokens_per_rank or -(-config.data.sequence_length // config.parallel.sequence_size)


def check_batching(config: TrainConfig, shape: ModelConfig) -> None:
    """ValueError when a sequence of the run is longer than allowed, or than its processes can hold.

    With bytescale a process holds what it offloads beside batching.tokens_per_rank. The configuration must say how
    many processes there are (`with_world_size`).
    """
    batching, parallel, longest = config.batching, config.parallel, config.data.sequence_length
    if not batching.ragged:
        return
    assert parallel.data != "auto"
    world_size, per_rank, how = parallel.data * parallel.sequence_size, tokens_per_rank(config), "each"
    what = f"a document may have data.sequence_length = {longest:,} tokens"
    if batching.lengths is not None:
        lengths = read_lengths(batching.lengths)
        line = max(lengths, key=lambda n: lengths[n])
        what = f"{batching.lengths} line {line}: a sequence of {lengths[line]:,} tokens"
        if lengths[line] > longest:
            raise ValueError(
                f"{what} is longer than data.sequence_length = {longest:,}; raise that, or shorten it"
            )
        longest = lengths[line]
    group, who = world_size, f"{world_size} processes"
    if batching.solver == "static":
        group, who = (
            parallel.sequence_size,
            f"a group of parallel.sequence = {parallel.sequence_size} processes",
        )
    elif batching.solver == "bytescale" and batching.cluster is not None:
        from counterpoint.training.ragged.planning import batch_cost

        cost = batch_cost(config, shape, world_size)
        if cost.most_offload:
            held, per_rank = per_rank, cost.capacity_with(cost.most_offload)
            how = f"each, {per_rank - held:,} of them by offloading {cost.most_offload:.0%} of activations"
    if longest > group * per_rank:
        raise ValueError(
            f"{what}, but {who} can hold {group * per_rank:,} tokens ({per_rank:,} {how}); shorten it to that, use "
            f"{-(-longest // per_rank)} processes for it, or raise batching.tokens_per_rank to "
            f"{-(-longest // group):,}"
        )
