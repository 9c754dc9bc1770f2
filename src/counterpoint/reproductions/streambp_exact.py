"""A small model's step by its streamed schedule, executed here, against autograd through the decoder."""

from __future__ import annotations

import torch

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder, rotary_angles
from counterpoint.runtime.attention import attention
from counterpoint.runtime.executor import Executor
from counterpoint.strategies.memory.cost import Block
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training
from counterpoint.strategies.memory.step import Step, step_schedule

TOKENS, BATCH = 41, 2


def largest_difference(pieces: int) -> float:
    """Of the loss and of every gradient, relative to the largest entry of that gradient by autograd (float64)."""
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
    positions = torch.arange(TOKENS)
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


def _name(name: str) -> str:
    """What a schedule calls a parameter of the decoder."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        return ".".join([parts[2], *parts[3 if "norm" in parts[3] else 4 :]])
    return {"model.embed_tokens": "embed.weight", "model.norm": "head.norm", "lm_head": "head.weight"}[
        ".".join(parts)
    ]
