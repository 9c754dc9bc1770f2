"""A ragged batch under any plan: loss and gradients are those of one process that takes sequence by sequence."""

from __future__ import annotations

from dataclasses import replace
from functools import lru_cache
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings

from counterpoint.model.decoder import Decoder
from counterpoint.planner.batch import BatchPlan, Group, MicroBatch
from counterpoint.strategies.sequence.layout import SequenceLayout
from counterpoint.training.config import load_config
from counterpoint.training.corpus import open_corpus
from counterpoint.training.mesh import Processes
from counterpoint.training.mixing import States
from counterpoint.training.model import model_config
from counterpoint.training.optimizer import full
from counterpoint.training.ragged.step import RaggedBatch, ragged_gradients, ragged_losses
from counterpoint.training.ragged.stream import BatchSize, RaggedStream
from counterpoint.training.step import shard
from counterpoint.training.tokenizer import ByteTokenizer
from counterpoint.training.verify import random_lengths
from support.plans import plans
from support.processes import Pools, mesh
from training.runs import write_corpus

pytestmark = pytest.mark.processes


def opened(corpus: Path, lengths: tuple[int, ...]) -> RaggedStream:
    size = BatchSize(sequences=len(lengths))
    return RaggedStream(open_corpus([corpus]), ByteTokenizer(), size, 1000, 0, lengths)


SOFTMAX = {"preset": "tiny", "num_hidden_layers": 2}
# gates and a short convolution; the first layer takes tokens in order, the last as softmax layers have them
HYBRID = {
    "preset": "tiny", "layer_types": ["linear_attention", "full_attention"], "linear_decay": "vector",
    "linear_conv_kernel_dim": 3,
}  # fmt: skip


@lru_cache(maxsize=2)
def small_model(linear: bool = False) -> Decoder:
    return Decoder(model_config(HYBRID if linear else SOFTMAX, ByteTokenizer().vocab_size))


def computed(
    rank: int, plan: BatchPlan, corpus: Path, linear: bool = False
) -> tuple[float, int, float, int, dict[str, torch.Tensor]]:
    """Loss and count of a batch by its plan, with and without gradients; the gradients, whole."""
    world_size = plan.world_size
    config = load_config(None, ["model=tiny", "parallel.forward=ring"])
    everyone = mesh(world_size)
    processes = Processes(rank, world_size, 0, 1, rank, world_size, torch.device("cpu"), everyone, everyone)
    model = Decoder(model_config(HYBRID if linear else SOFTMAX, ByteTokenizer().vocab_size))
    model = shard(model, config, processes)
    stream = opened(corpus, plan.lengths)
    batch = RaggedBatch(stream.draw(), plan)
    evaluated, counted = ragged_losses(model, batch, stream, config, processes)
    losses, count, _ = ragged_gradients(model, batch, stream, config, processes)
    total, evaluated, counted = processes.sum(losses, evaluated, counted)
    gradients = {name: full(p.grad) for name, p in model.named_parameters()}  # type: ignore[arg-type]
    return total / count, count, evaluated / max(counted, 1), int(counted), gradients if rank == 0 else {}


def expected(
    plan: BatchPlan, corpus: Path, linear: bool = False
) -> tuple[float, int, dict[str, torch.Tensor]]:
    """The same with plain torch, one sequence after the other."""
    model = small_model(linear)
    model.zero_grad()
    stream, total, count = opened(corpus, plan.lengths), torch.zeros(()), 0

    def attend(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)

    for place in stream.draw():
        one = stream.read(place)
        states = States(SequenceLayout("contiguous", place.length, 1), None, None, "states", None, 1.0)
        mixes = [states if model.config.is_linear(layer) else attend for layer in model.config.layers]
        logits = model(one.tokens, torch.arange(place.length), mixes)
        total = total + F.cross_entropy(logits[0], one.labels[0], reduction="sum", ignore_index=-100)
        count += int((one.labels >= 0).sum())
    (total / max(count, 1)).backward()
    return (
        float(total.detach()) / max(count, 1),
        count,
        {n: p.grad.clone() for n, p in model.named_parameters()},
    )  # type: ignore[union-attr]


def assert_same(plan: BatchPlan, corpus: Path, gloo: Pools, linear: bool = False) -> None:
    loss, count, gradients = expected(plan, corpus, linear)
    results = gloo(plan.world_size).run(computed, plan, corpus, linear, timeout=180.0)
    for got, counted, evaluated, evaluated_count, _ in results:
        assert counted == max(count, 1) and evaluated_count == count
        assert got == pytest.approx(loss, rel=1e-5) and evaluated == pytest.approx(loss, rel=1e-5)
    found = results[0][4]
    whole = torch.cat([gradients[name].flatten() for name in gradients])
    apart = torch.cat([(found[name] - gradients[name]).flatten() for name in gradients])
    assert float(apart.norm()) <= 2e-5 * float(whole.norm())


@pytest.fixture(scope="module")
def corpus(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    return write_corpus(tmp_path_factory.mktemp("ragged"))


@pytest.mark.parametrize("world_size", [4, 8])
def test_any_plan_gives_the_loss_and_gradients_of_one_process(
    gloo: Pools, corpus: Path, world_size: int
) -> None:
    @settings(max_examples=6)
    @given(plans(world_size, longest=60))
    def check(plan: BatchPlan) -> None:
        assert_same(plan, corpus, gloo)

    check()


def test_ranks_without_work_and_uneven_micro_batches(gloo: Pools, corpus: Path) -> None:
    """Rank 1 has five micro-batches, rank 3 none; and a sequence of one token is shared by three."""
    alone = [MicroBatch((Group((1,), (i,)),)) for i in range(4)]
    plan = BatchPlan((9, 30, 1, 4, 1, 77), 4, (*alone, MicroBatch((Group((0, 1, 2), (4, 5)),))), "by hand")
    assert_same(plan, corpus, gloo)
    assert_same(replace(plan, lengths=(1,) * 6), corpus, gloo)  # some ranks of the group hold no token
    assert_same(plan, corpus, gloo, linear=True)
    assert_same(replace(plan, lengths=(1,) * 6), corpus, gloo, linear=True)


def test_linear_layers_in_any_plan(gloo: Pools, corpus: Path) -> None:
    """States travel inside a group of any ranks, and forget at the ends of its sequences."""

    @settings(max_examples=5)
    @given(plans(4, longest=60))
    def check(plan: BatchPlan) -> None:
        assert_same(plan, corpus, gloo, linear=True)

    check()


def test_random_lengths_reach_from_one_to_the_longest() -> None:
    lengths = random_lengths(300, seed=1)
    assert lengths[1] == 300 and min(lengths) == 1 and max(lengths) == 300
    assert lengths != random_lengths(300, seed=2)
    assert 0.2 < sum(n < 10 for n in lengths) / len(lengths) < 0.6  # by orders of magnitude
