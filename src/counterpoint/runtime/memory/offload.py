"""Saved tensors of a layer in host memory from its forward to its backward pass (ByteScale, arXiv 2502.21231, 4.3).

Copies run on streams of their own, one in each direction, beside the computation: out while the layers behind are
computed, back one layer ahead of the backward pass. What comes back is bit for bit what went.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, Protocol
from weakref import WeakSet

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef

from counterpoint.model.decoder import Attend, Layer
from counterpoint.model.linear import LinearAttention
from counterpoint.runtime.memory.pieces import in_tiles
from counterpoint.strategies.memory.cost import Block, kept_tensors, total


class Tier(Protocol):
    """A memory that tensors are moved to and come back from. Tensors are flat bytes."""

    def store(self, x: Tensor) -> Any:
        """Begin to copy x away; returns what `fetch` needs."""
        ...

    def fetch(self, stored: Any) -> Any:
        """Begin to bring it back; returns what `load` needs."""
        ...

    def load(self, fetched: Any) -> Tensor:
        """The tensor, to be used on the current stream."""
        ...


class PinnedHost:
    """Page-locked host memory of a CUDA device. torch keeps freed blocks of it, so they are locked once."""

    @staticmethod
    @lru_cache(maxsize=8)
    def of(device: torch.device) -> PinnedHost:
        """The one of a device: its streams are made once."""
        return PinnedHost(device)

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.out, self.back = torch.cuda.Stream(device), torch.cuda.Stream(device)

    def store(self, x: Tensor) -> Any:
        host = torch.empty(x.shape, dtype=x.dtype, pin_memory=True)
        self.out.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.out):
            host.copy_(x, non_blocking=True)
        x.record_stream(self.out)  # its memory is not used again before the copy is done
        return host, self.out.record_event()

    def fetch(self, stored: Any) -> Any:
        host, copied = stored
        with torch.cuda.stream(self.back):
            self.back.wait_event(copied)
            x = host.to(self.device, non_blocking=True)
        return x, self.back.record_event()

    def load(self, fetched: Any) -> Tensor:
        x, arrived = fetched
        stream = torch.cuda.current_stream(self.device)
        stream.wait_event(arrived)
        x.record_stream(stream)
        return x


class Buffers:
    """Other buffers of the same memory: what a tier does, where there is no second memory to move to."""

    def store(self, x: Tensor) -> Any:
        return x.clone()

    def fetch(self, stored: Any) -> Any:
        return stored.clone()

    def load(self, fetched: Any) -> Tensor:
        return fetched


@dataclass(slots=True, weakref_slot=True, eq=False)
class Moved:
    """The storage of a tensor that lives in the tier; gone when autograd lets go of all tensors in it."""

    tier: Tier
    stored: Any
    nbytes: int
    fetched: Any = None

    def fetch(self) -> None:
        if self.fetched is None:
            self.fetched = self.tier.fetch(self.stored)

    def bytes(self) -> Tensor:
        self.fetch()
        return self.tier.load(self.fetched)


@dataclass(slots=True)
class Counted:
    """Bytes that layers have moved to the tier, each way counted once."""

    nbytes: int = 0


@dataclass(slots=True)
class Offload:
    """Runs a layer and moves up to `ratio` of what it saves to the tier: its first buffers that fit, see `cost`.

    before: the layer run before this one, whose tensors are brought back as soon as the backward pass reaches this
    one. A fresh object is needed for every forward pass that is differentiated.
    """

    ratio: float
    tier: Tier
    mlp_tiles: int = 1
    before: Offload | None = None
    counted: Counted = field(default_factory=Counted)
    moved: WeakSet[Moved] = field(default_factory=WeakSet)

    def __call__(self, layer: Layer, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        mlp = in_tiles(layer, self.mlp_tiles)
        if not torch.is_grad_enabled():
            return layer.compute(x, cos, sin, attend, mlp)
        saved = _Saved(self, self._room(layer, x), [cos, sin, *layer.parameters()])
        with torch.autograd.graph.saved_tensors_hooks(saved.pack, saved.unpack):
            return layer.compute(x, cos, sin, attend, mlp)

    def prefetch(self) -> None:
        for moved in list(self.moved):
            moved.fetch()

    def _room(self, layer: Layer, x: Tensor) -> float:
        """Bytes that may be moved: the ratio of what a layer of this shape saves."""
        if self.ratio in (0.0, 1.0):
            return torch.inf if self.ratio else 0.0
        dtype = str(x.dtype).removeprefix("torch.")
        norm = "fused" if x.device.type == "cuda" else "composed"
        linear = isinstance(layer.self_attn, LinearAttention)
        block = Block(layer.config, x.shape[0], x.shape[1], dtype, norm, linear)
        return self.ratio * total(kept_tensors(block, self.mlp_tiles))


class _Saved:
    """The hooks of one layer: whole storages go, once each, however many tensors look into them."""

    def __init__(self, layer: Offload, room: float, apart: Sequence[Tensor]) -> None:
        self.layer, self.room = layer, room
        self.apart = {t.untyped_storage()._cdata for t in apart}
        self.known: dict[int, tuple[StorageWeakRef, Moved | None]] = {}
        self.reached = False

    def pack(self, t: Tensor) -> Any:
        storage = t.untyped_storage()
        key = storage._cdata
        if key in self.apart or not storage.nbytes():
            return t
        # an address can be given to another storage once its first owner has gone
        if key not in self.known or self.known[key][0].expired():
            self.known[key] = StorageWeakRef(storage), self._move(t)
        moved = self.known[key][1]
        return t if moved is None else (moved, t.dtype, t.shape, t.stride(), t.storage_offset())

    def unpack(self, packed: Any) -> Tensor:
        if not self.reached:
            self.reached = True
            self.layer.prefetch()
            if self.layer.before is not None:
                self.layer.before.prefetch()
        if isinstance(packed, Tensor):
            return packed
        moved, dtype, shape, stride, offset = packed
        return moved.bytes().view(dtype).as_strided(shape, stride, offset)

    def _move(self, t: Tensor) -> Moved | None:
        nbytes = t.untyped_storage().nbytes()
        if nbytes > self.room:
            return None
        self.room -= nbytes
        empty = torch.empty(0, dtype=torch.uint8, device=t.device)
        whole = empty.set_(t.untyped_storage(), 0, (nbytes,), (1,))  # type: ignore[call-overload]
        moved = Moved(self.layer.tier, self.layer.tier.store(whole), nbytes)
        self.layer.moved.add(moved)
        self.layer.counted.nbytes += nbytes
        return moved
