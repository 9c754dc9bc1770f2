"""The reproductions themselves: what must come out comes out, what is known not to is reported as outside."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from counterpoint.reproductions import lasp_2, sequence_parallelism_rsa, tokenring, ulysses
from counterpoint.reproductions.bench import Bench, Case, sent, topology
from counterpoint.reproductions.check import Result, run
from counterpoint.reproductions.layer import Model, all_gather, layer_flops
from counterpoint.reproductions.memory import largest
from counterpoint.reproductions.registry import find, load
from counterpoint.schedule.check import check as check_schedules

NAMES = ("tokenring", "ulysses", "rsa")  # exact on several processes
BYTES = (*NAMES, "streambp")


def results(name: str, *kinds: str) -> list[Result]:
    checks = [check for check in load(find(name)).checks if check.kind in kinds]
    assert checks
    return list(run(checks, Bench(os.environ)))


@pytest.mark.parametrize("name", BYTES)
def test_bytes_come_out_to_the_last_one(name: str):
    for result in results(name, "bytes"):
        assert result.verdict == "holds", result


def test_times_of_tokenring_come_out():
    found = results("tokenring", "simulated")
    assert {r.verdict for r in found} == {"holds", "reported"}
    assert sum(r.verdict == "holds" for r in found) >= 16


def test_memory_of_rsa_comes_out_except_for_the_largest_batch():
    found = results("rsa", "simulated")
    outside = [r for r in found if r.verdict not in ("holds", "reported")]
    assert [r.check.value for r in outside] == [13.7]
    assert outside[0].check.note


def test_streambp_is_exact_and_its_longest_sequences_come_out():
    for result in results("streambp", "exact", "measured"):
        assert result.verdict == "holds", result
    checks = [
        c for c in load(find("streambp")).checks if c.claim.startswith(("SFT 8b", "GRPO 8b", "ZeRO-2 8b, 8"))
    ]
    found = list(run(checks, Bench(os.environ)))
    assert {r.verdict for r in found} == {"holds", "reported"}
    close = {r.check.claim: r.difference for r in found if r.verdict == "holds"}
    assert len(close) == 8 and all(abs(d) < 0.1 for d in close.values()), close


@pytest.mark.processes
@pytest.mark.slow
def test_processes_compute_what_one_process_does():
    """All cases of the three systems, on one set of processes."""
    bench = Bench(os.environ)
    cases = (*tokenring.SMALL, *ulysses.SMALL, *sequence_parallelism_rsa.SMALL)
    bench.outcome(cases[0], cases)
    checks = [c for name in NAMES for c in load(find(name)).checks if c.kind in ("exact", "measured")]
    assert len(checks) == len(cases) + 6
    for result in run(checks, bench):
        assert result.verdict == "holds", result
    assert set(bench.exact) == set(cases)  # nothing had to be run again


def test_bytes_of_lasp_2_come_out_and_its_gain_over_lasp_1_grows_with_length():
    assert {r.verdict for r in results("lasp-2", "bytes")} == {"holds"}
    growth = [c for c in load(find("lasp-2")).checks if c.claim.startswith("64 A100: gain over LASP-1")]
    (result,) = run(growth, Bench(os.environ))
    assert result.verdict == "holds" and result.got is not None and result.got > 1


@pytest.mark.processes
@pytest.mark.slow
def test_linear_attention_of_processes_is_that_of_one():
    checks = [c for c in load(find("lasp-2")).checks if c.kind == "exact"]
    assert len(checks) == len(lasp_2.SMALL)
    assert {r.verdict for r in run(checks, Bench(os.environ))} == {"holds"}


@pytest.mark.processes
@pytest.mark.slow
def test_a_wrong_kernel_is_found(tmp_path: Path):
    """Processes that scale scores differently from one process lie outside the tolerance of exactness."""
    (tmp_path / "sitecustomize.py").write_text(
        "from counterpoint.kernels import blocks\n"
        "right = blocks.attend\n"
        "blocks.attend = lambda *a, scale, **k: right(*a, scale=scale * 1.001, **k)\n"
    )
    case = Case("tokenring", (2,), 64, 4, 4, 32, 1, "float32")
    environ = {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), os.environ.get("PYTHONPATH", "")])}
    assert 2e-5 < Bench(environ).outcome(case, [case]).difference < 1e-2


def test_an_all_gather_brings_everything_to_everyone_and_crosses_nodes_once():
    from counterpoint.kernels.kernel import TensorSpec

    mesh, spec = (3, 4), TensorSpec((1, 10, 16), "bfloat16")
    schedules = [all_gather(mesh, rank, spec) for rank in range(12)]
    check_schedules(schedules)
    for schedule in schedules:
        assert len(schedule.outputs) == 12
        assert sum(schedule.sent_bytes().values()) == 11 * spec.nbytes
        across = {to: n for to, n in schedule.sent_bytes().items() if to // 4 != schedule.rank // 4}
        assert across == {to: spec.nbytes for to in range(schedule.rank % 4, 12, 4) if to != schedule.rank}


def test_channels_add_up_to_all_bytes():
    schedules = Case("tokenring", (4,), 96, 8, 2).schedules("forward")
    assert [a + b for a, b in zip(sent(schedules, "q"), sent(schedules, "out"), strict=True)] == sent(
        schedules
    )
    assert sent(schedules) == [sum(s.sent_bytes().values()) for s in schedules]


def test_flops_of_a_layer_are_those_of_its_products_and_half_the_square():
    model, tokens = Model(256, 4), 128
    products = 3 * 2 * tokens * model.hidden**2 * (3 + 1 + 4 + 4)
    square = 3 * 2 * 2 * tokens**2 * model.hidden / 2
    assert layer_flops(model, tokens) == products + square


@pytest.mark.parametrize("limit", [0.3, 1.0, 12345.678])
def test_the_largest_that_fits(limit: float):
    assert largest(lambda x: x <= limit) == pytest.approx(limit, rel=1e-8)


def test_ports_are_shared_on_a_switch_and_not_on_a_mesh():
    """One rank sending to three others takes three times as long through one port."""
    case = Case("allgather", (4,), 4000, 8, 8, causal=False, layout="contiguous")
    bench = Bench({})
    shared, own = (bench.simulate(case, "forward", topology(link, 4)).seconds for link in ("switch", "mesh"))
    assert 2 < shared / own <= 3
