"""transformers models on a sharded sequence equal themselves on one process: loss, gradients, in every wrapper."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.distributed as dist

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install counterpoint[hf]")

from counterpoint.integrations.support import MODEL_TYPES  # noqa: E402
from counterpoint.integrations.transformers import sequence_parallel  # noqa: E402
from support.processes import mesh  # noqa: E402

pytestmark = pytest.mark.processes

TOKENS, VOCABULARY, IGNORED = 45, 61, -100
SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 48,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 6,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
OWN = {  # what makes a type different, switched on
    "mistral": {"sliding_window": 7, "head_dim": 10},
    "qwen2": {"use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "qwen3": {"head_dim": 10, "use_sliding_window": True, "sliding_window": 7, "max_window_layers": 1},
    "olmo3": {"sliding_window": 7},
    "phi3": {"sliding_window": 7},
    "granite": {"attention_multiplier": 0.2, "logits_scaling": 2.0},
    "smollm3": {"no_rope_layer_interval": 2},
    "starcoder2": {"sliding_window": 7, "attention_bias": True},
}


def test_every_supported_type_equals_one_process(gloo):
    results = gloo(3).run(every_type)
    assert len(results[0]) >= len(MODEL_TYPES) - 1  # olmo3 came with transformers 4.57
    for rank in results:
        assert max(rank.values()) < 2e-5, rank
    # what is special about a type reaches the attention: without its window it would be another function
    assert min(gloo(3).run(without_window)) > 1e-3


@pytest.mark.parametrize("strategy", ["ring", "bidirectional_ring", "allgather", "ulysses", "rsa"])
def test_every_strategy_and_layout_on_uneven_shards(gloo, strategy):
    layouts = ("contiguous", "zigzag", "striped", "document-zigzag")
    errors = gloo(4).run(parity_of_strategy, strategy, layouts)
    assert max(max(rank) for rank in errors) < 2e-5, errors


def test_a_mesh_with_two_axes_takes_a_strategy_for_each(gloo):
    errors = gloo(4).run(parity_on_square)
    assert max(max(rank) for rank in errors) < 2e-5, errors


def test_packed_documents_from_lengths_and_from_restarting_positions(gloo):
    for lengths, positions, unpacked in gloo(3).run(packed_documents):
        assert lengths == positions, "documents and position_ids that restart are two ways to say one thing"
        assert max(lengths) < 2e-5
        assert unpacked > 1e-3, "the documents changed nothing: they see each other"


def test_ignored_labels_and_a_shard_without_any(gloo):
    # -100 on most tokens, so that ranks have very different numbers of targets, one of them none
    for error, counts in gloo(3).run(few_labels):
        assert max(error) < 2e-5
        assert 0 in counts and sum(counts) == 5


def test_accumulation_over_batches_is_one_big_batch(gloo):
    assert max(gloo(2).run(accumulation)) < 2e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_recomputes_the_exchange(gloo, reentrant):
    errors = gloo(2).run(checkpointed, reentrant)
    assert max(max(rank) for rank in errors) < 2e-5, errors


@pytest.mark.parametrize("wrapper", ["ddp", "fsdp2", "fsdp2 checkpointed"])
def test_wrappers_train_the_same_model(gloo, wrapper):
    # mesh data x sequence: two replicas with different rows, each over two processes
    for losses, expected, difference in gloo(4).run(wrapped, wrapper):
        assert losses == pytest.approx(expected, rel=1e-5)
        assert difference < 2e-5


# ---- jobs: run on every rank ----------------------------------------------------------------------
def make(kind="llama", **fields):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **OWN.get(kind, {}), **fields})
    model = transformers.AutoModelForCausalLM.from_config(config)
    with torch.no_grad():
        for p in model.parameters():  # far from zero, so that attention has something to say
            p.add_(torch.randn_like(p) * 0.15)
    return model.train()


def make_ids(rows=2, seed=0):
    return torch.randint(3, VOCABULARY, (rows, TOKENS), generator=torch.Generator().manual_seed(seed))


def gradients(model):
    return torch.cat([p.grad.flatten() for p in model.parameters()])


def relative(value, expected):
    return ((value - expected).norm() / expected.norm()).item()


def compare(model, ids, labels, given, whole, **options):
    """Relative errors of loss and gradient, sharded as `options` say against one process given `whole`."""
    other = copy.deepcopy(model)
    expected = other(input_ids=ids, labels=labels, use_cache=False, **whole).loss
    expected.backward()
    parallel = sequence_parallel(model, **options)
    loss = parallel(**parallel.shard(ids, labels=labels, **given)).loss
    loss.backward()
    parallel.reduce_gradients()
    return abs(loss.item() / expected.item() - 1), relative(gradients(model), gradients(other))


def every_type(rank):
    ids = make_ids()
    return {
        kind: max(compare(make(kind), ids, ids, {}, {}, mesh=mesh(3), backward="ring"))
        for kind in MODEL_TYPES
        if kind in transformers.CONFIG_MAPPING
    }


def without_window(rank):
    ids = make_ids()
    near = make("mistral")
    far = make("mistral", sliding_window=None)
    parallel, other = (sequence_parallel(model, mesh=mesh(3)) for model in (near, far))
    batch = parallel.shard(ids, labels=ids)
    return abs(parallel(**batch).loss.item() - other(**batch).loss.item())


def parity_of_strategy(rank, strategy, layouts):
    ids = make_ids(1)
    results = [
        compare(make(), ids, ids, {}, {}, mesh=mesh(4), layout=layout, forward=strategy) for layout in layouts
    ]
    return [max(errors) for errors in results]


def parity_on_square(rank):
    ids = make_ids()
    options = {"mesh": mesh(2, 2), "forward": ("ring", "ulysses"), "backward": ("tokenring", "ring")}
    return compare(make("qwen3"), ids, ids, {}, {}, **options)


def packed_documents(rank):
    ids, lengths = make_ids(1), (5, 1, 20, 19)
    positions = torch.cat([torch.arange(n) for n in lengths])[None]
    labels = ids.masked_fill(positions == 0, IGNORED)  # as transformers' collator for packed batches does
    results = []
    for given in ({"documents": lengths}, {"position_ids": positions}):
        whole = {"position_ids": positions}
        results.append(compare(make("mistral"), ids, labels, given, whole, mesh=mesh(3)))
    whole = make("mistral")(input_ids=ids, labels=labels).loss.item()
    parallel = sequence_parallel(make("mistral"), mesh=mesh(3))
    packed = parallel(**parallel.shard(ids, labels=labels, documents=lengths)).loss.item()
    return (*results, abs(packed - whole))


def few_labels(rank):
    ids = make_ids(1)
    labels = torch.full_like(ids, IGNORED)
    labels[0, [1, 2, 15, 16, 17]] = ids[
        0, [1, 2, 15, 16, 17]
    ]  # 15 is the first token of rank 1, rank 0 predicts it
    parallel = sequence_parallel(make(), mesh=mesh(3), layout="contiguous")
    counts = torch.zeros(3, dtype=torch.int64)
    counts[rank] = (parallel.shard(ids, labels=labels)["labels"] != IGNORED).sum()
    dist.all_reduce(counts)
    return compare(make(), ids, labels, {}, {}, mesh=mesh(3), layout="contiguous"), counts.tolist()


def accumulation(rank):
    ids = make_ids(4)
    labels = ids.clone()
    labels[0, 5:] = IGNORED  # the first batch has far fewer targets: means of means would be wrong
    model, other = make(), make()
    other(input_ids=ids, labels=labels).loss.backward()
    parallel = sequence_parallel(model, mesh=mesh(2))
    count = (labels[:, 1:] != IGNORED).sum()
    for rows in (slice(0, 1), slice(1, 4)):
        batch = parallel.shard(ids[rows], labels=labels[rows], num_items_in_batch=count)
        parallel(**batch).loss.backward()
    parallel.reduce_gradients()
    return relative(gradients(model), gradients(other))


def checkpointed(rank, reentrant):
    model, ids = make("qwen3"), make_ids()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    return compare(model, ids, ids, {}, {}, mesh=mesh(2))


def wrapped(rank, wrapper):
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    grid = mesh(2, 2, names=("data", "sequence"))
    ids = make_ids(4)
    model, other = make(), make()
    if "checkpointed" in wrapper:
        model.gradient_checkpointing_enable()
    parallel = sequence_parallel(model, mesh=grid["sequence"])
    net = model
    if wrapper == "ddp":
        net = DistributedDataParallel(model)
    else:
        for layer in model.model.layers:
            fully_shard(layer, mesh=grid)
        fully_shard(model, mesh=grid)
    optimizers = [torch.optim.SGD(m.parameters(), lr=0.1) for m in (net, other)]
    losses, expected = [], []
    for _ in range(3):
        own = ids[2 * grid["data"].get_local_rank() :][:2]
        loss = net(**parallel.shard(own, labels=own)).loss
        (loss * parallel.world_size).backward()
        wanted = other(input_ids=ids, labels=ids).loss
        wanted.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        mean = loss.detach() / dist.get_world_size()
        dist.all_reduce(mean)
        losses.append(mean.item())
        expected.append(wanted.item())
    whole = [p.full_tensor() if hasattr(p, "full_tensor") else p for p in model.parameters()]
    pairs = zip(whole, other.parameters(), strict=True)
    return losses, expected, max(relative(a.detach(), b.detach()) for a, b in pairs)
