"""The scale model itself: real processes in real namespaces on rate-limited links. Needs root on Linux."""

import ctypes
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from typer.testing import CliRunner

from counterpoint.cli.app import app
from counterpoint.cluster.presets import find_cluster
from counterpoint.emulation.emulate import emulate, emulate_all
from counterpoint.emulation.namespaces import Namespaces, Unsupported
from counterpoint.emulation.report import rows, step_rows, write_directory
from counterpoint.strategies.sequence.attention import AttentionProblem, parse_choices
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.strategies.sequence.linear import LinearProblem, parse_linear
from counterpoint.strategies.sequence.linear_builder import LinearShape


def supported() -> bool:
    try:
        with Namespaces(1) as made:
            made.batch(0, "ip", ["link add a0 type veth peer name b0"])
            made.batch(0, "tc", ["qdisc add dev a0 root handle 1: htb"])
            made.settings(0, {"ipv4/ip_forward": "1"})
    except Unsupported:
        return False
    return True


needs_namespaces = pytest.mark.skipif(not supported(), reason="no rights or no kernel support for namespaces")
pytestmark = pytest.mark.processes

COMMAND = [sys.executable, "-m", "counterpoint", "emulate"]


def problem_of(strategy, tokens, ranks, heads, kv_heads, head_dim=64):
    choices = parse_choices(strategy)
    shape = AttentionShape(1, heads, kv_heads, head_dim, "bfloat16")
    return AttentionProblem(shape, SequenceLayout("zigzag", tokens, ranks), (ranks,), choices, choices)


def linear_problem_of(strategy: str, tokens: int, ranks: int, heads: int) -> LinearProblem:
    choice = parse_linear(strategy)
    layout = SequenceLayout("contiguous", tokens, ranks)
    return LinearProblem(LinearShape(1, heads, 128, 128, "none", "bfloat16"), layout, choice, choice)


def host_links() -> set[str]:
    return set(os.listdir("/sys/class/net"))


@needs_namespaces
def test_shared_ports_slow_the_program_as_much_as_the_simulator_says(tmp_path):
    # both directions of four pairs cross one path here; without contention it would take 40 % less
    before = host_links()
    cluster = find_cluster("a10x4-pcie")
    problem = problem_of("tokenring", 24_000, 4, 32, 32, head_dim=128)
    result = emulate(cluster, problem, repetitions=1, environ=os.environ)
    (run,) = result.passes
    assert run.error == pytest.approx(0, abs=0.2)
    assert run.sent_bytes_expected == pytest.approx(run.sent_bytes * result.scale.shrink)
    measured, simulated = run.measured_timeline, run.simulated_timeline
    assert measured.bytes_by_link() == simulated.bytes_by_link()
    for rank in range(4):
        kinds = [sorted((s.stream, s.name) for s in t.spans if s.rank == rank) for t in (measured, simulated)]
        assert kinds[0] == kinds[1]
    assert host_links() == before
    assert len(step_rows(result)) == 3 and len(rows(result)) == 2
    page = write_directory(result, tmp_path / "out")
    assert "Published figures" in page.read_text()
    figures = json.loads((tmp_path / "out" / "emulation.json").read_text())
    assert figures["passes"]["forward"]["error"] == run.error


@needs_namespaces
def test_kernels_that_compute_give_the_results_of_one_process():
    cluster = find_cluster("ascend-full-mesh")
    problem = problem_of("ring", 1200, 2, 4, 2)
    passes = ("forward", "backward")
    result = emulate(
        cluster, problem, passes=passes, compute="real", slowdown=2000.0, repetitions=1, environ=os.environ
    )
    assert result.worst_difference is not None and result.worst_difference < 2e-5
    assert [p.which for p in result.passes] == list(passes)


@needs_namespaces
def test_problems_that_share_a_scale_model_share_its_links():
    cluster = find_cluster("ascend-full-mesh")
    problems = [problem_of("ring", 8_000, 2, 8, 8), problem_of("tokenring", 4_000, 2, 8, 2)]
    found = emulate_all(cluster, problems, repetitions=1, pass_seconds=0.3, environ=os.environ)
    assert [f.target for f in found] == problems
    assert found[0].scale.rates == pytest.approx(found[1].scale.rates)
    for f in found:
        (run,) = f.passes
        assert run.sent_bytes_expected == pytest.approx(run.sent_bytes * f.scale.shrink)
        # a link of the scale model carries what the cluster's does, divided; a pass cannot be faster than its bytes
        busiest = max(run.real_timeline.bytes_by_link().values())
        assert run.seconds > 0.9 * f.scale.slowdown * busiest / cluster.route(0, 1).bytes_per_second


# ---- taking down -------------------------------------------------------------------------------------
def state(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""


def namespaces_in_use() -> set[str]:
    """Network namespaces that some process lives in or holds open."""
    found = set()
    for process in Path("/proc").glob("[0-9]*"):
        for link in [process / "ns" / "net", *(process / "fd").glob("*")]:
            try:
                target = os.readlink(link)
            except OSError:
                continue
            if target.startswith("net:"):
                found.add(target)
    return found


def start(arguments: list[str]) -> subprocess.Popen[bytes]:
    return subprocess.Popen(
        [*COMMAND, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        # a shell's background job ignores SIGINT, and so would what it starts
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )


def children(pid: int) -> list[int]:
    try:
        return [int(c) for c in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        return []


def workers_in_namespaces(pid: int, count: int) -> dict[int, str]:
    """The workers of a run and their namespaces, once all of them have entered theirs."""
    own, end = os.readlink("/proc/self/ns/net"), time.monotonic() + 60
    while time.monotonic() < end:
        found = {}
        for child in children(pid):
            try:
                if (name := os.readlink(f"/proc/{child}/ns/net")) != own:
                    found[child] = name
            except OSError:
                continue
        if len(found) == count and len(set(found.values())) == count:
            return found
        time.sleep(0.05)
    raise AssertionError("the workers did not enter their namespaces")


@needs_namespaces
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_nothing(number):
    before = host_links()
    arguments = [
        "--cluster",
        "ascend-full-mesh",
        "--ranks",
        "2",
        "--compute",
        "timed",
        "--tokens",
        "24000",
        "--repetitions",
        "50",
    ]
    process = start(arguments)
    try:
        workers = workers_in_namespaces(process.pid, 2)
        time.sleep(1.0)
        process.send_signal(number)
        _, errors = process.communicate(timeout=30)
    finally:
        process.kill()
    assert b"Traceback" not in errors
    assert process.returncode == (-number if number == signal.SIGKILL else 128 + number)
    end = time.monotonic() + 10
    while any(state(pid) not in ("", "Z") for pid in workers) or namespaces_in_use() & set(workers.values()):
        assert time.monotonic() < end, "processes or namespaces are left"
        time.sleep(0.05)
    assert host_links() == before


@needs_namespaces
def test_a_run_that_is_stopped_while_it_builds_leaves_nothing():
    before, used = host_links(), namespaces_in_use()
    arguments = ["--cluster", "ascend-full-mesh", "--tokens", "24000"]
    process = start(arguments)
    end = time.monotonic() + 60
    while not (mine := [fd for fd in Path(f"/proc/{process.pid}/fd").glob("*") if _is_namespace(fd)]):
        assert time.monotonic() < end and process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=30)
    assert mine and process.returncode == 128 + signal.SIGTERM
    while not namespaces_in_use() <= used:
        assert time.monotonic() < end
        time.sleep(0.05)
    assert host_links() == before


def _is_namespace(path: Path) -> bool:
    try:
        return os.readlink(path).startswith("net:")
    except OSError:
        return False


# ---- mistakes ----------------------------------------------------------------------------------------
def test_what_is_missing_is_said_in_one_line(monkeypatch):
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(Unsupported, match="iproute2"):
        Namespaces(1)


@needs_namespaces
def test_a_command_that_the_kernel_refuses_is_named():
    with Namespaces(1) as made, pytest.raises(Unsupported, match="ip link add x type nosuchtype"):
        made.batch(0, "ip", ["link set lo up", "link add x type nosuchtype"])


@needs_namespaces
def test_without_rights_one_line_says_so():
    drop_bounding, sys_admin = 24, 21
    done = subprocess.run(
        [*COMMAND, "--cluster", "ascend-full-mesh", "--ranks", "2", "--compute", "timed"],
        capture_output=True,
        text=True,
        preexec_fn=lambda: ctypes.CDLL(None).prctl(drop_bounding, sys_admin, 0, 0, 0),
    )
    assert done.returncode == 2
    assert "needs root" in done.stderr and done.stderr.count("\n") == 1 and not done.stdout


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 9}, "has 8 ranks"),
        ({"ranks": 1}, "2 to 64 ranks"),
        ({"slowdown": 1.0}, "use a factor of"),
    ],
)
def test_mistakes_are_refused_before_anything_is_built(change, message):
    problem = problem_of("ring", 24_000, change.pop("ranks", 4), 8, 8)
    with pytest.raises(ValueError, match=message):
        emulate(find_cluster("ascend-full-mesh"), problem, environ=os.environ, **change)


@needs_namespaces
def test_states_beat_their_chain_as_much_as_the_simulator_says():
    problems = [linear_problem_of(strategy, 32_768, 4, 16) for strategy in ("states", "states_chain")]
    states, chain = emulate_all(
        find_cluster("a10x4-pcie"), problems, repetitions=1, pass_seconds=0.8, environ=os.environ
    )
    for result in (states, chain):
        assert result.passes[0].error == pytest.approx(0, abs=0.2)
        assert (
            result.problem.layout.tokens == 32_768
        )  # states do not shrink with the sequence; heads are fewer
    measured = [r.passes[0].seconds / r.scale.slowdown for r in (states, chain)]
    assert measured[0] < measured[1]


@needs_namespaces
def test_the_command_takes_linear_attention():
    arguments = "--cluster a10x4-pcie --ranks 2 --strategy states_chain --tokens 8192 --heads 2 --repetitions 1 --json"
    done = subprocess.run([*COMMAND, *arguments.split()], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["compute"] == "timed" and found["strategy"]["backward"] == "states_chain"
    assert found["passes"]["forward"]["cluster_sent_bytes"] == 2 * 128 * 128 * 4  # one state, to one rank


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("--strategy states --kv-heads 4", "its heads have a state each"),
        ("--strategy states --ranks 2x2", "lies over one axis"),
        ("--strategy states --layout zigzag", "linear attention takes tokens in order"),
        ("--strategy ring --decay scalar", "--decay is for states and states_chain"),
        ("--strategy states(depth=2)", "depth"),
    ],
)
def test_mistakes_with_linear_attention_are_one_line(arguments, message):
    found = CliRunner().invoke(app, ["emulate", "--cluster", "a10x4-pcie", *arguments.split()])
    assert isinstance(found.exception, ValueError)
    assert message in str(found.exception)


def test_kernels_of_linear_attention_are_held():
    problem = linear_problem_of("states", 1024, 2, 2)
    with pytest.raises(ValueError, match="use --compute timed"):
        emulate(find_cluster("a10x4-pcie"), problem, compute="real", environ=os.environ)
