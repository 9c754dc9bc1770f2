"""LASP-2 (arXiv 2502.07563): exact, one collective per pass of constant size, and a step against LASP-1 and Ring.

N ranks; B batch, H heads of D for keys and E for values; e bytes of a state's elements; S tokens, C = S / N on a rank.
"""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from itertools import product

from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.presets import find_cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.reproductions.bench import Bench, Case, LinearCase, Pass, sent
from counterpoint.reproductions.check import EXACTLY, Check, Kind, Reproduction, Tolerance
from counterpoint.schedule.schedule import Collective, Recv, Send
from counterpoint.strategies.sequence.linear_builder import DECAYS

WAYS: tuple[Pass, ...] = ("forward", "backward")
LASP2 = "states(wire_dtype=bfloat16)"
LASP1, AHEAD = "states_chain(wire_dtype=bfloat16)", "states_chain(ahead=true, wire_dtype=bfloat16)"

SMALL = tuple(
    LinearCase(strategy, ranks, 37, 2, 6, 5, decay, 2, "float64", causal, documents)
    for (strategy, ranks, causal, documents), decay in product(
        (
            ("states", 2, True, ()), ("states", 4, True, ()), ("states", 4, False, ()), ("states", 4, True, (3, 30, 4)),
            ("states_chain", 4, True, ()),
        ),
        DECAYS,
    )
)  # fmt: skip


# ---- exactness and bytes ---------------------------------------------------------------------------------
def exact_checks() -> list[Check]:
    def name(case: LinearCase) -> str:
        mask = "causal" if case.causal else "no mask"
        documents = f", documents of {'+'.join(map(str, case.documents))}" if case.documents else ""
        return f"{case.ranks} processes, {case.strategy}, decay {case.decay}, {mask}{documents}"

    return [
        Check(
            f"{name(case)}: out and gradients against the recurrence, float64", 0.0, "", "algorithms 1 to 4", "exact",
            Tolerance(absolute=1e-10, side="at most"), lambda bench, case=case: bench.outcome(case, SMALL).difference,
        )
        for case in SMALL
    ]  # fmt: skip


def messages(case: LinearCase) -> int:
    """The most steps with messages that a rank has, forward and backward together."""
    return sum(
        max(sum(isinstance(s, Collective | Send | Recv) for s in schedule.steps) for schedule in case.schedules(way))
        for way in WAYS
    )  # fmt: skip


def bytes_checks() -> list[Check]:
    N, H, D = 64, 16, 128
    case = LinearCase(LASP2, N, 64 * 1024, H)
    gated = replace(case, decay="vector")
    state = H * D * D * 2
    rows: list[tuple[str, float, Pass, LinearCase]] = [
        ("no decay", N * (N - 1) / 2 * state, "forward", case),
        ("no decay", N * (N - 1) / 2 * state, "backward", case),
        ("gates", N * (N - 1) / 2 * state + (N - 1) * (N - 2) / 2 * H * D * 4, "forward", gated),
        ("no mask", N * (N - 1) * state, "forward", replace(case, causal=False)),
    ]
    checks = [
        Check(
            f"N = {N}, {what}: bytes that all ranks send {way}", value, "bytes", "B H D E e per state", "bytes",
            EXACTLY, lambda bench, c=c, way=way: sum(sent(c.schedules(way))),
        )
        for what, value, way, c in rows
    ]  # fmt: skip
    return [
        *checks,
        Check(
            "N = 64: bytes at 2,048K tokens over those at 64K", 1.0, "x", "section 3.4, independent of length", "bytes",
            EXACTLY,
            lambda bench: sum(sent(replace(case, tokens=2048 * 1024).schedules("forward")))
            / sum(sent(case.schedules("forward"))),
        ),
        Check(
            "N = 64: communication steps per layer and iteration, LASP-2", 2, "", "section 3.4", "bytes", EXACTLY,
            lambda bench: messages(case),
        ),
        Check(
            "N = 64: communication steps of a state on its way, LASP-1: 2 (N-1)", 126, "", "section 3.4", "bytes",
            EXACTLY,
            lambda bench: sum(
                isinstance(step, Send)
                for way in WAYS
                for schedule in replace(case, strategy=LASP1).schedules(way)
                for step in schedule.steps
            ),
        ),
    ]  # fmt: skip


# ---- Linear-Llama3-1B on 64 A100 ---------------------------------------------------------------------------
LAYERS, HIDDEN, INNER, HEADS, DIM, VOCABULARY = 16, 2048, 8192, 16, 128, 128_256
RANKS = 64


@lru_cache(maxsize=1)
def pod() -> Cluster:
    return find_cluster("dgx-a100-pod")


def flops(kilotokens: int) -> tuple[int, int]:
    """Of a rank's tokens: the products of a layer beside mixing, and of the head, forward."""
    tokens = kilotokens * 1024 // RANKS
    return 2 * tokens * (4 * HIDDEN**2 + 3 * HIDDEN * INNER), 2 * tokens * HIDDEN * VOCABULARY


def products(kilotokens: int) -> float:
    """Seconds of all that is not mixing tokens in a step: three times the forward products."""
    layer, head = flops(kilotokens)
    device, total = pod().device(0), 0.0
    for count, n in ((LAYERS, layer), (2 * LAYERS, layer), (3, head)):
        total += count * device.seconds("matmul", n, 0, "bfloat16")
    return total


def lockstep(bench: Bench, case: Case | LinearCase, kilotokens: int) -> float:
    """A step in which every layer waits for the last rank of the one before."""
    return LAYERS * sum(bench.simulate(case, way, pod()).seconds for way in WAYS) + products(kilotokens)


def linear(strategy: str, kilotokens: int) -> LinearCase:
    return LinearCase(strategy, RANKS, kilotokens * 1024, HEADS, DIM, DIM)


def lasp2(bench: Bench, kilotokens: int) -> float:
    """Ranks do the same work and meet in every gather, so a step is its layers one after the other."""
    return lockstep(bench, linear(LASP2, kilotokens), kilotokens)


def ring(bench: Bench, kilotokens: int) -> float:
    return lockstep(bench, Case("ring", (RANKS,), kilotokens * 1024, HEADS, HEADS, DIM), kilotokens)


def chain(bench: Bench, strategy: str, kilotokens: int) -> float:
    """LASP-1: whole steps, in which a rank goes on to the next layer once it has passed its state on.

    Two and four layers are simulated: those between cost the same, as the wait builds up only once.
    """
    few, more = (_chain_seconds(strategy, kilotokens, layers) for layers in (2, 4))
    return more + (LAYERS - 4) * (more - few) / 2


@lru_cache(maxsize=32)
def _chain_seconds(strategy: str, kilotokens: int, layers: int) -> float:
    from counterpoint.reproductions.stack import stacked
    from counterpoint.simulator.simulate import simulate

    case, (layer, head) = linear(strategy, kilotokens), flops(kilotokens)
    forward, backward = (case.schedules(way) for way in WAYS)
    hidden = TensorSpec((1, kilotokens * 1024 // RANKS, HIDDEN), "bfloat16")
    steps = []
    for f, b in zip(forward, backward, strict=True):
        back = [(2 * layer + (3 * head if i == 0 else 0), b) for i in range(layers)]
        steps.append(stacked([*[(layer, f)] * layers, *back], hidden, 1))
    return simulate(steps, pod()).seconds


def gain(bench: Bench, other: str, kilotokens: int) -> float:
    """By how much more tokens per second LASP-2 has (%)."""
    theirs = ring(bench, kilotokens) if other == "ring" else chain(bench, other, kilotokens)
    return 100 * (theirs / lasp2(bench, kilotokens) - 1)


PARTIAL = (
    "partial: mixing of tokens is simulated, matrix products are costed from the device's table; norms, activations, "
    "recomputation, the optimizer and ZeRO are left out on all sides. LASP-1 as published: a rank computes what it "
    "reads from the state, and K^T V, once the state has arrived; ranks run ahead into the next layer. Nothing was "
    "fitted. The published step takes several times longer, so what messages cost weighs less in it"
)
KEPT_BUSY = (
    "LASP-1 with K^T V computed before the state arrives (ahead=true): a link of its chain is one addition, and as the "
    "wait builds up once per pass and not in every layer, nothing is left to gain. A direct gather of 63 states brings "
    "56 of them through one network port, which a chunk of 512K tokens is too short to hide"
)
RING = (
    "Ring Attention computes softmax attention here, and its cost per token grows with length, so the gain does. No "
    "reading gives 36.6 % at 2,048K: causal products of all pairs take 16 layers x 3.5 x 18 PFLOP / 64 GPUs / 312 "
    "TFLOP/s = 50 s at peak, and passing every block of K and V on (268 MB x 63 hops, three times per layer) 16 x 2 s "
    "at 25 GB/s; by the published tokens/s a step of this length takes about 5 s"
)


def time_checks() -> list[Check]:
    source = "figure 3, Linear-Llama3-1B on 64 A100"
    claimed = {LASP1: ((512, 7.3), (2048, 15.2)), "ring": ((512, 17.8), (2048, 36.6))}
    checks = [
        Check(
            f"64 A100, {k}K tokens: LASP-2 over {'LASP-1' if other == LASP1 else 'Ring Attention'}", value, "%", source,
            "simulated", None,
            lambda bench, other=other, k=k: gain(bench, other, k), PARTIAL if other == LASP1 else RING,
        )
        for other, rows in claimed.items()
        for k, value in rows
    ]  # fmt: skip
    checks += [
        Check(
            f"64 A100: gain over {'LASP-1' if other == LASP1 else 'Ring Attention'}, 2,048K less 512K", 0.0, "%",
            "gains grow with length", "simulated", Tolerance(side="at least"),
            lambda bench, other=other: gain(bench, other, 2048) - gain(bench, other, 512), PARTIAL,
        )
        for other in claimed
    ]  # fmt: skip
    return checks + [
        Check(
            f"64 A100, {k}K tokens: LASP-2 over LASP-1 that computes ahead", value, "%", source, "simulated", None,
            lambda bench, k=k: gain(bench, AHEAD, k), KEPT_BUSY,
        )
        for k, value in claimed[LASP1]
    ]  # fmt: skip


# ---- four devices: measured and simulated order --------------------------------------------------------------
FOUR = (
    LinearCase(LASP2, 4, 32_768, HEADS),
    LinearCase(LASP1, 4, 32_768, HEADS),
    Case("ring", (4,), 32_768, HEADS, HEADS),
)
ORDER = (
    "LASP-2, LASP-1 as published, Ring Attention; forward and backward, kernels held for their time on an A10"
)


def simulated(bench: Bench, case: Case | LinearCase) -> float:
    return sum(bench.simulate(case, way, find_cluster("a10x4-pcie")).seconds for way in WAYS)


def measured(bench: Bench, case: Case | LinearCase) -> float:
    found = bench.emulate(case, FOUR, find_cluster("a10x4-pcie"))
    return sum(min(p.measured) for p in found.passes) / found.scale.slowdown


def order_checks() -> list[Check]:
    ways: tuple[tuple[Kind, str], ...] = (
        ("simulated", "simulated"),
        ("emulated", "measured on the scale model"),
    )
    seconds = {"simulated": simulated, "emulated": measured}
    pairs = (("LASP-1's", FOUR[1]), ("Ring Attention's", FOUR[2]))
    return [
        Check(
            f"4x A10, 32K tokens: {name} time over LASP-2's, {how}", 1.0, "x", "order of figure 3", kind,
            Tolerance(side="at least"),
            lambda bench, kind=kind, case=case: seconds[kind](bench, case) / seconds[kind](bench, FOUR[0]), ORDER,
        )
        for kind, how in ways
        for name, case in pairs
    ]  # fmt: skip


REPRODUCTION = Reproduction(
    "lasp-2",
    "results and gradients against the recurrence with no, scalar and vector decays; bytes that forget the length; a "
    "step of a 1B model on 64 A100 against LASP-1 and Ring Attention, and the order on a scale model",
    (*exact_checks(), *bytes_checks(), *time_checks(), *order_checks()),
)
