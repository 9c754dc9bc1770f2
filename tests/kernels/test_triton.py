"""The Triton kernels in Triton's interpreter: results and gradients equal one process, whatever the mask."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from importlib.util import find_spec

import pytest
import torch

from counterpoint.kernels.interpreter import interpreter
from counterpoint.kernels.mask import Area, AttentionMask, one_document
from counterpoint.kernels.triton_attention import Plan, Tiles, tile_lists
from support.interpreted import SMALL, Case, errors, partial_errors

pytestmark = pytest.mark.skipif(find_spec("triton") is None, reason="triton is not installed")


@pytest.fixture(scope="module")
def interpreted() -> Iterator[ProcessPoolExecutor]:
    with interpreter() as pool:
        yield pool


# Rows 0 to 4 see nothing, a full rectangle, a causal square that begins in the middle of a tile, a band to the right.
ODD = (Area(5, 30, 0, 9), Area(11, 30, 9, 28, None, 0), Area(30, 50, 20, 45, -3, 6))

CASES = {
    "causal, grouped heads, two sequences": Case(37, 2, 2, batch=2, repeat=True),
    "no mask, one key/value head": Case(33, 1, 3, 32, causal=False),
    "causal window": Case(60, window=13, repeat=True),
    "window to both sides": Case(50, causal=False, window=40),
    "documents that end inside tiles": Case(60, documents=(3, 34, 23), repeat=True),
    "documents and a window, head dim 8": Case(40, head_dim=8, window=9, documents=(11, 29)),
    "head dim 24, heads outside of tokens": Case(33, 2, 1, 24, heads_outside=True),
    "head dim 64": Case(20, 1, 2, 64),
    "more keys than queries": Case(20, keys=50, areas=(Area(0, 20, 0, 30), Area(0, 20, 30, 50, None, 0))),
    "rows that see nothing": Case(50, areas=ODD, keys=45),
    "nothing at all": Case(20, areas=()),
    "one token": Case(1, 1, 2),
    "delta in place of the output": Case(33, from_delta=True),
}


@pytest.mark.parametrize("name", CASES)
def test_float32(name: str, interpreted: ProcessPoolExecutor) -> None:
    found = interpreted.submit(errors, CASES[name]).result()
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize(("dtype", "tolerance"), [("float16", 2e-3), ("bfloat16", 1.2e-2)])
def test_half_precision(dtype: str, tolerance: float, interpreted: ProcessPoolExecutor) -> None:
    found = interpreted.submit(errors, Case(40, head_dim=32, dtype=dtype)).result()
    assert 1e-5 < max(found.values()) < tolerance, found


def test_dq_by_atomic_additions(interpreted: ProcessPoolExecutor) -> None:
    """In the interpreter programs follow each other; ragged tiles may not add what lies outside of them."""
    plan = Plan(SMALL.forward, None, SMALL.dkv)
    assert SMALL.deterministic and not plan.deterministic
    for case in (Case(37, plan=plan), Case(50, areas=ODD, keys=45, plan=plan)):
        found = interpreted.submit(errors, case).result()
        assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("cut", [7, 32])
def test_backward_of_a_part_from_the_whole_rows_logsumexp(cut: int, interpreted: ProcessPoolExecutor) -> None:
    found = interpreted.submit(partial_errors, cut).result()
    assert max(found.values()) < 2e-6, found


@pytest.mark.parametrize("queries, keys", [(16, 64), (64, 16)])
def test_other_tiles(queries: int, keys: int, interpreted: ProcessPoolExecutor) -> None:
    tiles = Tiles(queries, keys)
    found = interpreted.submit(errors, Case(66, window=30, plan=Plan(tiles, tiles, tiles))).result()
    assert max(found.values()) < 2e-6, found


def test_triton_is_imported_when_it_is_used() -> None:
    code = "import sys, counterpoint.kernels.triton_attention; assert 'triton' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize("side", ["queries", "keys"])
def test_every_tile_meets_its_areas_and_the_longest_comes_first(side) -> None:
    tokens = one_document(100)
    areas = AttentionMask(documents=(10, 55, 35)).areas(tokens, tokens)
    lists = tile_lists(areas, side, 100, 16, torch.device("cpu"))
    first, order, rows = lists.first.tolist(), lists.order.tolist(), lists.areas.tolist()
    assert sorted(order) == list(range(7)) and not lists.banded
    for tile in range(7):
        here = {tuple(row[:2]) for row in rows[first[tile] : first[tile + 1]]}
        assert here == {
            (a.q_start, a.q_stop) for a in areas if a.q_start < 16 * tile + 16 and a.q_stop > 16 * tile
        }
    assert order[0] in ((3, 4) if side == "queries" else (0, 1))
