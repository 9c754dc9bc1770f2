"""Bytes per rank and direction: counted by the transports, planned by the schedules, and from the published formulas.

u is the bytes of a rank's Q; N ranks; g query heads per key/value head; d head dim; e bytes per element.
"""

from __future__ import annotations

from fractions import Fraction

import pytest

from counterpoint.kernels.kernel import ITEM_BYTES
from support.cases import Case, Links, Outcome, planned, run_case

D, TOKENS_PER_PIECE, H = 8, 3, 8
EVERYWHERE = pytest.mark.parametrize(
    ("N", "g", "dtype"),
    [(2, 1, "float32"), (3, 2, "bfloat16"), (4, 4, "float32"), (4, 1, "bfloat16"), (8, 2, "float32")],
)


def run(strategy: str, N: int, g: int, dtype: str, **options) -> tuple[Links, Links, Outcome]:
    """Bytes by link, forward and backward, on which transports, schedules and timelines agree."""
    case = Case(
        (N,),
        strategy,
        heads=H,
        kv_heads=H // g,
        tokens=2 * N * TOKENS_PER_PIECE,
        dtype=dtype,
        head_dim=D,
        **options,
    )
    outcome = run_case(case)
    assert outcome.worst < (2e-5 if dtype == "float32" else 0.1), outcome.errors
    for n in (0, 1):
        assert outcome.sent[n] == outcome.received[n] == planned(outcome.schedules[n])
        lines = [line.bytes_by_link() for line in outcome.timelines[n]]
        assert {link: nbytes for line in lines for link, nbytes in line.items()} == outcome.sent[n]
        assert {rank for rank, line in enumerate(lines) for source, _ in line if source != rank} == set()
    return *outcome.sent, outcome


def sizes(N: int, dtype: str) -> tuple[Fraction, Fraction, Fraction]:
    """u; what a logsumexp adds to it, as a share of u; what float32 costs against the dtype."""
    e = ITEM_BYTES[dtype]
    return Fraction(2 * TOKENS_PER_PIECE * H * D * e), Fraction(4, D * e), Fraction(4, e)


def ring_of(N: int, way: int, nbytes: Fraction) -> Links:
    return links({(r, (r + way) % N): nbytes for r in range(N)})


def mesh_of(N: int, nbytes: Fraction) -> Links:
    return links({(r, p): nbytes for r in range(N) for p in range(N) if p != r})


def links(*parts: dict) -> Links:
    total: dict = {}
    for part in parts:
        for link, nbytes in part.items():
            total[link] = total.get(link, 0) + nbytes
    assert all(Fraction(n).denominator == 1 for n in total.values())
    return {link: int(n) for link, n in sorted(total.items()) if n}


@EVERYWHERE
@pytest.mark.parametrize("way", [1, -1])
def test_ring(N: int, g: int, dtype: str, way: int) -> None:
    u, _, fp32 = sizes(N, dtype)
    forward, backward, _ = run(f"ring(way={way})", N, g, dtype, causal=False)
    assert forward == ring_of(N, way, (N - 1) * 2 * u / g)
    assert backward == ring_of(N, way, (N - 1) * 2 * u / g + N * 2 * u / g * fp32)


@EVERYWHERE
def test_ring_with_gradients_in_the_dtype_of_the_model(N: int, g: int, dtype: str) -> None:
    u, _, _ = sizes(N, dtype)
    _, backward, _ = run(f"ring(wire_dtype={dtype})", N, g, dtype, causal=False)
    assert backward == ring_of(N, 1, (2 * (N - 1) + 2 * N) * u / g)


@EVERYWHERE
def test_bidirectional_ring(N: int, g: int, dtype: str) -> None:
    u, _, fp32 = sizes(N, dtype)
    forward, backward, _ = run("bidirectional_ring", N, g, dtype, causal=False)
    assert forward == links(*(ring_of(N, way, (N - 1) * u / g) for way in (1, -1)))
    each = (N - 1) * u / g + N * u / g * fp32
    assert backward == links(*(ring_of(N, way, each) for way in (1, -1)))


@EVERYWHERE
@pytest.mark.parametrize("packets", [1, 3])
def test_tokenring(N: int, g: int, dtype: str, packets: int) -> None:
    u, lse, fp32 = sizes(N, dtype)
    forward, backward, _ = run(f"tokenring(packets={packets})", N, g, dtype, causal=False)
    assert forward == links(ring_of(N, -1, (N - 1) * u), mesh_of(N, u * (1 + lse)))
    assert backward == links(ring_of(N, -1, (N - 1) * 2 * u * (1 + lse)), mesh_of(N, u * fp32))


@EVERYWHERE
def test_tokenring_with_queries_sent_to_all_peers_directly(N: int, g: int, dtype: str) -> None:
    u, lse, fp32 = sizes(N, dtype)
    forward, backward, _ = run("tokenring(relay=false)", N, g, dtype, causal=False)
    assert forward == mesh_of(N, u * (2 + lse))
    assert backward == mesh_of(N, 2 * u * (1 + lse) + u * fp32)


def test_tokenring_with_partial_outputs_in_bfloat16() -> None:
    u, lse, _ = sizes(4, "float32")
    forward, backward, outcome = run_wire()
    assert forward == links(ring_of(4, -1, 3 * u), mesh_of(4, u / 2 + u * lse))
    assert backward == links(ring_of(4, -1, 3 * 2 * u * (1 + lse)), mesh_of(4, u / 2))
    assert 2e-5 < outcome.worst < 1e-2, outcome.errors


def run_wire() -> tuple[Links, Links, Outcome]:
    case = Case(
        (4,), "tokenring(wire_dtype=bfloat16)", None, H, H, 8 * TOKENS_PER_PIECE, causal=False, head_dim=D
    )
    outcome = run_case(case)
    return *outcome.sent, outcome


@EVERYWHERE
def test_causal_zigzag_tokenring(N: int, g: int, dtype: str) -> None:
    """Once it has passed rank 0 only the second half of Q goes on: 0.75 of u on average, u on the fullest link."""
    u, lse, fp32 = sizes(N, dtype)
    forward, backward, _ = run("tokenring", N, g, dtype)
    share = {(i, j): Fraction(1) if i < j else Fraction(1, 2) for i in range(N) for j in range(N) if i != j}
    down = {((i + 1) % N, i): sum(share[i, j] for j in range(N) if j != i) for i in range(N)}
    assert sum(down.values()) == Fraction(3, 4) * N * (N - 1) and max(down.values()) == N - 1
    assert forward == links(
        {link: steps * u for link, steps in down.items()},
        {link: part * u * (1 + lse) for link, part in share.items()},
    )
    assert backward == links(
        {link: steps * 2 * u * (1 + lse) for link, steps in down.items()},
        {link: part * u * fp32 for link, part in share.items()},
    )


@EVERYWHERE
def test_causal_zigzag_ring_saves_only_when_it_walks_down(N: int, g: int, dtype: str) -> None:
    u, _, _ = sizes(N, dtype)
    down, _, _ = run("ring(way=-1)", N, g, dtype)
    up, _, _ = run("ring", N, g, dtype)
    whole = (N - 1) * 2 * u / g
    assert sum(down.values()) == Fraction(3, 4) * N * whole
    assert down == links({((i + 1) % N, i): whole - Fraction(i, 2) * 2 * u / g for i in range(N)})
    half = u / g  # of rank 0's keys nobody ever sees the second half
    assert up == links({((i - 1) % N, i): whole - (half if i else 0) for i in range(N)})


@EVERYWHERE
def test_allgather(N: int, g: int, dtype: str) -> None:
    u, _, fp32 = sizes(N, dtype)
    forward, backward, _ = run("allgather", N, g, dtype, causal=False)
    assert forward == mesh_of(N, 2 * u / g)
    assert backward == mesh_of(N, 2 * u / g * (1 + fp32))


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(
    ("N", "g", "dtype"),
    [(2, 1, "float32"), (2, 4, "bfloat16"), (4, 2, "float32"), (4, 1, "bfloat16"), (8, 1, "float32")],
)
def test_ulysses(N: int, g: int, dtype: str, causal: bool) -> None:
    """2 S h (1 + G/H) (P-1) / P^2 elements a rank and pass, spread evenly over its peers; backward mirrors forward."""
    tokens = 2 * N * TOKENS_PER_PIECE
    total = Fraction(2 * tokens * H * D * (N - 1), N * N) * (1 + Fraction(1, g)) * ITEM_BYTES[dtype]
    forward, backward, _ = run("ulysses", N, g, dtype, causal=causal)
    assert forward == backward == mesh_of(N, total / (N - 1))


@pytest.mark.parametrize(
    ("N", "g", "dtype"), [(4, 4, "float32"), (4, 8, "bfloat16"), (8, 4, "bfloat16"), (8, 2, "float32")]
)
def test_ulysses_with_fewer_key_value_heads_than_ranks(N: int, g: int, dtype: str) -> None:
    """Every peer gets the one head it needs; the gradients of its copies come back to be summed, in float32."""
    u, _, _ = sizes(N, dtype)
    head = Fraction(2 * TOKENS_PER_PIECE * D)
    forward, backward, _ = run("ulysses", N, g, dtype)
    assert forward == mesh_of(N, 2 * u / N + 2 * head * ITEM_BYTES[dtype])
    assert backward == mesh_of(N, 2 * u / N + 2 * head * 4)


@EVERYWHERE
def test_rsa(N: int, g: int, dtype: str) -> None:
    """2 (N-1) blocks of K forward, 6 (N-1) backward, of which 4 (N-1) are gradients in float32."""
    u, _, fp32 = sizes(N, dtype)
    forward, backward, _ = run("rsa", N, g, dtype, causal=False)
    assert forward == ring_of(N, 1, 2 * (N - 1) * u / g)
    assert backward == links(ring_of(N, 1, 2 * (N - 1) * u / g), mesh_of(N, 4 * u / g * fp32))
    if dtype == "float32":
        assert sum(backward.values()) == N * 6 * (N - 1) * u / g
    _, scattered, _ = run("rsa(reduce=reduce_scatter)", N, g, dtype, causal=False)
    assert scattered == links(ring_of(N, 1, 2 * (N - 1) * u / g), mesh_of(N, 2 * u / g * fp32))


def test_one_rank_sends_nothing() -> None:
    for strategy in ("ring", "bidirectional_ring", "tokenring", "allgather", "ulysses", "rsa"):
        assert run(strategy, 1, 2, "float32")[:2] == ({}, {})
