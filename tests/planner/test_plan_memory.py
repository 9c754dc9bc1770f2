"""The longest sequence fits and one more does not; the policy that is chosen fits and no other that fits is faster."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest

from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.model.shapes import find_shape
from counterpoint.planner.memory import (
    Question,
    StepClock,
    longest_tokens,
    offload_ratio,
    plan_memory,
    timeline,
)
from counterpoint.strategies.memory.cost import saved_bytes
from counterpoint.strategies.memory.footprint import footprint
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training

KEEP, RECOMPUTE = MemoryPolicy((LayerPolicy("keep"),)), MemoryPolicy((LayerPolicy("recompute"),))
STREAM = MemoryPolicy((LayerPolicy("stream", 4),))


def question(**changes) -> Question:
    """A model of 8 layers, with which a step is simulated in a moment."""
    config = ModelConfig.from_dict(
        {
            "model_type": "qwen3", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
        }
    )  # fmt: skip
    return replace(Question(config, find_cluster("dgx-a100"), 16_384, budget=10**9), **changes)


def test_the_longest_sequence_fits_and_longer_ones_do_not() -> None:
    q = question()
    for policy in (KEEP, RECOMPUTE, STREAM):
        longest = longest_tokens(q, lambda tokens, policy=policy: policy)
        assert footprint(q.step(policy, longest)).total <= q.limit
        assert footprint(q.step(policy, longest + longest // 500 + 1)).total > q.limit


def test_the_answer_fits_and_is_the_fastest_that_does() -> None:
    q = question(head_tokens=1024)
    plan = plan_memory(q)
    assert plan.best is not None and plan.best.peak.total <= q.limit
    fitting = [a for a in plan.answers if a.fits]
    assert plan.best.seconds == min(a.seconds for a in fitting)
    assert all(a.peak.total > q.limit for a in plan.answers if not a.fits)
    keep = next(a for a in plan.answers if a.name == "keep")
    assert not keep.fits and len(set(plan.best.policy.layers)) == 2  # some layers keep, the others cannot
    assert plan.longest["keep"] < plan.longest["recompute"] < plan.longest["stream, chunks of 2048"]


def test_with_room_for_all_everything_is_kept() -> None:
    plan = plan_memory(question(budget=None, tokens=2048))
    assert plan.best is not None and plan.best.policy.layers == (LayerPolicy("keep"),)


def test_time_is_that_of_the_whole_step() -> None:
    q = question(tokens=4096)
    clock = StepClock(q)
    for policy in (KEEP, RECOMPUTE, STREAM, MemoryPolicy((LayerPolicy("offload", ratio=0.2),))):
        assert clock.seconds(policy) == pytest.approx(timeline(q, policy).seconds, rel=0.02)
    assert clock.seconds(KEEP) < clock.seconds(RECOMPUTE) < clock.seconds(STREAM)


def test_the_simulated_peak_is_the_counted_one() -> None:
    q = question(tokens=4096)
    for policy in (KEEP, RECOMPUTE, STREAM):
        assert timeline(q, policy).peak_bytes(0) == footprint(q.step(policy)).total


def hybrid_question(**changes) -> Question:
    config = ModelConfig.from_dict(
        {
            "model_type": "counterpoint_hybrid", "vocab_size": 4096, "hidden_size": 512, "intermediate_size": 1536,
            "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 64,
            "layer_types": (["linear_attention"] * 3 + ["full_attention"]) * 2, "linear_conv_kernel_dim": 4,
        }
    )  # fmt: skip
    return replace(question(config=config), **changes)


def test_layers_of_several_types_are_counted_and_timed() -> None:
    q = hybrid_question(tokens=4096)
    clock, step = StepClock(q), q.step(KEEP)
    mixed = MemoryPolicy(tuple(LayerPolicy("recompute" if i < 5 else "keep") for i in range(8)))
    for policy in (KEEP, RECOMPUTE, mixed):
        assert clock.seconds(policy) == pytest.approx(timeline(q, policy).seconds, rel=0.02)
        assert timeline(q, policy).peak_bytes(0) == footprint(q.step(policy)).total
    linear, softmax = (saved_bytes(step.block.at(i), LayerPolicy("keep")) for i in (0, 3))
    assert linear > softmax  # gates, convolution and feature maps are kept beside what both have
    assert footprint(step).checkpoints >= 5 * linear


def test_a_model_with_linear_layers_gets_an_answer() -> None:
    """Streams hold softmax layers only; the others recompute beside them."""
    q = hybrid_question()
    plan = plan_memory(q)
    assert plan.best is not None and plan.best.peak.total <= q.limit
    assert plan.longest["keep"] < plan.longest["recompute"]
    streams = [a for a in plan.answers if a.name.startswith("stream")]
    assert streams and all("linear layers recompute" in a.name for a in streams)
    for answer in plan.answers:
        kinds = {answer.policy.layer(i, 8).kind for i in q.config.layers if q.config.is_linear(i)}
        assert "stream" not in kinds
    with pytest.raises(ValueError, match=r"stream\(4\) works on softmax layers"):
        footprint(q.step(STREAM))


def test_as_much_is_offloaded_as_can_be_hidden() -> None:
    """The ratio costs next to nothing, all of it costs time; and the simulated peak stays below the counted one."""
    q = question(tokens=4096)
    ratio = offload_ratio(q)
    assert 0.05 < ratio < 0.95
    keep = timeline(q, KEEP).seconds
    hidden = MemoryPolicy((LayerPolicy("offload", ratio=ratio),))
    whole = MemoryPolicy((LayerPolicy("offload", ratio=1.0),))
    assert timeline(q, hidden).seconds < 1.02 * keep < timeline(q, whole).seconds
    assert (
        timeline(q, hidden).peak_bytes(0) <= footprint(q.step(hidden)).total < footprint(q.step(KEEP)).total
    )
    # the longer a sequence, the more of a layer's time is attention, and the more of its bytes can leave meanwhile
    assert ratio < offload_ratio(q, 16_384) < offload_ratio(q, 65_536)


def test_sharding_lowers_the_states_and_costs_messages() -> None:
    peaks, sent = [], []
    for zero in (0, 1, 2, 3):
        q = question(training=Training(ranks=8, zero=zero), tokens=512)
        peak = footprint(q.step(RECOMPUTE))
        peaks.append(peak.parameters + peak.optimizer)
        sent.append(timeline(q, RECOMPUTE, layers=(0, 1)).bytes_sent(0))
    assert peaks[0] > peaks[1] == peaks[2] > peaks[3]
    assert sent[0] == sent[1] == sent[2] < sent[3]
    # reduce and gather, each (N - 1) / N of the 2-byte parameters
    parameters = q.step(RECOMPUTE, layers=(0, 1)).block.config.parameters()
    assert sent[2] == pytest.approx(2 * 7 / 8 * 2 * parameters, rel=1e-3)


def test_objectives_hold_a_reference_and_more_sequences() -> None:
    sft, dpo, grpo = (question(objective=name, tokens=512) for name in ("sft", "dpo", "grpo"))
    parameters = sft.config.parameters()
    for other, sequences in ((dpo, 2), (grpo, 8)):
        peak = footprint(other.step(RECOMPUTE))
        assert peak.parameters - footprint(sft.step(RECOMPUTE)).parameters == 2 * parameters
        assert other.step(RECOMPUTE).block.batch == sequences
    lora = question(objective="dpo", tokens=512, training=Training(rank=8))
    assert footprint(lora.step(RECOMPUTE)).parameters < 2.2 * parameters


def test_what_cannot_fit_says_what_would() -> None:
    with pytest.raises(ValueError, match=r"do not fit in 1.0 GB under any policy: .* tokens would fit"):
        plan_memory(question(tokens=4_000_000))
    with pytest.raises(ValueError, match=r"not even one token fits in 0.2 GB: parameters take"):
        plan_memory(question(budget=200_000_000))
    with pytest.raises(ValueError, match="cluster dgx-a100 has 8"):
        question(training=Training(ranks=9))


def test_a_device_without_host_memory_offloads_nothing() -> None:
    q = question(cluster=find_cluster("edge-lan"), dtype="float32", tokens=256, budget=None)
    plan = plan_memory(q)
    assert plan.refused == (("offload", "laptop has no host memory"),)
    assert not any("offload" in a.name for a in plan.answers)


def run(*args: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "counterpoint", "plan", "memory", *args]
    return subprocess.run(command, capture_output=True, text=True, timeout=120)


def test_the_command(tmp_path) -> None:
    args = ("--model", "smollm2-135m", "--tokens", "4096", "--budget", "6 GB", "--device", "dgx-a100")
    done = run(*args, "--json", "--picture", str(tmp_path / "memory.png"))
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert (
        found["budget_bytes"] == 6 * 10**9
        and found["answers"][0]["fits"]
        and found["longest_tokens"]["recompute"]
    )
    assert (tmp_path / "memory.png").stat().st_size > 10_000
    wrong = run("--model", "qwen3-9b", "--tokens", "10")
    assert (
        wrong.returncode == 2 and "neither a known shape" in wrong.stderr and "Traceback" not in wrong.stderr
    )


def test_the_shapes_of_published_models_are_for_planning_only() -> None:
    with pytest.raises(ValueError, match="unknown model preset"):
        ModelConfig.preset("qwen3-8b")
    assert find_shape("tiny") == ModelConfig.preset("tiny")
