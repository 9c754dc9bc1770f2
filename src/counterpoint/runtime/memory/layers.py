"""From a memory policy to the functions that run the layers of a decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.decoder import Attend, Layer, RunLayer
from counterpoint.runtime.memory.offload import Offload, Tier
from counterpoint.runtime.memory.pieces import in_tiles
from counterpoint.runtime.memory.stream import Stream
from counterpoint.strategies.memory.policy import MemoryPolicy


def layer_runs(
    policy: MemoryPolicy,
    layers: int,
    masks: Sequence[AttentionMask] | None = None,
    tier: Tier | None = None,
) -> list[RunLayer | None]:
    """How each of `layers` layers is run under a policy: the `run` argument of a decoder.

    masks: what the attention of each layer sees, when the whole sequence lies in this process; None when several
    processes share it. tier: where offloaded tensors go. Layers that offload are for one forward pass and its backward
    pass. Raises ValueError when the policy is not for so many layers, or offloads without a tier.
    """
    runs: list[RunLayer | None] = []
    before: Offload | None = None
    for i in range(layers):
        layer = policy.layer(i, layers)
        if layer.kind == "stream":
            runs.append(Stream(layer.chunks, None if masks is None else masks[i], policy.mlp_tiles))
        elif layer.kind == "recompute":
            runs.append(Recompute(policy.mlp_tiles))
        elif layer.kind == "offload":
            if tier is None:
                raise ValueError(
                    f"memory policy {layer} needs a second memory to move to; there is none without a GPU"
                )
            before = Offload(layer.share, tier, policy.mlp_tiles, before)
            runs.append(before)
        else:
            runs.append(Keep(policy.mlp_tiles) if policy.mlp_tiles > 1 else None)
    return runs


@dataclass(frozen=True, slots=True)
class Keep:
    """Everything is kept, but of the feed-forward only its input when it works in tiles."""

    mlp_tiles: int = 1

    def __call__(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return layer.compute(x, cos, sin, attend, in_tiles(layer, self.mlp_tiles))


@dataclass(frozen=True, slots=True)
class Recompute:
    """The layer's input is kept, and the backward pass runs the whole layer again first."""

    mlp_tiles: int = 1

    def __call__(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        mlp = in_tiles(layer, self.mlp_tiles)
        if not torch.is_grad_enabled():
            return layer.compute(x, cos, sin, attend, mlp)
        return checkpoint(
            layer.compute, x, cos, sin, attend, mlp, use_reentrant=False, preserve_rng_state=False
        )
