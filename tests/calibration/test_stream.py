"""STREAM: what is counted, and that wrong results are noticed."""

import pytest
import torch

from counterpoint.calibration.machine import last_level_cache
from counterpoint.calibration.stream import WORDS, check_result, kernel, stream


def test_bytes_are_two_or_three_words_per_element():
    found = stream(1, 2**20, 3)
    assert {name: s.points[0].size / 2**20 for name, s in found.items()} == WORDS
    assert all(len(s.points[0].seconds) == 3 for s in found.values())


def test_threads_are_put_back():
    before = torch.get_num_threads()
    stream(before + 1, 2**16, 1)
    assert torch.get_num_threads() == before


@pytest.mark.parametrize("broken", [None, *WORDS])
def test_a_kernel_that_does_not_run_is_noticed(broken):
    a, b, c = (torch.full((100,), x, dtype=torch.float64) for x in (1.0, 2.0, 0.0))
    arrays = (a, b, c)
    for _ in range(4):
        for name in WORDS:
            if name != broken:
                kernel(name, *arrays)
    if broken is None:
        check_result(arrays, 4)
    else:
        with pytest.raises(RuntimeError, match="is off by"):
            check_result(arrays, 4)


def test_the_largest_cache_is_found(tmp_path):
    assert last_level_cache(tmp_path) > 0  # nothing known: a usual size
    for index, size in enumerate(("32K", "1024K", "36M")):
        (tmp_path / f"index{index}").mkdir()
        (tmp_path / f"index{index}" / "size").write_text(size + "\n")
    assert last_level_cache(tmp_path) == 36 * 2**20
