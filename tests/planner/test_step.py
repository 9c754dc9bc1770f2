"""The schedule of a training step, and what is predicted of it."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from counterpoint.cluster.presets import find_cluster
from counterpoint.kernels.module import Module
from counterpoint.model.config import ModelConfig
from counterpoint.planner.step import phase_seconds, predict_step
from counterpoint.schedule.check import check
from counterpoint.schedule.schedule import Collective, Compute
from counterpoint.schedule.store import from_json, to_json
from counterpoint.schedule.timeline import Span, Timeline
from counterpoint.strategies.memory.policy import MemoryPolicy, parse_layers
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule, parse_choices
from counterpoint.strategies.sequence.linear import parse_linear
from counterpoint.strategies.step import PHASES, TrainStep, shard_parameters, step_schedule
from counterpoint.training.model import model_config
from support.hybrids import hybrids


def small(**changes) -> ModelConfig:
    fields = {
        "model_type": "llama", "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48,
        "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 4, **changes,
    }  # fmt: skip
    return ModelConfig.from_dict(fields)


def step(name: str = "tokenring", mesh: tuple[int, ...] = (2,), **changes) -> TrainStep:
    choices = parse_choices(name)
    fields = {"tokens": 64, "sequences": 1, "data": 1, "layout": "zigzag", **changes}
    return TrainStep(fields.pop("model", small()), mesh=mesh, forward=choices, backward=choices, **fields)


@settings(max_examples=8, deadline=None)
@given(
    st.sampled_from([("tokenring", (2,)), ("ring", (3,)), ("ring/ulysses", (2, 2)), ("ring", (1,))]),
    st.integers(1, 2),
    st.integers(1, 3),
    st.booleans(),
    st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_schedules_are_legal_and_name_their_phases(strategy, data, sequences, overlapped, dtype) -> None:
    name, mesh = strategy
    s = step(name, mesh, data=data, sequences=sequences, overlapped=overlapped, dtype=dtype)
    schedules = [step_schedule(s, rank) for rank in range(s.world_size)]
    check(schedules)
    alone = s.world_size == 1
    for schedule in schedules:
        other = {"layout", "layout backward", "offload"}
        assert set(schedule.phases) == set(PHASES) - other - ({"gather", "reduce"} if alone else set())
    assert from_json(to_json(schedules[0])) == schedules[0]


def test_bytes_are_those_of_attention_and_of_fsdp() -> None:
    s = step("tokenring", (2,), data=2)
    m = s.model
    layer = (m.parameters() - 64 * 32 * (1 if m.tie_word_embeddings else 2) - 32) // 2
    root = m.parameters() - 2 * layer
    # every other rank gets a shard: layers are gathered twice and reduced once, the root once each
    state = 3 * 2 * shard_parameters(s, layer) + 2 * shard_parameters(s, root)
    for rank in range(4):
        sent = step_schedule(s, rank).sent_bytes()
        place, first = rank % 2, rank // 2 * 2
        attention: dict[int, int] = {}
        for write in (forward_schedule, backward_schedule):
            for to, n in write(s.attention(0), place).sent_bytes().items():
                attention[first + to] = attention.get(first + to, 0) + 2 * n
        norm = 4
        assert sent == {to: 4 * state + norm + attention.get(to, 0) for to in range(4) if to != rank}


def test_matmuls_of_all_ranks_add_up_to_the_model() -> None:
    s = step("ring", (3,), tokens=66, sequences=2)
    m = s.model
    flops = 0
    for rank in range(3):
        for one in step_schedule(s, rank).steps:
            if isinstance(one, Compute) and isinstance(one.kernel, Module):
                flops += sum(o.work.flops for o in one.kernel.operators if o.operator == "matmul")
    attention = 12.0 * m.num_attention_heads * m.head_dim * m.num_hidden_layers * (66 + 1) / 2
    vectors = 6 * m.hidden_size * (2 * m.num_hidden_layers + 1)
    head_again = 2 * m.vocab_size * m.hidden_size
    assert flops == pytest.approx(2 * 66 * (m.flops_per_token(66) - attention - vectors + head_again))


@pytest.mark.parametrize("overlapped", [False, True])
def test_deep_models_and_many_sequences_are_counted_not_simulated(overlapped: bool) -> None:
    cluster = find_cluster("dgx-h100")
    model = model_config("small", 512)
    s = step("tokenring", (4,), tokens=4096, dtype="bfloat16", overlapped=overlapped)
    s = replace(s, model=replace(model, num_hidden_layers=8), sequences=2)
    whole = predict_step(s, cluster)
    assert whole.whole and whole.timeline.seconds == whole.seconds
    for layers, sequences in ((12, 2), (8, 5), (40, 9)):
        longer = replace(s, model=replace(model, num_hidden_layers=layers), sequences=sequences)
        found = predict_step(longer, cluster)
        assert not found.whole and found.layers <= 8 and found.sequences <= 2
        ratio = layers * sequences / 16
        assert 0.7 * ratio < found.seconds / whole.seconds < 1.1 * ratio
        assert sum(found.phases.values()) == pytest.approx(found.seconds, rel=0.02)


def test_counted_layers_agree_with_simulating_all_of_them(monkeypatch) -> None:
    cluster, model = find_cluster("dgx-h100"), model_config("small", 512)
    s = step("ring", (4,), tokens=4096, dtype="bfloat16", model=replace(model, num_hidden_layers=14))
    counted = predict_step(s, cluster)
    monkeypatch.setattr("counterpoint.planner.step.SHOWN_LAYERS", 100)
    whole = predict_step(s, cluster)
    assert whole.whole and not counted.whole
    assert counted.seconds == pytest.approx(whole.seconds, rel=0.01)
    assert counted.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.02)
    assert counted.exposed_seconds == pytest.approx(whole.exposed_seconds, rel=0.05)


def test_layers_of_two_kinds_are_counted_each(monkeypatch) -> None:
    kinds = ("full_attention", "sliding_attention") * 7
    model = small(
        model_type="qwen3", num_hidden_layers=14, use_sliding_window=True, sliding_window=64, layer_types=kinds
    )  # fmt: skip
    s = step("allgather", (2,), tokens=2048, dtype="bfloat16", model=model)
    counted = predict_step(s, find_cluster("dgx-h100"))
    monkeypatch.setattr("counterpoint.planner.step.SHOWN_LAYERS", 100)
    whole = predict_step(s, find_cluster("dgx-h100"))
    assert counted.seconds == pytest.approx(whole.seconds, rel=0.02)


policies = st.sampled_from(["keep", "recompute", "offload(0.3)", "offload(1)"])


@settings(max_examples=15, deadline=None)
@given(
    hybrids("lflf"), st.sampled_from([("tokenring", (3,)), ("ulysses", (2,)), ("ring", (1,)), ("ring/ring", (2, 2))]),
    st.sampled_from(["zigzag", "contiguous"]), st.sampled_from(["states", "states_chain"]),
    st.lists(policies, min_size=4, max_size=4), st.sampled_from([1, 2]), st.booleans(),
)  # fmt: skip
def test_schedules_of_mixed_layers_under_any_policy_are_legal(
    model, strategy, layout, linear, layers, tiles, overlapped
) -> None:
    name, mesh = strategy
    if layout == "contiguous" and name == "tokenring":
        layout = "zigzag"
    memory = MemoryPolicy(parse_layers(layers), tiles)
    s = step(
        name,
        mesh,
        model=model,
        layout=layout,
        linear=parse_linear(linear),
        memory=memory,
        overlapped=overlapped,
    )
    schedules = [step_schedule(s, rank) for rank in range(s.world_size)]
    check(schedules)
    moved = layout == "zigzag" and s.sequence_size > 1
    for rank, schedule in enumerate(schedules):
        assert ("layout" in schedule.phases) == ("layout backward" in schedule.phases) == moved
        assert ("offload" in schedule.phases) == any(layer.startswith("offload") for layer in layers)
        linear_layers = {i for i in model.layers if model.is_linear(i)}
        assert linear_layers == {0, 2}
        place = rank % s.sequence_size
        forward, backward = (
            sum(s.states().schedule(way, place).sent_bytes().values()) for way in ("forward", "backward")
        )
        recomputed = sum(layers[i] == "recompute" for i in linear_layers)
        states = sum(
            schedule.nbytes(names)
            for one, phase in zip(schedule.steps, schedule.phases, strict=True)
            if phase.startswith("attention")
            and isinstance(one, Collective)
            and one.channel.endswith("states")
            for _, names in one.sends
        )
        if linear == "states":
            assert states == 2 * (forward + backward) + recomputed * forward


def test_policies_trade_time_for_memory() -> None:
    """As in plan memory: recomputing takes a forward pass and holds less; what is hidden costs little."""
    model = replace(model_config("smollm2-135m"), num_hidden_layers=6)
    s = step("ring", (2,), tokens=16384, dtype="bfloat16", model=model, overlapped=True)
    cluster = find_cluster("dgx-a100")
    keep, again, some, all_ = (
        predict_step(replace(s, memory=MemoryPolicy(parse_layers(text))), cluster)
        for text in ("keep", "recompute", "offload(0.1)", "offload(1)")
    )
    assert again.seconds > 1.1 * keep.seconds and again.peak_bytes < 0.6 * keep.peak_bytes
    assert some.seconds < 1.04 * keep.seconds < all_.seconds
    assert all_.peak_bytes < some.peak_bytes < keep.peak_bytes
    assert again.phases["attention forward"] > 1.8 * keep.phases["attention forward"]
    with pytest.raises(ValueError, match="no schedule for memory policy stream"):
        replace(s, memory=MemoryPolicy(parse_layers("stream(4)")))


@pytest.mark.parametrize("layout", ["zigzag", "contiguous"])
def test_mixed_layers_are_counted_with_their_changes_of_layout(layout: str, monkeypatch) -> None:
    kinds = (["linear_attention"] * 3 + ["full_attention"]) * 4
    model = small(
        model_type="counterpoint_hybrid", num_hidden_layers=16, layer_types=kinds, hidden_size=256,
        linear_conv_kernel_dim=4,
    )  # fmt: skip
    memory = MemoryPolicy(parse_layers(["recompute*8", "keep*8"]))
    s = step("allgather", (4,), tokens=8192, dtype="bfloat16", model=model, layout=layout, memory=memory)
    counted = predict_step(s, find_cluster("dgx-h100"))
    monkeypatch.setattr("counterpoint.planner.step.SHOWN_LAYERS", 100)
    whole = predict_step(s, find_cluster("dgx-h100"))
    assert whole.whole and not counted.whole
    assert counted.seconds == pytest.approx(whole.seconds, rel=0.02)
    assert counted.peak_bytes == pytest.approx(whole.peak_bytes, rel=0.05)
    assert ("layout" in whole.phases) == (layout == "zigzag")


def test_memory_that_does_not_suffice_is_said() -> None:
    s = step("ring", (2,), tokens=300_000, dtype="bfloat16", model=model_config("smollm2-135m"))
    with pytest.raises(ValueError, match="GB at its peak"):
        predict_step(s, find_cluster("a10x4-pcie"))
    flat = replace(s, model=replace(s.model, num_hidden_layers=8), tokens=1_000_000)
    with pytest.raises(ValueError, match="runs out of memory"):
        predict_step(flat, find_cluster("a10x4-pcie"))


def test_phases_share_out_a_rank_s_time() -> None:
    def span(kind, name, start, stop, phase, stream="compute"):
        return Span(0, stream, kind, name, start, stop, phase=phase)

    timeline = Timeline(
        spans=[
            span("collective", "g", 0.0, 2.0, "gather", "state"),
            span("compute", "a", 2.5, 4.0, "qkv"),
            span("recv", "r", 3.0, 6.0, "attention forward", "q.recv"),
            span("compute", "b", 6.0, 7.0, "attention forward"),
            span("compute", "c", 7.0, 9.0, "mlp"),
        ]
    )
    found = phase_seconds(timeline)
    assert found == {"gather": 2.0, "qkv": 2.0, "attention forward": 3.0, "mlp": 2.0}
    assert sum(found.values()) == timeline.seconds
