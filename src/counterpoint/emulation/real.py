"""A scale model whose kernels compute: what they take on this machine sets the scale."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from statistics import median
from typing import TYPE_CHECKING

from counterpoint.cluster.cluster import Cluster
from counterpoint.emulation.scale import (
    PASS_SECONDS,
    Scale,
    bytes_by_pair,
    choose_rates,
    shrunk,
    step_seconds,
)
from counterpoint.emulation.worker import Pass, Run, full_inputs
from counterpoint.kernels.kernel import torch_dtype
from counterpoint.schedule.alone import without_messages
from counterpoint.schedule.schedule import Compute, Copy, Schedule
from counterpoint.strategies.sequence.attention import AttentionProblem, backward_schedule, forward_schedule

if TYPE_CHECKING:
    from torch import Tensor

DTYPE = "float32"  # what CPUs compute fast in
PROBE_TOKENS = 1024  # of the attention whose speed says how much this machine can do in a pass
MOST_SECONDS = 20.0  # a pass that would compute longer is refused
PROBES = 3  # times that it runs, after one that warms up
FASTER = 2.0  # how much faster links may be than in a timed model: fewer ranks share this machine


def real_scale(
    cluster: Cluster,
    problem: AttentionProblem,
    passes: Sequence[Pass],
    target: Mapping[Pass, list[Schedule]],
    longest: float,
    slowdown: float | None,
) -> tuple[AttentionProblem, Scale]:
    """The problem that runs here, and its scale.

    longest: the time (s) of the longest pass on the cluster. Raises ValueError when this machine would have to
    compute too long to keep the proportion between compute and links.
    """
    everything = [s for which in passes for s in target[which]]
    flops = {which: max(_flops(s) for s in target[which]) for which in passes}
    on_target = {which: max(sum(step_seconds(cluster, s)) for s in target[which]) for which in passes}
    which = max(passes, key=lambda p: flops[p])
    here = flops[which] / _flops_per_second(problem)  # the whole sequence, on this machine
    needed = choose_rates(cluster, everything, longest) / FASTER
    item = torch_dtype(problem.shape.dtype).itemsize / torch_dtype(DTYPE).itemsize
    # tokens / s: compute falls with s squared, bytes with s, so rates are divided by (here / on_target) / s
    shorter = min((here / PASS_SECONDS) ** 0.5, here / on_target[which] * item / needed)
    if here / max(1.0, shorter) ** 2 > MOST_SECONDS:
        raise ValueError(
            f"to keep the proportion between compute and links, this machine would compute "
            f"{here / max(1.0, shorter) ** 2:.0f} s per pass; use --compute timed, or fewer tokens"
        )
    small = shrunk(problem, max(1.0, shorter), DTYPE)
    schedules = {p: _schedules(small, p) for p in passes}
    ratio = here * max(map(_flops, schedules[which])) / flops[which] / on_target[which]
    sent = sum(sum(bytes_by_pair(target[p]).values()) for p in passes)
    sent_small = sum(sum(bytes_by_pair(schedules[p]).values()) for p in passes)
    shrink = sent / sent_small if sent_small else 1.0
    return small, Scale(slowdown or ratio, shrink)


def worst_difference(run: Run) -> float:
    """Largest difference of a result from torch's attention on one process, relative to the largest value."""
    import torch

    problem, ranks = run.problem, range(run.problem.layout.world_size)
    assert isinstance(problem, AttentionProblem), "kernels of linear attention are held"
    parts = [torch.load(run.results_file(rank)) for rank in ranks]
    results = {
        name: problem.layout.unshard([part[name] for part in parts], dim=1)
        for name in parts[0]
        if all(name in part for part in parts)
    }
    whole = {name: x.transpose(1, 2) for name, x in full_inputs(problem).items()}
    q, k, v = (whole[name].requires_grad_() for name in ("q", "k", "v"))
    out = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=problem.causal, enable_gqa=True)
    expected = {"out": out}
    if "dq" in results:
        expected |= dict(
            zip(("dq", "dk", "dv"), torch.autograd.grad(out, (q, k, v), whole["dout"]), strict=True)
        )
    return max(
        ((results[name] - x.transpose(1, 2)).abs().max() / x.abs().max()).item()
        for name, x in expected.items()
    )


class Alone:
    """What a rank's kernels take, run in the order of its schedule but without messages."""

    def __init__(self, schedule: Schedule, given: Mapping[str, Tensor]) -> None:
        import torch

        from counterpoint.runtime.executor import Executor

        self.schedule, self.alone, self.executor = schedule, without_messages(schedule), Executor(None)
        self.inputs = {
            v.name: given[v.name]
            if v.name in given
            else torch.randn(v.spec.shape).to(torch_dtype(v.spec.dtype))
            for v in self.alone.inputs
        }
        self.rounds: list[list[float]] = []

    def measure(self) -> None:
        from counterpoint.runtime.executor import kernel_seconds

        self.rounds.append(kernel_seconds(self.executor, self.alone, self.inputs))

    def seconds(self) -> list[float]:
        """Of every step of the schedule, the median of all rounds but the first; 0 for messages."""
        middle = iter(median(times) for times in zip(*self.rounds[1:], strict=True))
        return [next(middle) if isinstance(step, Compute | Copy) else 0.0 for step in self.schedule.steps]


def _schedules(problem: AttentionProblem, which: Pass) -> list[Schedule]:
    write = forward_schedule if which == "forward" else backward_schedule
    return [write(problem, rank) for rank in range(problem.layout.world_size)]


def _flops(schedule: Schedule) -> int:
    return sum(
        step.kernel.work(*(schedule.values[name].spec for name in step.inputs)).flops
        for step in schedule.steps
        if isinstance(step, Compute)
    )


def _flops_per_second(problem: AttentionProblem) -> float:
    """What attention of the problem's heads attains here, on one thread."""
    import torch

    probe = _schedules(shrunk(problem, max(1.0, problem.layout.tokens / PROBE_TOKENS), DTYPE), "forward")
    first, threads = max(probe, key=_flops), torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        alone = Alone(first, {})
        for _ in range(1 + PROBES):
            alone.measure()
    finally:
        torch.set_num_threads(threads)
    return _flops(first) / sum(alone.seconds())
