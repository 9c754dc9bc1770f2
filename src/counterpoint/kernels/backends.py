"""The attention kernels there are: what each can do, its forward, and its backward from a logsumexp of elsewhere.

All follow the contract of `kernels.blocks`: tokens-first tensors, areas, a scale; gradients in float32.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from typing import Any, Literal

import torch
from torch import Tensor

from counterpoint.kernels import aten, calls, flash_attn, flex, plain, triton_attention
from counterpoint.kernels.mask import Area
from counterpoint.kernels.triton_attention import ATOMIC, MOST_PLANS, plans

Mask = Literal["full", "causal", "bands"]
HALF = (torch.float16, torch.bfloat16)


@dataclass(frozen=True, slots=True)
class Problem:
    """What decides whether a kernel can be used, and which one is fastest.

    mask: "causal" when an area is, "bands" when an area is limited from below (a window). areas: how many there are.
    """

    device: str
    dtype: torch.dtype
    heads: int
    kv_heads: int
    head_dim: int
    mask: Mask
    areas: int
    batch: int
    tokens: int

    @classmethod
    def of(cls, q: Tensor, k: Tensor, areas: tuple[Area, ...]) -> Problem:
        banded, causal = any(a.lo is not None for a in areas), any(a.causal for a in areas)
        mask: Mask = "bands" if banded else "causal" if causal else "full"
        batch, queries, heads, dim = q.shape
        tokens = max(queries, k.shape[1])
        return cls(q.device.type, q.dtype, heads, k.shape[2], dim, mask, len(areas), batch, tokens)


@dataclass(frozen=True, slots=True)
class Backend:
    """One way to compute attention. refuses: why a problem is beyond it, empty when it is not. device: "any" too.

    deterministic: the backward gives the same bits every time. takes_delta: rowsum(dout * out), (B, S, H), does for
    out. variant: one more way to tune the backend before it, tried when asked for. compiles: torch.compile has to run
    first, so it is tried when asked for.
    """

    name: str
    refuses: Callable[[Problem], str]
    forward: Callable[..., tuple[Tensor, Tensor]]  # (q, k, v, areas, scale)
    backward: Callable[..., tuple[Tensor, Tensor, Tensor]]  # (dout, q, k, v, out, lse, areas, scale)
    device: str = "cuda"
    deterministic: bool = True
    takes_delta: bool = False
    variant: bool = False
    compiles: bool = False


# ---- what each refuses ---------------------------------------------------------------------------
def _unless(
    problem: Problem, device: str, dtypes: tuple[torch.dtype, ...], widest: int, multiple: int = 1
) -> str:
    if problem.device != device:
        return f"runs on {device}"
    if problem.dtype not in dtypes:
        return "takes " + " or ".join(str(d).removeprefix("torch.") for d in dtypes)
    if problem.head_dim > widest or problem.head_dim % multiple:
        return f"head dims are at most {widest}" + (f" and multiples of {multiple}" if multiple > 1 else "")
    return ""


def _refuses_flash_attn(problem: Problem) -> str:
    return _unless(problem, "cuda", HALF, 256, 8) or flash_attn.missing()


def _refuses_cudnn(problem: Problem) -> str:
    bands = "" if problem.mask != "bands" else "has no bands that begin anywhere"
    return _unless(problem, "cuda", HALF, 128, 8) or bands


def _refuses_flex(problem: Problem) -> str:
    if problem.device == "cpu":
        return "torch.compile gives no logsumexp on a CPU"
    many = "more than 16 areas are compiled into its mask" if problem.areas > 16 else ""
    return _unless(problem, "cuda", (*HALF, torch.float32), 256) or many


def _refuses_triton(problem: Problem) -> str:
    if problem.device == "cuda" and find_spec("triton") is None:
        return "triton is not installed"
    return _unless(problem, "cuda", (*HALF, torch.float32), 256)


# ---- the table -----------------------------------------------------------------------------------
def _of_calls(forward: calls.Forward, backward: calls.Backward, windows: bool = False) -> tuple[Any, Any]:
    def attend(q, k, v, areas, scale):
        return calls.forward(forward, q, k, v, areas, scale, windows)

    def attend_backward(dout, q, k, v, out, lse, areas, scale):
        return calls.backward(backward, dout, q, k, v, out, lse, areas, scale, windows)

    return attend, attend_backward


def _plain_forward(q, k, v, form: calls.Form, scale: float):
    return plain.forward(q, k, v, form.causal, form.bias, scale)


def _plain_backward(dout, q, k, v, out, lse, form: calls.Form, scale: float):
    return plain.backward(dout, q, k, v, out, lse, form.causal, form.bias, scale)


PLAIN = Backend("plain", lambda problem: "", *_of_calls(_plain_forward, _plain_backward), device="any")
CPU_FLASH = Backend(
    "cpu-flash",
    lambda problem: _unless(problem, "cpu", (*HALF, torch.float32, torch.float64), 2**16),
    *_of_calls(aten.cpu_forward, aten.cpu_backward),
    device="cpu",
)


def _triton(index: int) -> Backend:
    """The Triton kernels with the tiles of this index in `plans`."""

    def refuses(problem: Problem) -> str:
        there = index < len(plans(problem.head_dim, problem.dtype))
        return _refuses_triton(problem) or ("" if there else "has no such tiles for this dtype and head dim")

    def attend(q, k, v, areas, scale):
        return triton_attention.forward(q, k, v, areas, scale, plans(q.shape[3], q.dtype)[index])

    def attend_backward(dout, q, k, v, out, lse, areas, scale):
        plan = plans(q.shape[3], q.dtype)[index]
        return triton_attention.backward(dout, q, k, v, out, lse, areas, scale, plan)

    name = f"triton-{index + 1}" if index else "triton"
    return Backend(
        name,
        refuses,
        attend,
        attend_backward,
        deterministic=index != ATOMIC,
        takes_delta=True,
        variant=index > 0,
    )


def table() -> tuple[Backend, ...]:
    """All backends. Of the Triton kernels "triton" has the usual tiles, "triton-2" and so on have others."""
    return (
        CPU_FLASH,
        Backend(
            "flash",
            lambda problem: _unless(problem, "cuda", HALF, 256, 8),
            *_of_calls(aten.flash_forward, aten.flash_backward, windows=True),
            deterministic=False,
        ),
        Backend(
            "cudnn", _refuses_cudnn, *_of_calls(aten.cudnn_forward, aten.cudnn_backward), deterministic=False
        ),
        Backend(
            "efficient",
            lambda problem: _unless(problem, "cuda", (*HALF, torch.float32), 2**16, 8),
            *_of_calls(aten.efficient_forward, aten.efficient_backward),
            deterministic=False,
        ),
        Backend(
            "flash-attn", _refuses_flash_attn, *_of_calls(flash_attn.forward, flash_attn.backward, windows=True),
            deterministic=False,
        ),
        Backend(
            "flash-attn-deterministic", _refuses_flash_attn,
            *_of_calls(flash_attn.forward, partial(flash_attn.backward, deterministic=True), windows=True),
        ),
        *(_triton(index) for index in range(MOST_PLANS)),
        Backend("flex", _refuses_flex, flex.forward, flex.backward, deterministic=False, compiles=True),
        PLAIN,
    )  # fmt: skip


def find(name: str) -> Backend:
    """The backend of this name.

    Raises:
        ValueError: there is none; all that there are are named.
    """
    for backend in table():
        if backend.name == name:
            return backend
    known = ", ".join(backend.name for backend in table())
    raise ValueError(f"attention backend '{name}' is unknown; use one of {known}")
