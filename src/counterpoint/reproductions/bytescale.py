"""ByteScale (arXiv 2502.21231): the steps of its ablation, balance, contexts and offload, by simulation."""

from __future__ import annotations

import time
from functools import lru_cache
from itertools import pairwise

import numpy as np

from counterpoint.planner.batch import BatchPlan
from counterpoint.planner.batch_predict import predict
from counterpoint.planner.batch_solvers.bytescale import BytescaleOptions, bytescale, need
from counterpoint.planner.batch_solvers.static import static
from counterpoint.reproductions.batches import bytescale_cost, of_tokens
from counterpoint.reproductions.bench import Bench
from counterpoint.reproductions.check import Check, Reproduction, Tolerance

TOKENS, LONGEST = 32_000_000, 2 * 1024 * 1024
NOTE = (
    "GPU and network of the published runs are hidden: here 1,024 H100 with 50 GB/s ports, 8K tokens a rank, 7B with 8 "
    "key/value heads, one synthetic batch of 32M tokens with the stated tail, ring attention, the remote loader left "
    "out; MegaScale's static mesh is context parallelism of context / 8K. Naive plans give ranks equal tokens. The "
    "published static step is set by messages to 97.6 %, this one's share of them is two lines below"
)
OFFLOAD = (
    "offload puts a sequence on fewer ranks, with fewer messages; here these hide behind computing without it, so it "
    "saves nothing, and the solver leaves it out where it does"
)
SLOWER = "the same with network ports of 12.5 GB/s, where messages set most of the static step, as published"
TAIL = (
    "attention is quadratic: in the synthetic batch computing itself grows by the factor of the line below, so no plan "
    "can grow less; the published data must have less of it near 2M"
)
STEPS = {
    "static": None,
    "dynamic communication": BytescaleOptions(offload=False, balance="none"),
    "+ offload": BytescaleOptions(offload=True, balance="none"),
    "+ balance": BytescaleOptions(),
}


@lru_cache(maxsize=32)
def plan(step: str, name: str, longest: int = LONGEST, network: float = 1.0) -> BatchPlan:
    """network: rates between nodes, of those of the preset."""
    cost, lengths = bytescale_cost(network), of_tokens(name, TOKENS, longest)
    options = STEPS[step]
    return static(lengths, cost, context=longest) if options is None else bytescale(lengths, cost, options)


def speed_up(step: str, name: str, network: float = 1.0) -> float:
    fixed, other = (plan(s, name, network=network) for s in ("static", step))
    return fixed.seconds / other.seconds


def message_share(network: float = 1.0) -> float:
    """Share of messages in the static step, byted-like."""
    found = predict(plan("static", "byted-like", network=network), bytescale_cost(network))
    return found.communication / found.seconds


def least_step(name: str) -> float:
    """The least gain from one step of the ablation to the next."""
    return min(plan(before, name).seconds / plan(after, name).seconds for before, after in pairwise(STEPS))


def work_per_doubling() -> float:
    """How much more computing a token needs for every doubling of the context, whatever the plan."""
    group, found = bytescale_cost().group((0,)), []
    for longest in (256 * 1024, LONGEST):
        lengths = of_tokens("github-like", TOKENS, longest)
        found.append(float(group.compute(lengths).sum()) / sum(lengths))
    return (found[1] / found[0]) ** (1 / 3)


def per_doubling(step: str) -> float:
    """How much longer a token takes for every doubling of the context from 256K to 2M, GitHub-like."""
    short, long = (plan(step, "github-like", longest) for longest in (256 * 1024, LONGEST))
    return ((long.seconds / long.tokens) / (short.seconds / short.tokens)) ** (1 / 3)


def imbalance(name: str) -> float:
    """Most over mean time of ranks."""
    cost = bytescale_cost()
    busy = np.zeros(cost.ranks)
    for bar in predict(plan("+ balance", name), cost).bars:
        busy[list(bar.group.ranks)] += bar.compute + bar.communication
    return float(busy.max() / busy.mean())


def attention_fit(bench: Bench) -> float:
    """Largest error of a1 s^2 + b1 s fitted to the published times of attention, 4K to 128K."""
    s = np.array([4, 8, 16, 32, 128]) * 1024.0
    t = np.array([0.8, 1.8, 4.8, 14.1, 175.5])
    rows = np.stack([s**2, s], axis=1) / t[:, None]
    found = np.linalg.lstsq(rows, np.ones(5), rcond=None)[0]
    return float(np.abs(rows @ found - 1).max())


def offload_delay(length: int) -> float:
    """Share of a sequence's time that copies with the chosen ratio add."""
    cost = bytescale_cost()
    chosen = need(0, length, cost, True)
    compute = sum(cost.group(tuple(range(chosen.ranks))).seconds([length]))
    return cost.offload_seconds(length / chosen.ranks, chosen.offload, compute) / compute


def offload_saves(length: int) -> float:
    """Share of the activations of layers that the chosen ratio moves to the host."""
    layers = bytescale_cost().model.num_hidden_layers
    return need(0, length, bytescale_cost(), True).offload * (layers - 2) / layers


def planning_seconds(bench: Bench) -> float:
    """A plan for 1,024 ranks when the costs are known, as they are from the second batch on."""
    cost = bytescale_cost()
    bytescale(of_tokens("github-like", TOKENS, LONGEST), cost)
    begin = time.process_time()
    bytescale(of_tokens("github-like", TOKENS, LONGEST, 1), cost)
    return time.process_time() - begin


def checks() -> list[Check]:
    published = {"dynamic communication": 1.59, "+ offload": 2.01, "+ balance": 3.69}
    found = [
        Check(f"byted-like, 2M: {step}, over static", value, "x", "ablation", "simulated", None,
              lambda bench, step=step: speed_up(step, "byted-like"), OFFLOAD if step == "+ offload" else NOTE)
        for step, value in published.items()
    ]  # fmt: skip
    found += [
        Check("byted-like, 2M: share of messages in the static step", 0.976, "", "ablation", "simulated", None,
              lambda bench: message_share(), NOTE),
        *(
            Check(f"byted-like: ports of 12.5 GB/s, {step}, over static", published[step], "x", "ablation", "simulated",
                  None, lambda bench, step=step: speed_up(step, "byted-like", 0.25), SLOWER)
            for step in published
        ),
        Check("byted-like: ports of 12.5 GB/s, share of messages in the static step", 0.976, "", "ablation",
              "simulated", None, lambda bench: message_share(0.25), SLOWER),
        *(
            Check(f"{name}: no step of the ablation is slower than the one before: least gain", 1.0, "x", "ablation",
                  "simulated", Tolerance(side="at least"), lambda bench, name=name: least_step(name))
            for name in ("byted-like", "github-like")
        ),
        Check("github-like, 2M: balanced over static, claimed up to", 7.89, "x", "end-to-end figure", "simulated", None,
              lambda bench: speed_up("+ balance", "github-like"), NOTE),
    ]  # fmt: skip
    found += [
        Check(f"github-like: time per token for every doubling, 256K to 2M, {step}", value, "x", "end-to-end figure",
              "simulated", None, lambda bench, step=step: per_doubling(step), TAIL)
        for step, value in (("static", 2.0), ("dynamic communication", 1.23), ("+ balance", 1.08))
    ]  # fmt: skip
    found.append(
        Check("github-like: computing per token for every doubling, any plan", 1.0, "x", "derived", "simulated", None,
              lambda bench: work_per_doubling(), NOTE)
    )  # fmt: skip
    found += [
        Check(f"{name}: slowest over mean rank, balanced", 1.05, "x", "section 6, slack of 5 %", "simulated",
              Tolerance(side="at most"), lambda bench, name=name: imbalance(name))
        for name in ("byted-like", "github-like")
    ]  # fmt: skip
    found += [
        Check("a1 s^2 + b1 s on published attention times: largest error", 0.0, "", "figure of layer times", "exact",
              None, attention_fit, "how well the form fits five published points, rounded to 0.1 ms"),
        Check("64K: time that the chosen offload adds", 0.02, "", "table of offload ratios", "simulated",
              Tolerance(side="at most"), lambda bench: offload_delay(65536)),
        Check("256K: ratio of offload", 1.0, "", "section 5.1", "simulated", Tolerance(),
              lambda bench: need(0, 262144, bytescale_cost(), True).offload),
        Check("64K: share of activations that the chosen ratio moves away", 0.3, "", "table of offload ratios",
              "simulated", Tolerance(side="at least"), lambda bench: offload_saves(65536)),
        Check("1,024 ranks: seconds of one core to plan", 2.0, "s", "needed ahead of every step", "measured",
              Tolerance(side="at most"), planning_seconds),
    ]  # fmt: skip
    return found


REPRODUCTION = Reproduction(
    "bytescale",
    "the ablation from static over dynamic communication and offload to balance, growth with context, balance of ranks "
    "and offload ratios on synthetic mixes, 1,024 ranks",
    tuple(checks()),
)
