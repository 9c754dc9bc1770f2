"""The peak that is put together from parts is that of the whole step's schedule."""

from __future__ import annotations

from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig
from counterpoint.schedule.live import live_bytes
from counterpoint.strategies.memory.cost import Block, input_bytes, saved_bytes
from counterpoint.strategies.memory.footprint import footprint, layer_bytes
from counterpoint.strategies.memory.layer import Recipe
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training
from counterpoint.strategies.memory.step import Step, step_schedule
from support.hybrids import hybrids


def config(layers: int, vocabulary: int, tied: bool, inner: int) -> ModelConfig:
    return ModelConfig.from_dict(
        {
            "model_type": "qwen3", "vocab_size": vocabulary, "hidden_size": 16, "intermediate_size": inner,
            "num_hidden_layers": layers, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 4,
            "tie_word_embeddings": tied,
        }
    )  # fmt: skip


layer_policies = st.sampled_from(
    [
        LayerPolicy("keep"), LayerPolicy("recompute"), LayerPolicy("stream", 1), LayerPolicy("stream", 7),
        LayerPolicy("offload", ratio=0.6), LayerPolicy("offload", ratio=1.0),
    ]
)  # fmt: skip
trainings = st.builds(
    Training,
    st.sampled_from([None, None, 2]),
    st.sampled_from(["float32", "bfloat16"]),
    st.booleans(),
    st.integers(0, 3),
    st.integers(1, 3),
    st.booleans(),
    st.just(True),  # without an update a schedule does not name the states, which are there all the same
    st.booleans(),
)


@st.composite
def steps(draw) -> Step:
    layers = draw(st.integers(1, 4))
    shape = config(
        layers, draw(st.sampled_from([8, 300])), draw(st.booleans()), draw(st.sampled_from([8, 64]))
    )
    dtype, norm = draw(st.sampled_from(["float32", "bfloat16"])), draw(st.sampled_from(["fused", "composed"]))
    mixed = layers > 1 and draw(st.booleans())
    if mixed:
        letters = "".join(draw(st.permutations("lf" + draw(st.sampled_from(["l", "f"])) * (layers - 2))))
        changes = {"vocab_size": shape.vocab_size, "tie_word_embeddings": shape.tie_word_embeddings}
        shape = draw(hybrids(letters, **changes))
    block = Block(shape, draw(st.integers(1, 2)), draw(st.integers(1, 60)), dtype, norm)
    count = layers if mixed else draw(st.sampled_from([1, layers]))
    chosen = [draw(layer_policies) for _ in range(count)]
    if mixed:
        chosen = [
            LayerPolicy("keep") if shape.is_linear(i) and p.kind == "stream" else p
            for i, p in enumerate(chosen)
        ]
    policy = MemoryPolicy(
        tuple(chosen), draw(st.sampled_from([1, 6])),
        draw(st.sampled_from([None, 7])),
    )  # fmt: skip
    return Step(block, policy, draw(trainings))


@settings(max_examples=60, deadline=None)
@given(steps())
def test_the_peak_is_that_of_the_schedule(step: Step) -> None:
    assert footprint(step, overlap=False).total == max(live_bytes(step_schedule(step)))
    assert footprint(step).total >= footprint(step, overlap=False).total


@settings(max_examples=20, deadline=None)
@given(steps())
def test_a_layer_keeps_what_the_formula_says(step: Step) -> None:
    for i in step.block.config.layers:
        recipe = step.recipe(i)
        here = layer_bytes(Recipe(recipe.block, recipe.policy, recipe.mlp_tiles), Training(), i).saved
        assert here == saved_bytes(recipe.block, recipe.policy, recipe.mlp_tiles)
        again = layer_bytes(Recipe(recipe.block, LayerPolicy("recompute")), Training(), i).saved
        assert again == input_bytes(step.block)
