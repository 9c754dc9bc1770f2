"""A module run in pieces of the sequence, forward and backward, whose parameters receive one gradient each.

The identity behind it (StreamBP, arXiv 2506.03077, section 3): for Z_out = f_W(Z_in) cut along the sequence,
dL/dW = sum_i (dZ_i/dW)^T dL/dZ_i, so that pieces are run again and differentiated one at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from counterpoint.model.decoder import Layer


def spans(tokens: int, pieces: int) -> list[tuple[int, int]]:
    """First and last (exclusive) token of each piece: at most `pieces`, none empty unless there are no tokens."""
    size = max(1, -(-tokens // pieces))
    return [(i, min(tokens, i + size)) for i in range(0, max(1, tokens), size)]


class Leaves:
    """Stand-ins for the parameters of a module, with a place for the sum of their gradients.

    They are leaves that share the parameters' memory: graphs of pieces end at them, and no hook of a parameter
    runs before its whole gradient is there. Sums of half-precision gradients are float32.
    """

    def __init__(self, module: nn.Module) -> None:
        self._places = [
            (m, name, p) for m in module.modules() for name, p in m._parameters.items() if p is not None
        ]
        self._leaves = [p.detach().requires_grad_(p.requires_grad) for _, _, p in self._places]
        self._sums: list[Tensor | None] = [None] * len(self._places)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """The module computes with the stand-ins."""
        try:
            for (module, name, _), leaf in zip(self._places, self._leaves, strict=True):
                module._parameters[name] = leaf  # type: ignore[assignment]
            yield
        finally:
            for module, name, parameter in self._places:
                module._parameters[name] = parameter

    def backward(
        self, outputs: Sequence[Tensor], gradients: Sequence[Tensor], inputs: Sequence[Tensor]
    ) -> list[Tensor]:
        """Gradients of the inputs; those of the stand-ins are added to the sums."""
        trained = [i for i, leaf in enumerate(self._leaves) if leaf.requires_grad]
        found = torch.autograd.grad(
            outputs, [*inputs, *(self._leaves[i] for i in trained)], gradients, allow_unused=True
        )
        for i, gradient in zip(trained, found[len(inputs) :], strict=True):
            if gradient is None:
                continue
            old = self._sums[i]
            wide = gradient.to(torch.promote_types(gradient.dtype, torch.float32))
            self._sums[i] = wide if old is None else old.add_(wide)
        return [torch.zeros_like(x) if g is None else g for x, g in zip(inputs, found, strict=False)]

    def gradients(self) -> list[Tensor | None]:
        """The sums in the parameters' dtypes, in the order of `parameters`; they are given away."""
        sums = self._sums
        self._sums = [None for _ in sums]
        return [None if g is None else g.to(leaf.dtype) for leaf, g in zip(self._leaves, sums, strict=True)]


def parameters(module: nn.Module) -> list[nn.Parameter]:
    """The parameters of a module in the order of `Leaves`."""
    return [p for m in module.modules() for p in m._parameters.values() if p is not None]


def autocast_state(device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """What brings back, in a backward pass, the autocast of now."""
    kind = device.type
    if not torch.is_autocast_enabled(kind):
        return nullcontext
    dtype = torch.get_autocast_dtype(kind)
    return lambda: torch.autocast(kind, dtype)


def tiled(module: nn.Module, x: Tensor, tiles: int) -> Tensor:
    """module(x) for a module that treats tokens alone, x (B, S, E): `tiles` pieces, one after the other.

    Only x is kept for the backward pass, and what a piece makes inside exists for one piece at a time.
    """
    if not torch.is_grad_enabled():
        return _in_pieces(module, x, tiles)
    return _Tiled.apply(x, module, tiles, *parameters(module))  # type: ignore[return-value]


def in_tiles(layer: Layer, tiles: int) -> Callable[[Tensor], Tensor] | None:
    """The feed-forward of a layer in tiles; None for the feed-forward as it is."""
    return None if tiles == 1 else partial(tiled, layer.mlp, tiles=tiles)


class _Tiled(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, module: nn.Module, tiles: int, *_: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.module, ctx.tiles, ctx.autocast = module, tiles, autocast_state(x.device)
        return _in_pieces(module, x, tiles)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dout: Tensor):
        (x,) = ctx.saved_tensors
        leaves, dx = Leaves(ctx.module), torch.empty_like(x)
        with leaves.in_place():
            for a, b in spans(x.shape[1], ctx.tiles):
                piece = x[:, a:b].detach().requires_grad_()
                with torch.enable_grad(), ctx.autocast():
                    out = ctx.module(piece)
                (dx[:, a:b],) = leaves.backward([out], [dout[:, a:b]], [piece])
                del piece, out
        return dx, None, None, *leaves.gradients()


def _in_pieces(module: nn.Module, x: Tensor, tiles: int) -> Tensor:
    parts = spans(x.shape[1], tiles)
    first = module(x[:, : parts[0][1]])
    if len(parts) == 1:
        return first
    out = first.new_empty(*x.shape[:2], *first.shape[2:])
    out[:, : parts[0][1]] = first
    del first
    for a, b in parts[1:]:
        out[:, a:b] = module(x[:, a:b])
    return out
