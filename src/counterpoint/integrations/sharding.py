"""A rank's part of a transformers batch: tokens, positions, and labels shifted before they are cut."""

from __future__ import annotations

from itertools import pairwise
from typing import NotRequired, TypedDict

import torch
from torch import Tensor

from counterpoint.strategies.sequence.layout import SequenceLayout

IGNORED = -100  # transformers' and torch's mark of a token that is not predicted


class ShardedBatch(TypedDict):
    """Keyword arguments of a sequence-parallel model. All tensors are (batch, local_tokens).

    labels and shift_labels are the same tensor: the token that follows each local token. The first makes a
    model compute its loss, the second tells transformers' loss that they are shifted.
    """

    input_ids: Tensor
    position_ids: Tensor
    use_cache: bool
    sequence_layout: SequenceLayout
    labels: NotRequired[Tensor]
    shift_labels: NotRequired[Tensor]
    num_items_in_batch: NotRequired[Tensor]


def shard_batch(
    layout: SequenceLayout,
    rank: int,
    input_ids: Tensor,
    labels: Tensor | None = None,
    position_ids: Tensor | None = None,
    num_items_in_batch: int | Tensor | None = None,
) -> ShardedBatch:
    """What `rank` holds of input_ids, labels (batch, tokens) and position_ids (1 or batch, tokens).

    Raises ValueError when a shape does not fit or a rank would hold no token.
    """
    batch, tokens = input_ids.shape
    if any(layout.local_tokens(r) == 0 for r in range(layout.world_size)):
        raise ValueError(
            f"{tokens} tokens leave some of {layout.world_size} ranks without any; "
            "use longer sequences or fewer ranks"
        )
    if position_ids is None:
        positions = layout.position_ids(rank)[None].to(input_ids.device)
    elif position_ids.shape in ((1, tokens), (batch, tokens)):
        positions = layout.shard(position_ids, rank)
    else:
        raise ValueError(
            f"position_ids must be (1, {tokens}) or ({batch}, {tokens}) for input_ids of {[batch, tokens]}, "
            f"got {list(position_ids.shape)}"
        )
    sharded: ShardedBatch = {
        "input_ids": layout.shard(input_ids, rank),
        "position_ids": positions.expand(batch, -1),
        "use_cache": False,
        "sequence_layout": layout,
    }
    if labels is None:
        return sharded
    if labels.shape != input_ids.shape:
        raise ValueError(f"labels are {list(labels.shape)}, but input_ids are {list(input_ids.shape)}")
    targets = torch.cat([labels[:, 1:], labels.new_full((batch, 1), IGNORED)], dim=1)
    own = layout.shard(targets, rank)
    if num_items_in_batch is None:
        # a batch without a single label has loss 0 rather than 0 / 0, which would end a training run
        num_items_in_batch = (targets != IGNORED).sum().clamp(min=1)
    count = torch.as_tensor(num_items_in_batch, device=input_ids.device)
    return {**sharded, "labels": own, "shift_labels": own, "num_items_in_batch": count}


def document_lengths(position_ids: Tensor) -> tuple[int, ...]:
    """Lengths of the documents in position_ids (1 or batch, tokens); () for a single one.

    A document begins wherever a position does not follow the one before. ValueError when the rows disagree.
    """
    if position_ids.ndim != 2:
        raise ValueError(f"position_ids must be (1 or batch, tokens), got {list(position_ids.shape)}")
    breaks = position_ids.diff(dim=1) != 1
    if not bool((breaks == breaks[:1]).all()):
        raise ValueError(
            "the rows of position_ids restart at different places, but rows share their documents; "
            "use batches of one row"
        )
    starts = (breaks[0].nonzero().flatten() + 1).tolist()
    edges = [0, *starts, position_ids.shape[1]]
    return tuple(b - a for a, b in pairwise(edges)) if starts else ()
