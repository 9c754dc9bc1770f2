"""The Triton kernels compile for GPUs that are not here: tensor cores are used, and tiles fit into shared memory."""

from __future__ import annotations

from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from counterpoint.kernels.triton_attention import ATOMIC, MOST_PLANS, Tiles, plans

needs_triton = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")

SHARED = {80: 163 * 1024, 90: 227 * 1024}  # bytes that a block may have
FLOATS = ("L", "L2", "Delta", "dQ", "dK", "dV")
INTEGERS = ("areas", "first", "order")


def compiled(kernel: str, capability: int, tiles: Tiles, dtype: str, **constants: object):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from counterpoint.kernels import triton_kernels

    function = getattr(triton_kernels, kernel)
    constants |= {"BLOCK_M": tiles.queries, "BLOCK_N": tiles.keys, "PRECISION": "ieee"}
    types, aligned = {}, {}
    for i, name in enumerate(function.arg_names):
        if name in constants:
            types[name] = "constexpr"
        elif name in FLOATS:
            types[name] = "*fp32"
        elif name in INTEGERS:
            types[name] = "*i32"
        elif name in ("Q", "K", "V", "O", "dO"):
            types[name] = f"*{dtype}"
        else:
            types[name] = "fp32" if name.startswith("scale") else "i32"
        if types[name].startswith("*") or name.startswith("stride"):
            aligned[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(function, types, constants, aligned)
    options = {"num_warps": tiles.warps, "num_stages": tiles.stages}
    return triton.compile(source, GPUTarget("cuda", capability, 32), options)


@pytest.mark.slow
@needs_triton
@pytest.mark.parametrize("kernel", ["forward", "backward_dq", "backward_dkv"])
def test_the_usual_tiles_on_hopper(kernel: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    plan = plans(128)[0]
    assert plan.dq is not None
    tiles = {"forward": plan.forward, "backward_dq": plan.dq, "backward_dkv": plan.dkv}[kernel]
    flag = {"ATOMIC": False} if kernel == "backward_dkv" else {"BANDED": False}
    made = compiled(kernel, 90, tiles, "bf16", D=128, D_PAD=128, **flag)
    assert made.metadata.shared <= SHARED[90]
    assert "wgmma.mma_async" in made.asm["ptx"] and "cp.async" in made.asm["ptx"]


@needs_triton
def test_a_padded_head_dim_and_a_window_on_ampere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    tiles = Tiles(64, 32, 4, 2)
    made = compiled("forward", 80, tiles, "fp16", D=40, D_PAD=64, BANDED=True)
    assert made.metadata.shared <= SHARED[80] and "mma.sync" in made.asm["ptx"]


@pytest.mark.parametrize("dim", [16, 64, 80, 128, 256])
def test_plans(dim: int) -> None:
    """The usual tiles come first and are deterministic; one plan adds dq atomically, where the table says."""
    for dtype in (torch.bfloat16, torch.float16, torch.float32):
        known = plans(dim, dtype)
        assert 2 <= len(known) <= MOST_PLANS
        assert [i for i, plan in enumerate(known) if not plan.deterministic] == [ATOMIC]
