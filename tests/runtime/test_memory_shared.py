"""Memory policies over several processes: exact, with a layer's weights gathered and its gradients reduced as often as
without a policy."""

from __future__ import annotations

from collections import Counter
from functools import partial

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from counterpoint import SequenceLayout, attention
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.model.loss import token_loss
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.strategies.memory.policy import MemoryPolicy, parse_layers

TOKENS, DOCUMENTS = 53, (20, 33)
POLICIES = ["recompute", "stream(4)", "stream(40)", "keep,stream(3)"]


def tiny(window: int | None) -> ModelConfig:
    family = {"model_type": "mistral", "sliding_window": window} if window else {}
    return ModelConfig.preset("tiny", vocab_size=64, **family)


def batch():
    g = torch.Generator().manual_seed(0)
    ids, labels = torch.randint(64, (2, 1, TOKENS), generator=g)
    labels[:, 5:9] = -100
    return ids, labels


def step(model, layout, rank, mesh, policy, forward="tokenring"):
    """Backward pass of the token losses of this rank."""
    config = model.config
    attend = partial(attention, mesh=mesh, layout=layout, forward=forward)
    attends = [partial(attend, window=config.window(i)) for i in config.layers]
    ids, labels = (layout.shard(x, rank) for x in batch())
    loss = model(
        ids,
        layout.position_ids(rank),
        attends,
        run=layer_runs(policy, len(attends)),
        use=lambda hidden, head: token_loss(hidden, head.weight, labels, policy.head_tokens)[0],
    )
    loss.backward()


class Collectives(TorchDispatchMode):
    """Counts what gathers and reduces state, by name; attention's own messages are another matter."""

    def __init__(self) -> None:
        super().__init__()
        self.counts = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if func.namespace == "c10d" and ("allgather" in name or "reduce" in name):
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


def shared(rank: int, world_size: int, window: int | None, layers: str, layout_kind: str, forward: str):
    """Collectives by name, and the gradients of all processes, whole."""
    from torch.distributed.fsdp import fully_shard

    from support.processes import mesh

    torch.manual_seed(0)
    model = Decoder(tiny(window))
    for layer in model.model.layers:
        fully_shard(layer, mesh=mesh(world_size))
    fully_shard(model, mesh=mesh(world_size))
    layout = SequenceLayout(layout_kind, TOKENS, world_size, DOCUMENTS)
    with Collectives() as counted:
        step(model, layout, rank, mesh(world_size), MemoryPolicy(parse_layers(layers), 2, 10), forward)
    # FSDP averages over the processes, the loss is a sum
    return dict(counted.counts), {n: p.grad.full_tensor() * world_size for n, p in model.named_parameters()}


@pytest.mark.processes
@pytest.mark.parametrize(
    "window, layout, forward", [(None, "zigzag", "tokenring"), (9, "striped", "ulysses")]
)
def test_shared_sequence_under_fsdp(gloo, window, layout, forward):
    model = Decoder(tiny(window))
    step(model, SequenceLayout("zigzag", TOKENS, 1, DOCUMENTS), 0, None, MemoryPolicy(head_tokens=None))
    expected = {n: p.grad for n, p in model.named_parameters()}
    plain, _ = gloo(2).run(shared, 2, window, "keep", layout, forward)[0]
    assert plain["_reduce_scatter_base_"] == 3, "one per layer and one for the rest"
    for layers in POLICIES:
        for counts, found in gloo(2).run(shared, 2, window, layers, layout, forward):
            assert counts == plain, layers
            apart = sum(float((found[n] - g).square().sum()) for n, g in expected.items())
            whole = sum(float(g.square().sum()) for g in expected.values())
            assert (apart / whole) ** 0.5 <= 1e-6, layers
