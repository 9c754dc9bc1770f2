"""What is kept of a forward pass for its backward pass: a choice per layer, and how the head is cut.

A policy is data, as a schedule is. Running it is the runtime's part, pricing it the planner's.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, get_args

Kind = Literal["keep", "recompute", "stream", "offload"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class LayerPolicy:
    """How one layer remembers its activations.

    keep: all of them. recompute: its input alone, and the layer runs again in the backward pass. stream: its input
    alone, and the backward pass runs the layer again in `chunks` pieces of the sequence, one after the other, with
    keys and values of the whole sequence computed once (StreamBP, arXiv 2506.03077). offload: `ratio` of the kept
    bytes go to host memory and come back in time (ByteScale, arXiv 2502.21231); None: as many as computing hides.
    """

    kind: Kind = "keep"
    chunks: int = 1
    ratio: float | None = 0.0

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"memory policy {self.kind!r} is unknown; use one of {', '.join(KINDS)}")
        if self.chunks < 1 or (self.chunks > 1 and self.kind != "stream"):
            raise ValueError(
                f"memory policy {self.kind} with {self.chunks} chunks: only stream has chunks, at least 1"
            )
        if self.kind != "offload" and self.ratio != 0.0:
            raise ValueError(f"memory policy {self.kind} with ratio {self.ratio}: only offload has one")
        if self.ratio is not None and not 0.0 <= self.ratio <= 1.0:
            raise ValueError(f"memory policy offload with ratio {self.ratio:g}: it is from 0 to 1")

    @property
    def share(self) -> float:
        """The ratio. Raises ValueError while it is still to be found."""
        if self.ratio is None:
            raise ValueError(f"memory policy {self} has no ratio yet; give one, as in offload(0.5)")
        return self.ratio

    def __str__(self) -> str:
        if self.kind == "stream":
            return f"stream({self.chunks})"
        return self.kind if self.kind != "offload" or self.ratio is None else f"offload({self.ratio:g})"


@dataclass(frozen=True, slots=True)
class MemoryPolicy:
    """The policies of all layers (one entry stands for every layer), and how MLP and head are cut.

    mlp_tiles: pieces of the sequence that an MLP works on one after the other. head_tokens: tokens whose logits exist
    at a time in the LM head and loss; None for all.
    """

    layers: tuple[LayerPolicy, ...] = (LayerPolicy(),)
    mlp_tiles: int = 1
    head_tokens: int | None = None

    def __post_init__(self) -> None:
        if not self.layers:
            raise ValueError("a memory policy needs at least one layer policy; one stands for every layer")
        if self.mlp_tiles < 1 or (self.head_tokens is not None and self.head_tokens < 1):
            raise ValueError(
                f"mlp_tiles {self.mlp_tiles} and head_tokens {self.head_tokens} must be at least 1"
            )

    def layer(self, index: int, layers: int) -> LayerPolicy:
        """The policy of layer `index` of `layers`. Raises ValueError when the entries do not fit their number."""
        if len(self.layers) not in (1, layers):
            raise ValueError(
                f"the memory policy names {len(self.layers)} layers, the model has {layers}; "
                "give one for each, or one for all"
            )
        return self.layers[0 if len(self.layers) == 1 else index]


def parse_layers(given: str | LayerPolicy | Iterable[str | LayerPolicy]) -> tuple[LayerPolicy, ...]:
    """Layer policies from text: "recompute", "stream(8)", or one for each layer: "keep*2, stream(8)*10".

    A list is read entry by entry. Raises ValueError naming the entry that is not understood, and what is.
    """
    entries = [given] if isinstance(given, str | LayerPolicy) else list(given)
    found: list[LayerPolicy] = []
    for entry in entries:
        if isinstance(entry, LayerPolicy):
            found.append(entry)
            continue
        for text in entry.split(","):
            found += _parse_entry(text)
    return tuple(found)


def _parse_entry(text: str) -> list[LayerPolicy]:
    match = re.fullmatch(r"\s*(\w+)\s*(?:\(\s*([\d.]+|auto)\s*\))?\s*(?:\*\s*([1-9]\d*))?\s*", text)
    kind, number, times = match.groups(default="") if match else ("", "", "")
    if kind in ("keep", "recompute") and not number:
        policy = LayerPolicy(kind)  # type: ignore[arg-type]
    elif kind == "offload" and number in ("", "auto"):
        policy = LayerPolicy("offload", ratio=None)
    elif kind == "stream" and number:
        if not number.isdecimal() or int(number) < 1:
            raise ValueError(f"memory policy {text.strip()!r}: the number of chunks is a whole number from 1")
        policy = LayerPolicy("stream", chunks=int(number))
    elif kind == "offload" and number:
        try:
            policy = LayerPolicy("offload", ratio=float(number))
        except ValueError:
            raise ValueError(f"memory policy {text.strip()!r}: the ratio is a number from 0 to 1") from None
    else:
        raise ValueError(
            f"memory policy {text.strip()!r} is not understood; write keep, recompute, stream(CHUNKS), offload or "
            "offload(RATIO), with *N behind it for N layers"
        )
    return [policy] * int(times or 1)
