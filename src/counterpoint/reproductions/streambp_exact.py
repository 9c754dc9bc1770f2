"""A small model's step, streamed, against autograd: by its schedule, executed here, and by the training runtime."""

from __future__ import annotations

import torch

from counterpoint.kernels.mask import AttentionMask
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder, rotary_angles
from counterpoint.runtime.attention import attention
from counterpoint.runtime.executor import Executor
from counterpoint.runtime.memory.layers import layer_runs
from counterpoint.strategies.memory.cost import Block, model_saved_bytes
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training
from counterpoint.strategies.memory.step import Step, step_schedule

TOKENS, BATCH = 41, 2


def largest_difference(pieces: int) -> float:
    """Of the loss and of every gradient, relative to the largest entry of that gradient by autograd (float64)."""
    decoder, tokens, labels, positions = _model()
    config = decoder.config
    loss, _ = decoder(tokens, positions, attention, labels)
    loss.backward()
    policy = MemoryPolicy((LayerPolicy("stream", pieces),), head_tokens=max(1, 2 * TOKENS // pieces))
    schedule = step_schedule(
        Step(Block(config, BATCH, TOKENS, "float64", "composed"), policy, Training(update=False))
    )
    cos, sin = (t.double().transpose(1, 2) for t in rotary_angles(config, positions))
    given = {"tokens": tokens, "labels": labels, "cos": cos, "sin": sin}
    parameters = {_name(name): p for name, p in decoder.named_parameters()}
    given.update({name: p.detach() for name, p in parameters.items()})
    made = Executor(None).run(schedule, given)
    worst = float(abs(made["loss"][0] - loss.detach()) / abs(loss.detach()))
    for name, parameter in parameters.items():
        assert parameter.grad is not None
        difference = (made[f"gradient {name}"] - parameter.grad).abs().max() / parameter.grad.abs().max()
        worst = max(worst, float(difference))
    return worst


def runtime_difference(pieces: int) -> float:
    """The same for the decoder whose layers the training runtime streams."""
    decoder, tokens, labels, positions = _model()
    decoder(tokens, positions, attention, labels)[0].backward()
    expected = {name: p.grad.clone() for name, p in decoder.named_parameters() if p.grad is not None}
    decoder.zero_grad()
    decoder(tokens, positions, attention, labels, run=_streamed(decoder.config, pieces))[0].backward()
    return max(
        float((p.grad - expected[name]).abs().max() / expected[name].abs().max())
        for name, p in decoder.named_parameters()
        if p.grad is not None
    )


def held_over_formula(pieces: int) -> float:
    """Bytes that autograd holds for the streamed layers between the passes, over what the formula says."""
    decoder, _, _, positions = _model()
    run = _streamed(decoder.config, pieces)
    angles = rotary_angles(decoder.config, positions)
    x = torch.randn(BATCH, TOKENS, decoder.config.hidden_size, dtype=torch.float64, requires_grad=True)
    cos, sin = (t.double() for t in angles)
    apart = {t.untyped_storage().data_ptr() for t in (*decoder.parameters(), cos, sin)}
    found: dict[int, torch.Tensor] = {}

    def pack(t: torch.Tensor) -> torch.Tensor:
        found[t.untyped_storage().data_ptr()] = t
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        for layer, how in zip(decoder.model.layers, run, strict=True):
            x = layer(x, cos, sin, attention, how)
    held = sum(t.untyped_storage().nbytes() for at, t in found.items() if at not in apart)
    policy = MemoryPolicy((LayerPolicy("stream", pieces),))
    return held / model_saved_bytes(Block(decoder.config, BATCH, TOKENS, "float64"), policy)


def _streamed(config: ModelConfig, pieces: int):
    policy = MemoryPolicy((LayerPolicy("stream", pieces),))
    return layer_runs(policy, config.num_hidden_layers, [AttentionMask()] * config.num_hidden_layers)


def _model():
    """(decoder, tokens, labels, positions) in float64."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3", "vocab_size": 97, "hidden_size": 48, "intermediate_size": 80,
            "num_hidden_layers": 3, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 8,
        }
    )  # fmt: skip
    decoder = Decoder(config, seed=0).to(torch.float64)
    generator = torch.Generator().manual_seed(1)
    tokens, labels = (torch.randint(0, 97, (BATCH, TOKENS), generator=generator) for _ in range(2))
    labels[:, -3:] = -100
    return decoder, tokens, labels, torch.arange(TOKENS)


def _name(name: str) -> str:
    """What a schedule calls a parameter of the decoder."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return ".".join([parts[2], *parts[3 if "norm" in parts[3] else 4 :]])
    return {"model.embed_tokens": "embed.weight", "model.norm": "head.norm", "lm_head": "head.weight"}[
        ".".join(parts)
    ]
