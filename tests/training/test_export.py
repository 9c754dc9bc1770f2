"""transformers loads what we export, with equal logits; we load what it saves; nothing is half-written."""

from __future__ import annotations

import json

import pytest
import torch

from counterpoint.model.cache import KeyValueCache
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training import export as module
from counterpoint.training.export import export, load_pretrained
from counterpoint.training.tokenizer import ByteTokenizer, load_tokenizer

SHAPES = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "mistral": {"model_type": "mistral", "sliding_window": 5},
    "qwen2": {"model_type": "qwen2", "attention_bias": True},
    "qwen3": {"model_type": "qwen3", "qk_norm": True},
}


@pytest.fixture(params=SHAPES)
def config(request):
    return ModelConfig.preset("tiny", vocab_size=257, initializer_range=0.2, **SHAPES[request.param])


def logits(model, tokens):
    length = tokens.shape[1]
    with torch.inference_mode():
        return model(tokens, torch.arange(length), KeyValueCache(model.config, length).attends)


TOKENS = torch.tensor([list(b"exported, and loaded again")])


def test_round_trip_through_transformers(config, tmp_path):
    transformers = pytest.importorskip("transformers")
    model = Decoder(config, seed=3)
    export(model, config, ByteTokenizer(), tmp_path / "out")
    theirs, info = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path / "out", output_loading_info=True
    )
    assert not any(info[key] for key in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert type(theirs).__name__.lower().startswith(config.model_type)
    with torch.inference_mode():
        expected = theirs(TOKENS).logits
    torch.testing.assert_close(logits(model, TOKENS), expected, rtol=1e-4, atol=1e-5)
    tokenizer = transformers.AutoTokenizer.from_pretrained(tmp_path / "out")
    assert tokenizer("exported, and loaded again")["input_ids"] == TOKENS[0].tolist()
    assert theirs.generation_config.eos_token_id == theirs.config.eos_token_id == 256
    assert theirs.config.bos_token_id is None

    theirs.save_pretrained(tmp_path / "back", max_shard_size="40KB")
    assert len(list((tmp_path / "back").glob("*.safetensors"))) > 1
    again = load_pretrained(tmp_path / "back")
    assert again.config == config
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))


@pytest.mark.parametrize("max_file_bytes", [10**9, 50_000])
def test_we_load_what_we_wrote(config, tmp_path, max_file_bytes):
    model = Decoder(config, seed=3)
    export(model, config, ByteTokenizer(), tmp_path / "out", max_file_bytes=max_file_bytes)
    files = list((tmp_path / "out").glob("*.safetensors"))
    assert (len(files) == 1) == (max_file_bytes == 10**9)
    assert all(f.stat().st_size < max_file_bytes + 40_000 for f in files)
    again = load_pretrained(tmp_path / "out")
    assert again.config == config
    assert torch.equal(logits(again, TOKENS), logits(model, TOKENS))
    assert all(p.requires_grad for p in again.parameters())
    assert all(f.stat().st_mode & 0o777 == 0o644 for f in (tmp_path / "out").iterdir())
    tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert tied == config.tie_word_embeddings
    assert load_tokenizer(tmp_path / "out").vocab_size == 257


def test_dtype_and_state_dict(tmp_path):
    config = ModelConfig.preset("tiny")
    model = Decoder(config)
    export(model.state_dict(), config, None, tmp_path / "out", dtype=torch.bfloat16)
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == "bfloat16"
    weight = load_pretrained(tmp_path / "out").model.layers[1].mlp.up_proj.weight
    assert weight.dtype == torch.float32
    assert torch.equal(weight, model.model.layers[1].mlp.up_proj.weight.bfloat16().float())


def test_a_loaded_model_does_not_hang_on_its_file(tmp_path):
    config = ModelConfig.preset("tiny", vocab_size=257)
    out = export(Decoder(config, seed=4), config, None, tmp_path / "out")
    model, weights = load_pretrained(out), out / "model.safetensors"
    size = weights.stat().st_size
    with open(weights, "r+b") as file:
        file.write(b"\0" * size)
    assert torch.equal(logits(model, TOKENS), logits(Decoder(config, seed=4), TOKENS))


def test_an_earlier_export_is_replaced_and_nothing_else(tmp_path):
    config, out = ModelConfig.preset("tiny"), tmp_path / "out"
    out.mkdir()
    export(Decoder(config, seed=1), config, ByteTokenizer(), out, max_file_bytes=50_000)
    export(Decoder(config, seed=2), config, ByteTokenizer(), out)
    assert torch.equal(load_pretrained(out).lm_head.weight, Decoder(config, seed=2).lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]
    assert not (out / "model.safetensors.index.json").exists()
    (out / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds more than an exported model"):
        export(Decoder(config), config, None, out)
    (tmp_path / "file").write_text("x")
    with pytest.raises(ValueError, match="choose another directory"):
        export(Decoder(config), config, None, tmp_path / "file")


def test_a_failed_write_leaves_the_old_export(tmp_path, monkeypatch):
    config, out = ModelConfig.preset("tiny"), tmp_path / "out"
    export(Decoder(config, seed=1), config, ByteTokenizer(), out)

    def full(_path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(module, "_sync", full)
    with pytest.raises(OSError, match="No space left"):
        export(Decoder(config, seed=2), config, ByteTokenizer(), out)
    assert torch.equal(load_pretrained(out).lm_head.weight, Decoder(config, seed=1).lm_head.weight)
    assert [p.name for p in tmp_path.iterdir()] == ["out"]


def test_weights_that_do_not_fit_are_refused(tmp_path):
    config = ModelConfig.preset("tiny")
    deeper = ModelConfig.preset("tiny", num_hidden_layers=3)
    with pytest.raises(
        ValueError, match=r"does not fit its config: model\.layers\.2.* is missing \(and 8 more\)"
    ):
        export(Decoder(config), deeper, None, tmp_path / "out")
    assert not (tmp_path / "out").exists()
    out = export(Decoder(config), config, None, tmp_path / "out")
    (out / "config.json").write_text(json.dumps(ModelConfig.preset("tiny", vocab_size=99).to_dict()))
    with pytest.raises(ValueError, match=r"weight has shape \(512, 64\), the config says \(99, 64\)"):
        load_pretrained(out)


def test_damaged_directories_are_named(tmp_path):
    config = ModelConfig.preset("tiny")
    out = export(Decoder(config), config, None, tmp_path / "out")
    weights = out / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"model\.safetensors: cannot be read"):
        load_pretrained(out)
    weights.unlink()
    with pytest.raises(ValueError, match=r"holds neither model\.safetensors nor"):
        load_pretrained(out)
    (out / "model.safetensors.index.json").write_text('{"weight_map": {"a": "gone.safetensors"}}')
    with pytest.raises(ValueError, match=r"gone\.safetensors: cannot be read"):
        load_pretrained(out)
    (out / "model.safetensors.index.json").write_text("[]")
    with pytest.raises(ValueError, match="not an index"):
        load_pretrained(out)
    with pytest.raises(ValueError, match="no such file"):
        load_pretrained(tmp_path)
    data = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({**data, "quantization_config": {"bits": 4}}))
    with pytest.raises(ValueError, match="quantised"):
        load_pretrained(out)
