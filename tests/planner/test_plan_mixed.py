"""One table for a model with mixed layers: the sum is that of its parts, and layouts are changed where types meet."""

from __future__ import annotations

import json

import pytest
from typer.testing import CliRunner

from counterpoint.cli.app import app
from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.planner.mixed import MixedQuestion, layer_types, plan_mixed

KINDS = ("linear_attention", "linear_attention", "full_attention", "linear_attention")
MODEL = ModelConfig.from_dict(
    {
        "model_type": "llama", "vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
        "num_attention_heads": 4, "num_key_value_heads": 4, "layer_types": list(KINDS), "linear_decay": "vector",
    }
)  # fmt: skip


def test_the_whole_is_the_sum_of_its_parts() -> None:
    plan = plan_mixed(MixedQuestion(MODEL, find_cluster("a10x4-pcie"), 2, 4096))
    assert {answer.layout for answer in plan.answers} == {"zigzag", "contiguous"}
    assert [a.seconds for a in plan.answers] == sorted(a.seconds for a in plan.answers)
    for answer in plan.answers:
        lines = {line.type.name: line for line in answer.lines}
        assert lines["linear_attention"].seconds == pytest.approx(
            3 * lines["linear_attention"].answer.seconds
        )
        assert lines["linear_attention"].answer.layout == "contiguous"
        assert lines["full_attention"].answer.layout == answer.layout
        assert answer.moves == (2 if answer.layout == "zigzag" else 0)
        assert (answer.move_seconds > 0) == (answer.layout == "zigzag")
        parts = sum(line.seconds for line in answer.lines) + answer.move_seconds
        assert answer.seconds == pytest.approx(parts)
    tried = {kind.name: answers for kind, answers in plan.tried}
    assert {a.forward.name.split("(")[0] for a in tried["linear_attention"]} == {"states", "states_chain"}


def test_types_are_told_apart_by_their_window() -> None:
    config = ModelConfig.from_dict(
        {
            **MODEL.to_dict(), "model_type": "qwen2", "layer_types": ["sliding_attention", "full_attention"] * 2,
            "use_sliding_window": True, "sliding_window": 64,
        }
    )  # fmt: skip
    assert [(t.name, t.layers, t.window) for t in layer_types(config)] == [
        ("sliding_attention", (0, 2), 64),
        ("full_attention", (1, 3), None),
    ]


def test_the_command_answers_in_a_table_and_in_json(tmp_path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps(MODEL.to_dict()))
    command = [
        "plan",
        "attention",
        "--model",
        str(path),
        "--cluster",
        "a10x4-pcie",
        "--ranks",
        "2",
        "--tokens",
        "2048",
    ]
    shown = CliRunner().invoke(app, command)
    assert shown.exit_code == 0 and "changes of layout" in shown.output and "linear_attention" in shown.output
    found = json.loads(CliRunner().invoke(app, [*command, "--json"]).stdout)
    assert found["answers"][0]["seconds"] <= found["answers"][-1]["seconds"]
    assert {row["type"] for row in found["answers"][0]["layers"]} == {"linear_attention", "full_attention"}


def test_impossible_questions_are_refused() -> None:
    with pytest.raises(ValueError, match="5 ranks were asked for, but cluster a10x4-pcie has 1 to 4"):
        MixedQuestion(MODEL, find_cluster("a10x4-pcie"), 5, 4096)
