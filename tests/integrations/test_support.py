"""What cannot run sharded is refused with what can; what was changed on a model can be taken back."""

from __future__ import annotations

import copy

import pytest
import torch

transformers = pytest.importorskip("transformers", reason="needs the extra hf: pip install counterpoint[hf]")

from counterpoint.integrations.transformers import NAME, sequence_parallel  # noqa: E402

SHAPE = {
    "vocab_size": 61,
    "hidden_size": 24,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def make(kind="llama", auto="AutoModelForCausalLM", **fields):
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SHAPE, **fields})
    return getattr(transformers, auto).from_config(config)


IDS = torch.randint(3, 61, (2, 12), generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize(
    ("model", "message"),
    [
        (lambda: torch.nn.Linear(2, 2), "takes a transformers model, got Linear; .* before DDP, PEFT"),
        (lambda: make("gpt_oss", num_local_experts=2), "type 'gpt_oss' are not supported.* llama, .*qwen3"),
        (lambda: make("gemma2"), "type 'gemma2' are not supported.* counterpoint.attention"),
        (
            lambda: make(auto="AutoModelForSequenceClassification"),
            "LlamaForSequenceClassification has a head that reads whole sequences",
        ),
        (
            lambda: make(rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}),
            "type 'dynamic' depend on the length.*default, linear, llama3, yarn",
        ),
    ],
)
def test_models_that_would_be_wrong_are_refused_and_left_alone(model, message):
    model = model()
    before = dict(getattr(model, "_forward_pre_hooks", {}))
    with pytest.raises(ValueError, match=message):
        sequence_parallel(model)
    assert model._forward_pre_hooks == before
    assert not hasattr(model, "_loss_function")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"layout": "zagzig"}, "layout 'zagzig' is unknown; use one of contiguous, zigzag"),
        ({"forward": "rung"}, "strategy 'rung' is unknown; use one of ring"),
        ({"backward": "tokenrung"}, "strategy 'tokenrung' is unknown"),
    ],
)
def test_unknown_names_are_refused_before_the_model_is_touched(options, message):
    model = make()
    with pytest.raises(ValueError, match=message):
        sequence_parallel(model, **options)
    assert model.config._attn_implementation != NAME


def test_padding_is_refused_with_what_to_do_and_a_mask_of_ones_is_not():
    parallel = sequence_parallel(make())
    ones = torch.ones_like(IDS)
    padded = ones.clone()
    padded[0, :3] = 0
    with pytest.raises(ValueError, match=r"padding is not supported.*documents=lengths.*pad on the right"):
        parallel.shard(IDS, attention_mask=padded)
    batch = parallel.shard(IDS, labels=IDS, attention_mask=ones)
    with pytest.raises(ValueError, match="padding is not supported"):
        parallel(**batch, attention_mask=padded)
    with pytest.raises(ValueError, match="ready-made attention mask"):
        parallel(**batch, attention_mask=torch.zeros(2, 1, 12, 12))
    assert parallel(**batch, attention_mask=ones).loss == parallel(**batch).loss


def test_right_padding_without_a_mask_does_as_the_refusal_says():
    model = make()
    mask = torch.ones_like(IDS)
    mask[1, 7:] = 0
    labels = IDS.masked_fill(mask == 0, -100)
    expected = model(input_ids=IDS, labels=labels, attention_mask=mask).loss.item()
    parallel = sequence_parallel(model)
    assert parallel(**parallel.shard(IDS, labels=labels)).loss.item() == pytest.approx(expected, rel=1e-6)


def test_attention_dropout_is_refused_in_training_only():
    model = make(attention_dropout=0.1)
    parallel = sequence_parallel(model)
    batch = parallel.shard(IDS, labels=IDS)
    with pytest.raises(ValueError, match=r"attention dropout is 0\.1.*attention_dropout=0\.0"):
        model.train()(**batch)
    assert model.eval()(**batch).loss.isfinite()


def test_calls_without_a_sharded_batch_are_refused():
    model = make()
    parallel = sequence_parallel(model)
    batch = parallel.shard(IDS, labels=IDS)
    with pytest.raises(ValueError, match=r"batches from parallel\.shard.*generate.*parallel\.restore"):
        model.generate(IDS, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"batches from parallel\.shard"):
        model(input_ids=IDS, labels=IDS)
    with pytest.raises(ValueError, match="no key-value cache"):
        model(**{**batch, "use_cache": True})
    with pytest.raises(ValueError, match="never forms attention weights"):
        model(**batch, output_attentions=True)
    with pytest.raises(ValueError, match=r"labels must be shifted across the shards.*parallel\.shard"):
        model(**{**parallel.shard(IDS), "labels": IDS})
    with pytest.raises(ValueError, match="run all of that model"):
        model.model(input_ids=IDS)
    with pytest.raises(ValueError, match="sequence-parallel already"):
        sequence_parallel(model)


def test_a_name_in_the_configuration_alone_says_what_is_missing():
    config = transformers.AutoConfig.for_model("llama", **SHAPE)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation=NAME)
    with pytest.raises(ValueError, match=r"sequence_parallel\(model, \.\.\.\)"):
        model(input_ids=IDS)
    parallel = sequence_parallel(model)
    assert parallel(**parallel.shard(IDS)).logits.shape == (2, 12, 61)


def test_a_base_model_gives_hidden_states():
    model = make("qwen3", auto="AutoModel").eval()
    expected = model(input_ids=IDS).last_hidden_state
    parallel = sequence_parallel(model)
    torch.testing.assert_close(parallel(**parallel.shard(IDS)).last_hidden_state, expected)


def test_restore_gives_the_model_back():
    model = make()
    expected = model(input_ids=IDS, labels=IDS).loss
    before = (model.config._attn_implementation, dict(model._forward_pre_hooks), model.loss_function)
    parallel = sequence_parallel(model)
    assert NAME not in model.config.to_json_string(), "a saved model loads where counterpoint is not"
    parallel.restore()
    assert (model.config._attn_implementation, dict(model._forward_pre_hooks), model.loss_function) == before
    assert model(input_ids=IDS, labels=IDS).loss == expected
    assert model.generate(IDS[:1], max_new_tokens=3, do_sample=False).shape[1] > IDS.shape[1]


def test_a_copy_of_the_model_is_parallel_too():
    model = make()
    parallel = sequence_parallel(model)
    average = copy.deepcopy(model)
    batch = parallel.shard(IDS, labels=IDS)
    with torch.no_grad():
        model.lm_head.weight.zero_()
    assert average(**batch).loss != model(**batch).loss, "the copy has weights of its own"


def test_a_batch_without_labels_to_predict_has_loss_zero():
    model = make()
    parallel = sequence_parallel(model)
    loss = parallel(**parallel.shard(IDS, labels=torch.full_like(IDS, -100))).loss
    loss.backward()
    assert loss == 0
    assert all((p.grad == 0).all() for p in model.parameters())
