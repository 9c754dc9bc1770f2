"""DeepSpeed Ulysses (arXiv 2309.14509): exact, its bytes, and a layer's time against Megatron-SP.

N tokens over P ranks; H heads of d, h = H d; G key/value heads; e bytes per element.
"""

from __future__ import annotations

from collections.abc import Callable
from fractions import Fraction

from counterpoint.cluster.presets import find_cluster
from counterpoint.kernels.kernel import TensorSpec
from counterpoint.reproductions.bench import Bench, Case, Pass, sent
from counterpoint.reproductions.check import EXACTLY, Check, Reproduction, Tolerance
from counterpoint.reproductions.common import exactness_checks
from counterpoint.reproductions.layer import (
    Model,
    layer_flops,
    megatron_seconds,
    ulysses_case,
    ulysses_seconds,
)
from counterpoint.strategies.data.gather import all_gather

H, D, E = 32, 128, 2

SMALL = (
    Case("ulysses", (2,), 203, 8, 8, 32, 2, "float32"),
    Case("ulysses", (2,), 203, 8, 4, 32, 2, "float32"),
    Case("ulysses", (4,), 203, 8, 8, 32, 2, "float32"),
    Case("ulysses", (4,), 203, 8, 8, 32, 2, "float32", causal=False, layout="contiguous"),
    Case("ulysses", (4,), 203, 8, 2, 32, 2, "float32"),
)


# ---- bytes -----------------------------------------------------------------------------------------------
def rank_bytes(tokens: int, ranks: int, kv_heads: int, way: Pass, heads: int = H) -> int:
    """What every rank sends in a pass."""
    values = sent(Case("ulysses", (ranks,), tokens, heads, kv_heads, layout="contiguous").schedules(way))
    assert len(set(values)) == 1, f"ranks differ: {values}"
    return values[0]


def volume(tokens: int, ranks: int, kv_heads: int, heads: int = H) -> Fraction:
    """2 N h (1 + G/H) (P-1) / P^2 elements, in bytes."""
    return Fraction(2 * tokens * heads * D * (heads + kv_heads) * (ranks - 1) * E, heads * ranks**2)


def bytes_checks() -> list[Check]:
    rows: list[tuple[int, int, int, Pass]] = [
        (32_768, 8, 32, "forward"), (32_768, 8, 32, "backward"), (32_768, 8, 8, "forward"),
        (32_768, 8, 8, "backward"), (32_768, 4, 16, "forward"),
    ]  # fmt: skip
    checks = [
        Check(
            f"P = {P}, G = {G}: bytes a rank sends {way}: 2 N h (1 + G/H) (P-1)/P^2", float(volume(N, P, G)), "bytes",
            "section 3.1, with G", "bytes", EXACTLY, lambda bench, N=N, P=P, G=G, way=way: rank_bytes(N, P, G, way),
        )
        for N, P, G, way in rows
    ]  # fmt: skip
    N, P, G = (
        32_768,
        8,
        2,
    )  # every peer needs one key/value head; its gradients come back in float32 to be summed
    q_out, kv = Fraction(2 * N * H * D * (P - 1) * E, P**2), 2 * N // P * D * (P - 1)
    replicated: list[tuple[Pass, str, int]] = [("forward", "bfloat16", 2), ("backward", "float32", 4)]
    checks += [
        Check(
            f"P = {P}, G = {G} < P: bytes a rank sends {way}: 2 N h (P-1)/P^2 and 2 N d (P-1)/P ({kind})",
            float(q_out + kv * size), "bytes", "replicated key/value heads, derived", "bytes", EXACTLY,
            lambda bench, way=way: rank_bytes(N, P, G, way),
        )
        for way, kind, size in replicated
    ]  # fmt: skip
    return checks


def growth_checks() -> list[Check]:
    """N and P double together: the volume stays 4 N h / P, up to the share (P-1)/P that leaves the rank."""

    def constant(ranks: int) -> float:
        """Bytes per rank at P ranks over those at 8, the rank's own share counted in."""
        share = Fraction(ranks, ranks - 1) / Fraction(8, 7)
        return float(
            Fraction(rank_bytes(4096 * ranks, ranks, 64, "forward", 64), rank_bytes(4096 * 8, 8, 64, "forward", 64))
            * share
        )  # fmt: skip

    def plain(ranks: int) -> float:
        pair = [rank_bytes(4096 * n, n, 64, "forward", 64) for n in (ranks // 2, ranks)]
        return pair[1] / pair[0]

    return [
        *(
            Check(
                f"N and P grow {P // 8} times from P = 8: volume 4 N h / P, over that at 8", 1.0, "x", "section 3.1",
                "bytes", EXACTLY, lambda bench, P=P: constant(P),
            )
            for P in (16, 32, 64)
        ),
        Check(
            "N and P double from P = 32 to 64: bytes that leave a rank", 1.0, "x", "section 3.1", "bytes",
            Tolerance(relative=0.02), lambda bench: plain(64),
        ),
    ]  # fmt: skip


def communication(bench: Bench) -> float:
    """Bytes that a rank sends in Megatron-SP's four exchanges of a forward layer over those of Ulysses, P = 64."""
    mesh, tokens = (8, 8), 65_536
    spec = TensorSpec((1, tokens // 64, 64 * D), "bfloat16")
    return 4 * sent([all_gather(mesh, 0, spec)])[0] / rank_bytes(tokens, 64, 64, "forward", 64)


# ---- time -------------------------------------------------------------------------------------------------
CLUSTER = "dgx-a100-pod"
MODELS = {"7B": (Model(4096, 32), (4, 8)), "30B": (Model(8192, 64), (8, 8))}
PUBLISHED = {  # TFLOP/s per GPU, Ulysses and Megatron-SP, read from a figure; K tokens = 1,024
    "7B": {8: (159, 106), 32: (178, 164), 64: (181, 165), 128: (176, 158), 256: (174, None)},
    "30B": {8: (165, 45), 16: (157, 67), 64: (147, 104), 256: (134, None)},
}
PARTIAL = (
    "partial: attention and exchanges are simulated and matrix products costed from the device's table; norms, "
    "embeddings, loss, optimizer and ZeRO-3's gathers are left out, FLOPs are counted as executed (half of the causal "
    "square). All GPUs share one sequence here; the published degree of parallelism, batch, recomputation and sizes of "
    "the 30B model (here hidden 8,192, 64 heads) are not known, and its A100 have 40 GB. Nothing was fitted"
)


def teraflops(bench: Bench, name: str, kilotokens: int, seconds: Callable[..., float]) -> float:
    """TFLOP/s per GPU of a layer."""
    (model, mesh), tokens = MODELS[name], 1024 * kilotokens
    took = seconds(bench, model, mesh, tokens, find_cluster(CLUSTER))
    return layer_flops(model, tokens) / took / (mesh[0] * mesh[1]) / 1e12


def faster(bench: Bench, name: str, kilotokens: int) -> float:
    """Time of a layer under Megatron-SP over that under Ulysses."""
    ours, theirs = (teraflops(bench, name, kilotokens, f) for f in (ulysses_seconds, megatron_seconds))
    return ours / theirs


def exchange_share(bench: Bench, name: str, kilotokens: int) -> float:
    """Share of Ulysses' attention time in which nothing but exchanges is under way."""
    model, mesh = MODELS[name]
    timeline = bench.simulate(ulysses_case(model, mesh, 1024 * kilotokens), "forward", find_cluster(CLUSTER))
    return timeline.categories(0)["exposed"] / timeline.seconds


def time_checks() -> list[Check]:
    source = "figures of throughput, dense attention"
    sizes = {"7B": "7B on 32", "30B": "30B on 64"}
    compared = [(name, k) for name, rows in PUBLISHED.items() for k, (_, other) in rows.items() if other]
    checks = [
        Check(
            f"{sizes[name]} A100, {k}K tokens: {system}, a layer", claimed, "TFLOP/s", source, "simulated", None,
            lambda bench, name=name, k=k, seconds=seconds: teraflops(bench, name, k, seconds), PARTIAL,
        )
        for name, rows in PUBLISHED.items()
        for k, figures in rows.items()
        for system, claimed, seconds in zip(
            ("Ulysses", "Megatron-SP"), figures, (ulysses_seconds, megatron_seconds), strict=True
        )
        if claimed
    ]  # fmt: skip
    checks += [
        Check(
            f"{sizes[name]} A100, {k}K tokens: Ulysses over Megatron-SP", round(ours / other, 3), "x", source,
            "simulated", None, lambda bench, name=name, k=k: faster(bench, name, k), PARTIAL,
        )
        for name, rows in PUBLISHED.items()
        for k, (ours, other) in rows.items()
        if other
    ]  # fmt: skip
    return [
        *checks,
        Check(
            "up to 2.5 times faster: largest of these ratios", 2.5, "x", "abstract", "simulated", None,
            lambda bench: max(faster(bench, *row) for row in compared), PARTIAL,
        ),
        Check(
            "never slower than Megatron-SP: smallest of these ratios", 1.0, "x", source, "simulated",
            Tolerance(side="at least"), lambda bench: min(faster(bench, *row) for row in compared),
        ),
    ]  # fmt: skip


REPRODUCTION = Reproduction(
    "ulysses",
    "results and gradients against one process; bytes with few and many key/value heads, constant when tokens and "
    "ranks grow together; a layer's throughput on A100 pods against Megatron-SP (in part)",
    (
        *exactness_checks(SMALL, "section 3, any attention"),
        *bytes_checks(),
        *growth_checks(),
        Check(
            "P = 64: bytes of Megatron-SP's exchanges over Ulysses', a forward layer", 10.0, "x", "abstract", "bytes",
            Tolerance(side="at least"), communication,
        ),
        *time_checks(),
    ),
)  # fmt: skip
