"""`counterpoint.attention` over real processes, through autograd, against one process in float64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch.utils.checkpoint import checkpoint

import counterpoint
from counterpoint.runtime.engine import Engine
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.layout import SequenceLayout
from support import reference
from support.cases import Case, planned
from support.processes import Pools, mesh

STRATEGIES = [
    "ring",
    "bidirectional_ring",
    "tokenring",
    "tokenring(packets=2, relay=false)",
    "allgather",
    "ulysses",
    "rsa",
]
TOKENS, HEADS, KV_HEADS, DIM, BATCH = 83, 8, 4, 16, 2
DOCUMENTS = (1, 50, 32)
pytestmark = pytest.mark.processes


class Whole:
    """The whole sequence, the same on every rank, heads first as users have it; and a rank's part of it."""

    def __init__(
        self, rank: int, *, documents: tuple[int, ...] = (), kind: str = "zigzag", dtype=torch.float32
    ) -> None:
        random = torch.Generator().manual_seed(7)
        self.rank, self.layout = rank, SequenceLayout(kind, TOKENS, dist.get_world_size(), documents)
        self.q, self.k, self.v, self.dout = (
            torch.randn(BATCH, heads, TOKENS, DIM, generator=random, dtype=torch.float64).to(dtype)
            for heads in (HEADS, KV_HEADS, KV_HEADS, HEADS)
        )

    def mine(self, x: torch.Tensor) -> torch.Tensor:
        return self.layout.shard(x, self.rank, dim=2)

    def inputs(self) -> list[torch.Tensor]:
        return [self.mine(x).requires_grad_() for x in (self.q, self.k, self.v)]

    def errors(self, got: dict[str, Any], dout: torch.Tensor | None = None, **mask: Any) -> dict[str, float]:
        """Errors of this rank's tensors by name: out, lse, dq, dk, dv, those that are given."""
        seen = reference.visible(TOKENS, mask.get("causal", True), mask.get("window"), self.layout.documents)
        tensors = [x.transpose(1, 2) for x in (self.q, self.k, self.v, self.dout if dout is None else dout)]
        expected = reference.attention(*tensors, seen, mask.get("scale"))  # type: ignore
        return {
            name: reference.error(x.detach(), self.mine(getattr(expected, name).transpose(1, 2)), 0.1)
            for name, x in got.items()
        }


def same_as_one_process(
    rank: int, calls: list[dict[str, Any]], shape: tuple[int, ...]
) -> list[dict[str, float]]:
    found = []
    for call in calls:
        options = dict(call)
        whole = Whole(rank, documents=options.pop("documents", ()), kind=options.pop("kind", "zigzag"))
        layout = options.pop("layout", whole.layout)
        q, k, v = whole.inputs()
        out, lse = counterpoint.attention(
            q, k, v, mesh=mesh(*shape), layout=layout, return_lse=True, **options
        )
        assert out.shape == q.shape and lse.shape == q.shape[:3] and not lse.requires_grad
        out.backward(whole.mine(whole.dout))
        got = {"out": out, "lse": lse, "dq": q.grad, "dk": k.grad, "dv": v.grad}
        found.append(whole.errors(got, **options))
    return found


@pytest.mark.parametrize("world_size", [2, 4, 8])
def test_every_strategy(gloo: Pools, world_size: int) -> None:
    calls = [{"forward": name} for name in STRATEGIES]
    calls += [{"forward": name, "causal": False, "window": 9} for name in STRATEGIES[:3]]
    calls += [
        {"forward": a, "backward": b, "documents": DOCUMENTS, "kind": "document-zigzag"}
        for a, b in (("ring", "tokenring"), ("rsa", "allgather"))
    ]
    calls += [
        {"forward": "tokenring", "layout": "zigzag"},
        {"forward": "ulysses", "backward": "ring", "kind": "striped", "scale": 0.2},
    ]
    for errors in zip(calls, *gloo(world_size).run(same_as_one_process, calls, (world_size,)), strict=True):
        call, *by_rank = errors
        assert max(max(e.values()) for e in by_rank) < 2e-5, (call, by_rank)  # type: ignore[union-attr]


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (2, 1, 2)])
def test_meshes_of_several_axes(gloo: Pools, shape: tuple[int, ...]) -> None:
    pairs = [
        (("ring", "tokenring"), None),
        (("tokenring", "ulysses"), ("allgather", "ring")),
        ("ulysses/rsa", "rsa/ulysses"),
    ]
    if len(shape) == 3:
        pairs = [("ring/tokenring/ulysses", None), ("ulysses/ulysses/rsa", "allgather/ring/tokenring")]
    calls = [{"forward": a, "backward": b} for a, b in pairs]
    for call, *by_rank in zip(calls, *gloo(4).run(same_as_one_process, calls, shape), strict=True):
        assert max(max(e.values()) for e in by_rank) < 2e-5, (call, by_rank)  # type: ignore[union-attr]


def in_every_way_autograd_is_used(rank: int) -> dict[str, dict[str, float]]:
    found = {}

    def attend(*qkv: torch.Tensor, **options: Any) -> torch.Tensor:
        return counterpoint.attention(*qkv, mesh=mesh(2), forward="tokenring", **options)  # type: ignore[return-value]

    whole = Whole(rank)
    q, k, v = whole.inputs()
    out = attend(q, k, v)
    out.sum().backward()  # an expanded gradient, with strides of zero
    ones = torch.ones_like(whole.dout)
    found["sum"] = whole.errors({"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}, ones)

    q, k, v = whole.inputs()
    strided = [torch.stack([x, x], -1)[..., 0] for x in (q, k, v)]
    assert not any(x.is_contiguous() for x in strided) and strided[0].stride(-1) == 2
    (attend(*strided) * whole.mine(whole.dout)).sum().backward()
    found["non-contiguous"] = whole.errors({"dq": q.grad, "dk": k.grad, "dv": v.grad})

    with torch.no_grad():
        out = attend(*whole.inputs())
    assert not out.requires_grad
    found["no_grad"] = whole.errors({"out": out})
    with torch.inference_mode():
        out = attend(*whole.inputs()).clone()
    found["inference_mode"] = whole.errors({"out": out})

    for reentrant in (True, False):
        q, k, v = whole.inputs()
        out = checkpoint(attend, q, k, v, use_reentrant=reentrant)
        out.backward(whole.mine(whole.dout))
        found[f"checkpoint {reentrant}"] = whole.errors(
            {"out": out, "dq": q.grad, "dk": k.grad, "dv": v.grad}
        )

    q, k, v = whole.inputs()
    attend(q, k.detach(), v.detach()).backward(whole.mine(whole.dout))
    found["only q"] = whole.errors({"dq": q.grad})

    q, k, v = whole.inputs()
    first, second = (
        attend(q, k, v),
        attend(q, k, v, causal=False),
    )  # two graphs at once, freed in the other order
    first.backward(whole.mine(whole.dout))
    found["first of two"] = whole.errors({"out": first, "dq": q.grad, "dk": k.grad, "dv": v.grad})
    q.grad = k.grad = v.grad = None
    second.backward(whole.mine(whole.dout))
    found["second of two"] = whole.errors({"dq": q.grad, "dk": k.grad, "dv": v.grad}, causal=False)
    return found


def test_autograd(gloo: Pools) -> None:
    for found in gloo(2).run(in_every_way_autograd_is_used):
        for way, errors in found.items():
            assert max(errors.values()) < 2e-5, (way, errors)


def what_autograd_must_refuse(rank: int) -> dict[str, str]:
    found = {}
    whole = Whole(rank)
    dout = whole.mine(whole.dout)

    def told(what: str, action) -> None:
        try:
            action()
            found[what] = "nothing"
        except RuntimeError as error:
            found[what] = f"{type(error).__name__}: {error}"

    def attend(*qkv: torch.Tensor) -> torch.Tensor:
        return counterpoint.attention(*qkv, mesh=mesh(2), forward="tokenring")  # type: ignore[return-value]

    q, k, v = whole.inputs()
    told("twice", lambda: torch.autograd.grad(attend(q, k, v), (q, k, v), dout, create_graph=True))

    q, k, v = whole.inputs()
    copies = [x * 1 for x in (q, k, v)]
    out = attend(*copies)
    with torch.no_grad():
        copies[0].zero_()
    told("input changed", lambda: out.backward(dout))

    q, k, v = whole.inputs()
    out = attend(q, k, v)
    with torch.no_grad():
        out.mul_(2)
    told("output changed", lambda: out.backward(dout))
    return found


def test_gradients_that_would_be_wrong_are_refused(gloo: Pools) -> None:
    for found in gloo(2).run(what_autograd_must_refuse):
        assert "cannot be differentiated twice" in found["twice"], found
        for changed in ("input changed", "output changed"):
            assert "modified" in found[changed] and "inplace" in found[changed], found


def on_slices_and_under_autocast(rank: int) -> tuple[list[bool], dict[str, float]]:
    """Ranks 0 and 1, and ranks 2 and 3, attend the same sequence on a slice of a mesh of data and sequence."""
    grid = mesh(2, 2, names=("data", "sequence"))
    engines = [Engine.of(grid["sequence"]), Engine.of(grid["sequence"])]
    same = [
        engines[0] is engines[1],
        Engine.of(grid["data"]) is not engines[0],
        Engine.of(grid) is not engines[0],
    ]
    layout = SequenceLayout("zigzag", TOKENS, 2)
    random = torch.Generator().manual_seed(7)
    q, k, v = (torch.randn(1, n, TOKENS, DIM, generator=random) for n in (HEADS, KV_HEADS, KV_HEADS))
    whole = [x.transpose(1, 2) for x in (q, k, v, q)]
    expected = reference.attention(*whole, reference.visible(TOKENS, True, None)).out.transpose(1, 2)  # type: ignore
    errors = {}
    for strategy in STRATEGIES:
        mine = [layout.shard(x, rank % 2, dim=2) for x in (q, k, v)]
        with torch.autocast("cpu", torch.bfloat16):
            out = counterpoint.attention(*mine, mesh=grid["sequence"], layout=layout, forward=strategy)
        errors[strategy] = reference.error(out, layout.shard(expected, rank % 2, dim=2))
    return same, errors


def test_slices_of_a_mesh_share_an_engine_and_autocast_changes_nothing(gloo: Pools) -> None:
    """Connections and threads are made once, however often the mesh is sliced; float32 given is float32 computed."""
    for same, errors in gloo(4).run(on_slices_and_under_autocast):
        assert all(same)
        assert max(errors.values()) < 2e-5, errors


def counted(rank: int, strategy: str) -> tuple[dict, dict, dict, list[str], float]:
    """Bytes by link as transport and timeline count them; categories; streams; how far they are from the wall time."""
    whole = Whole(rank)
    engine = Engine.of(mesh(4))
    before = dict(engine.transport.sent)  # type: ignore[union-attr]
    line = Timeline()
    q, k, v = whole.inputs()
    out = counterpoint.attention(q, k, v, mesh=mesh(4), layout=whole.layout, forward=strategy, timeline=line)
    out.backward(whole.mine(whole.dout))
    sent = {(rank, to): n - before.get(to, 0) for to, n in sorted(engine.transport.sent.items())}  # type: ignore[union-attr]
    read = Timeline.from_json(line.to_json())
    assert read == line
    share = line.categories(rank)
    gap = abs(share["compute"] + share["exposed"] + share["idle"] - line.seconds)
    return {link: n for link, n in sent.items() if n}, line.bytes_by_link(), share, line.streams(rank), gap


@pytest.mark.parametrize("strategy", ["tokenring", "ring", "ulysses", "rsa"])
def test_bytes_over_gloo_are_those_of_the_schedules(gloo: Pools, strategy: str) -> None:
    case = Case((4,), strategy, None, HEADS, KV_HEADS, TOKENS, batch=BATCH, head_dim=DIM)
    forward, backward = (planned(schedules) for schedules in case.schedules())
    total = {link: forward.get(link, 0) + backward.get(link, 0) for link in {**forward, **backward}}
    for rank, (sent, timed, share, streams, gap) in enumerate(gloo(4).run(counted, strategy)):
        assert sent == timed == {link: n for link, n in sorted(total.items()) if link[0] == rank}
        assert streams[0] == "compute" and gap < 1e-9 and min(share.values()) >= 0
