"""A whole step's schedule: losses, gradients and updates are those of the decoder, under every policy and stage."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.kernels.flat import AdamW
from counterpoint.kernels.kernel import torch_dtype
from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder, rotary_angles
from counterpoint.runtime.attention import attention
from counterpoint.runtime.executor import Executor
from counterpoint.schedule.check import check
from counterpoint.strategies.memory.cost import Block
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training
from counterpoint.strategies.memory.step import Step, step_schedule
from support.hybrids import OneProcess, hybrid, hybrids

KEEP, RECOMPUTE = LayerPolicy("keep"), LayerPolicy("recompute")
STREAM, OFFLOAD = LayerPolicy("stream", 3), LayerPolicy("offload", ratio=0.7)

policies = st.builds(
    MemoryPolicy,
    st.one_of(
        st.sampled_from([(KEEP,), (RECOMPUTE,), (STREAM,), (OFFLOAD,)]),
        st.tuples(*[st.sampled_from([KEEP, RECOMPUTE, STREAM, OFFLOAD])] * 2),
    ),
    st.sampled_from([1, 2]),
    st.sampled_from([None, 1, 5]),
)


def config(tied: bool = False, family: str = "qwen3") -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": family, "vocab_size": 31, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "tie_word_embeddings": tied,
        }
    )  # fmt: skip


def block(tied: bool, tokens: int = 13, batch: int = 2, dtype: str = "float64", norm="fused") -> Block:
    return Block(config(tied), batch, tokens, dtype, norm)


def given_to(step: Step, decoder: Decoder, seed: int = 1) -> dict[str, torch.Tensor]:
    """Inputs of the schedule of a single rank, by name."""
    b, dtype = step.block, torch_dtype(step.block.dtype)
    generator = torch.Generator().manual_seed(seed)
    tokens = torch.randint(0, b.config.vocab_size, (b.batch, b.tokens), generator=generator)
    labels = torch.randint(0, b.config.vocab_size, (b.batch, b.tokens), generator=generator)
    labels[:, -1] = -100
    cos, sin = (t.to(dtype).transpose(1, 2) for t in rotary_angles(b.config, torch.arange(b.tokens)))
    found = {"tokens": tokens, "labels": labels, "cos": cos, "sin": sin}
    for name, p in decoder.named_parameters():
        found[group_of(name)] = p.detach().clone()
    for v in step_schedule(step).inputs:
        if v.name not in found and v.name.startswith("reference."):
            found[v.name] = found[v.name.removeprefix("reference.")].clone()
        elif v.name not in found:
            start = torch.rand if v.name.endswith(".v") else torch.randn
            found[v.name] = 0.1 * start(v.spec.shape, dtype=torch_dtype(v.spec.dtype), generator=generator)
    return found


def group_of(name: str) -> str:
    """The name that a schedule gives a parameter of the decoder."""
    parts = name.removesuffix(".weight").split(".")
    if parts[:2] == ["model", "layers"]:
        rest = parts[3:] if "norm" in parts[3] else parts[4:]
        return ".".join([parts[2], *rest])
    return {"model.embed_tokens": "embed.weight", "model.norm": "head.norm", "lm_head": "head.weight"}[
        ".".join(parts)
    ]


def by_autograd(step: Step, decoder: Decoder, found: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    positions = torch.arange(step.block.tokens)
    config = decoder.config
    attends = [OneProcess() if config.is_linear(i) else attention for i in config.layers]
    loss, _ = decoder(found["tokens"], positions, attends, found["labels"])
    decoder.zero_grad()
    loss.backward()
    grads = {f"gradient {group_of(n)}": p.grad for n, p in decoder.named_parameters()}
    return {"loss": loss.detach().reshape(1), **grads}  # type: ignore[dict-item]


def assert_gradients_of_the_decoder(step: Step) -> None:
    decoder = Decoder(step.block.config, seed=3).to(torch.float64)
    found = given_to(step, decoder)
    expected = by_autograd(step, decoder, found)
    made = Executor(None).run(step_schedule(step), found)
    assert set(made) == set(expected)
    for name, value in made.items():
        # the decoder's loss is computed in float32
        torch.testing.assert_close(value.double(), expected[name].double(), rtol=2e-5, atol=2e-6, msg=name)


@settings(max_examples=12, deadline=None)
@given(policies, st.booleans(), st.integers(2, 14), st.sampled_from(["fused", "composed"]))
def test_gradients_equal_those_of_the_decoder(policy: MemoryPolicy, tied: bool, tokens: int, norm) -> None:
    step = Step(block(tied, tokens, norm=norm), policy, Training(update=False))
    assert_gradients_of_the_decoder(step)


@settings(max_examples=8, deadline=None)
@given(hybrids("lf"), st.sampled_from([KEEP, RECOMPUTE, OFFLOAD]), st.integers(2, 14))
def test_gradients_of_mixed_layers_equal_those_of_the_decoder(shape, policy, tokens: int) -> None:
    whole = MemoryPolicy((policy, STREAM), 2, 5)
    step = Step(Block(shape, 2, tokens, "float64", "fused"), whole, Training(update=False))
    assert_gradients_of_the_decoder(step)


def test_the_update_is_that_of_adamw() -> None:
    step = Step(block(True), MemoryPolicy((STREAM,), head_tokens=4), Training())
    decoder = Decoder(step.block.config, seed=3).to(torch.float64)
    found = given_to(step, decoder)
    found |= {name: torch.zeros_like(t) for name, t in found.items() if name.endswith((".m", ".v"))}
    by_autograd(step, decoder, found)
    adam = AdamW()
    torch.optim.AdamW(
        decoder.parameters(), lr=adam.lr, betas=adam.betas, eps=adam.eps, weight_decay=0.0
    ).step()
    made = Executor(None).run(step_schedule(step), found)
    for name, p in decoder.named_parameters():
        torch.testing.assert_close(made[group_of(name)], p.detach(), rtol=1e-4, atol=1e-6, msg=name)


@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize(("ranks", "rank"), [(1, None), (2, 2), (3, None)])
def test_schedules_of_every_stage_are_legal(zero: int, ranks: int, rank: int | None) -> None:
    training = Training(rank, "bfloat16", True, zero, ranks, reference=zero % 2 == 0)
    mixed = Block(hybrid("vector", 4, layers="fl"), 2, 13, "bfloat16", "fused")
    for here in (block(zero % 2 == 1, dtype="bfloat16"), mixed):
        step = Step(here, MemoryPolicy((STREAM, OFFLOAD), 2, 9), training)
        check([step_schedule(step, r) for r in range(ranks)])


def test_adapters_alone_are_trained() -> None:
    plain = Step(block(False), MemoryPolicy((KEEP,)), Training(update=False))
    step = replace(plain, training=Training(rank=2, update=False))
    decoder = Decoder(step.block.config, seed=3).to(torch.float64)
    found = given_to(step, decoder)
    made = Executor(None).run(step_schedule(step), found)
    # fold the adapters into the weights: the same loss, and their gradients by the chain rule
    for name in [n for n in found if n.endswith(".b")]:
        base = name.removesuffix(".b")
        found[base] = found[base] + (found[name].double() @ found[f"{base}.a"].double())
    folded = Executor(None).run(step_schedule(plain), found)
    torch.testing.assert_close(made["loss"], folded["loss"])
    for name in [n for n in found if n.endswith(".b")]:
        base = name.removesuffix(".b")
        dw = folded[f"gradient {base}"]
        torch.testing.assert_close(
            made[f"gradient {name}"].double(), dw @ found[f"{base}.a"].double().T, rtol=1e-4, atol=1e-5
        )
        torch.testing.assert_close(
            made[f"gradient {base}.a"].double(), found[name].double().T @ dw, rtol=1e-4, atol=1e-5
        )


def test_the_reference_is_the_model_without_adapters() -> None:
    step = Step(
        block(False), MemoryPolicy((KEEP,), head_tokens=7), Training(rank=2, update=False, reference=True)
    )
    decoder = Decoder(step.block.config, seed=3).to(torch.float64)
    found = given_to(step, decoder)
    made = Executor(None).run(step_schedule(step), found)
    torch.testing.assert_close(made["reference"].double(), by_autograd(step, decoder, found)["loss"].double())
    assert abs(float(made["reference"] - made["loss"])) > 1e-6
