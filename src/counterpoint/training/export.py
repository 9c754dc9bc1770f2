"""Hugging Face model directories, written whole or not at all, and read back into our decoder."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training.tokenizer import Tokenizer

_WEIGHTS = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_OUR_FILES = {"config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json"}


def export(
    model: Decoder | Mapping[str, Tensor],
    config: ModelConfig,
    tokenizer: Tokenizer | None,
    directory: str | Path,
    *,
    dtype: torch.dtype | None = None,
    max_file_bytes: int = 5 * 10**9,
) -> Path:
    """Write the directory that transformers' AutoModelForCausalLM and AutoTokenizer load; returns its path.

    A model with linear attention layers is written the same way, but only `load_pretrained` reads it: transformers has
    no class for it and says so (its model_type is counterpoint_hybrid).

    model: a decoder, or its state dict with whole tensors; dtype: of the weights in the file (as they are
    when None). An earlier export at the same place is replaced, and stays whole until the new one is. Raises
    ValueError when something else lies there or when the weights are not those of the config.
    """
    directory = Path(directory)
    if directory.exists() and not _replaceable(directory):
        raise ValueError(
            f"{directory} exists and holds more than an exported model; choose another directory"
        )
    state = dict(model if isinstance(model, Mapping) else model.state_dict())
    _check(state, config, "the state dict")
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    directory.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}."))
    try:
        written = {name: t.detach().to("cpu", dtype or t.dtype).contiguous() for name, t in state.items()}
        _write_weights(written, temporary, max_file_bytes)
        kind = str(next(iter(written.values())).dtype).removeprefix("torch.")
        ends: dict[str, object] = {}
        if tokenizer is not None:
            tokenizer.save(temporary)
            ends = {"bos_token_id": None, "eos_token_id": tokenizer.end_of_document}
        _write_json(temporary / "generation_config.json", {"do_sample": True, **ends})
        _write_json(temporary / "config.json", {**config.to_dict(), **ends, "dtype": kind})
        temporary.chmod(0o755)
        for file in temporary.iterdir():
            file.chmod(0o644)
            _sync(file)
        _sync(temporary)
        _swap(temporary, directory)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
    return directory


def load_pretrained(directory: str | Path, *, device: str | torch.device = "cpu") -> Decoder:
    """The decoder in a Hugging Face directory, in float32; its shape is `.config`.

    Reads model.safetensors or the files that model.safetensors.index.json names. Raises ValueError when there
    are none, when one is damaged, or when the weights are not those of the config.
    """
    directory = Path(directory)
    config = ModelConfig.read(directory)
    if "quantization_config" in json.loads((directory / "config.json").read_text(encoding="utf-8")):
        raise ValueError(f"{directory}: the weights are quantised; give an unquantised model")
    state: dict[str, Tensor] = {}
    for file in _weight_files(directory):
        try:
            with safe_open(file, framework="pt") as weights:
                for name in weights.keys():  # noqa: SIM118 (not a mapping)
                    # a copy: what safetensors gives is the file itself, mapped, and changes when it does
                    state[name] = weights.get_tensor(name).to(device, torch.float32, copy=True)
        except (SafetensorError, OSError) as error:
            raise ValueError(f"{file}: cannot be read ({error}); download or export it again") from None
    # old files carry the rotary frequencies, which follow from the config
    state = {name: t for name, t in state.items() if not name.endswith("rotary_emb.inv_freq")}
    if config.tie_word_embeddings and "model.embed_tokens.weight" in state:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    _check(state, config, str(directory))
    with torch.device("meta"):
        model = Decoder(config)
    model.load_state_dict(state, assign=True)
    if config.tie_word_embeddings:
        model.lm_head.weight = model.model.embed_tokens.weight
    return model.requires_grad_()


def _check(state: Mapping[str, Tensor], config: ModelConfig, where: str) -> None:
    with torch.device("meta"):
        expected = {name: t.shape for name, t in Decoder(config).state_dict().items()}
    if config.tie_word_embeddings and "lm_head.weight" not in state:
        expected.pop("lm_head.weight")
    problems = [f"{name} is missing" for name in expected.keys() - state.keys()]
    problems += [f"{name} is not part of this model" for name in state.keys() - expected.keys()]
    problems += [
        f"{name} has shape {tuple(state[name].shape)}, the config says {tuple(shape)}"
        for name, shape in expected.items()
        if name in state and state[name].shape != shape
    ]
    if problems:
        more = f" (and {len(problems) - 1} more)" if len(problems) > 1 else ""
        raise ValueError(f"{where} does not fit its config: {min(problems)}{more}")


def _weight_files(directory: Path) -> list[Path]:
    if (directory / _WEIGHTS).is_file():
        return [directory / _WEIGHTS]
    if not (directory / _INDEX).is_file():
        raise ValueError(f"{directory}: holds neither {_WEIGHTS} nor {_INDEX}; give a directory with one")
    try:
        names = sorted(
            set(json.loads((directory / _INDEX).read_text(encoding="utf-8"))["weight_map"].values())
        )
    except (ValueError, KeyError, AttributeError, TypeError):
        raise ValueError(f"{directory / _INDEX}: not an index of weights") from None
    return [directory / name for name in names]


def _write_weights(state: dict[str, Tensor], directory: Path, max_file_bytes: int) -> None:
    shards: list[dict[str, Tensor]] = [{}]
    for name, tensor in state.items():
        if shards[-1] and sum(t.nbytes for t in shards[-1].values()) + tensor.nbytes > max_file_bytes:
            shards.append({})
        shards[-1][name] = tensor
    if len(shards) == 1:
        save_file(state, directory / _WEIGHTS, metadata={"format": "pt"})
        return
    where: dict[str, str] = {}
    for i, shard in enumerate(shards, start=1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_file(shard, directory / file, metadata={"format": "pt"})
        where.update(dict.fromkeys(shard, file))
    total = sum(t.nbytes for t in state.values())
    _write_json(directory / _INDEX, {"metadata": {"total_size": total}, "weight_map": where})


def _replaceable(directory: Path) -> bool:
    """Empty or nothing but an export: anything else in it is the user's and not ours to delete."""
    return directory.is_dir() and all(
        path.name in _OUR_FILES or path.match("model*.safetensors*") for path in directory.iterdir()
    )


def _swap(temporary: Path, directory: Path) -> None:
    if not directory.exists():
        temporary.rename(directory)
        return
    old = Path(tempfile.mkdtemp(dir=directory.parent, prefix=f".{directory.name}.old."))
    directory.rename(old)
    temporary.rename(directory)
    shutil.rmtree(old)


def _write_json(file: Path, value: Mapping[str, object]) -> None:
    file.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
