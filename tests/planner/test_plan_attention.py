"""The planner knows what the methods' algebra says, because it simulates the schedules themselves."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoint.cluster.load import parse_cluster
from counterpoint.cluster.presets import find_cluster
from counterpoint.planner.attention import Question, estimate, plan_attention
from counterpoint.strategies.sequence.blocks import AttentionShape

MHA = AttentionShape(1, 32, 32, 128, "bfloat16")
GQA = AttentionShape(1, 32, 4, 128, "bfloat16")


def best(question: Question, *families: str, which: str = "forward") -> float:
    """Seconds of the fastest of some flat strategies."""
    layout = "zigzag" if question.causal else "contiguous"
    found = [estimate(question, (question.ranks,), layout, (name,), which) for name in families]  # type: ignore[arg-type]
    assert all(not e.error for e in found), found
    return min(e.seconds for e in found)


def test_queries_travel_when_heads_are_many_and_links_are_per_pair() -> None:
    question = Question(MHA, find_cluster("a10x4-pcie"), 4, 12_000)
    assert best(question, "tokenring") < 0.9 * best(question, "ring")
    assert best(question, "tokenring", which="backward") < best(question, "ring", which="backward")


def test_keys_travel_when_few_heads_meet_a_shared_port() -> None:
    question = Question(GQA, find_cluster("dgx-h100"), 8, 32_000)
    keys, queries = best(question, "ring", "allgather"), best(question, "tokenring")
    assert keys < queries
    answer = plan_attention(question).answers[0]
    assert "tokenring" not in answer.forward.name


def test_queries_travel_when_few_new_tokens_meet_a_long_cache() -> None:
    short = Question(GQA, find_cluster("a10x4-pcie"), 4, 1_000, cached=63_000, phase="prefill")
    assert best(short, "tokenring") < 0.5 * best(short, "ring", "allgather")
    whole = Question(GQA, find_cluster("a10x4-pcie"), 4, 16_000, cached=0, phase="prefill")
    assert best(whole, "ring") < best(whole, "tokenring")


def test_the_first_answer_is_fast_and_the_others_follow_by_time() -> None:
    plan = plan_attention(Question(MHA, find_cluster("a10x4-pcie"), 4, 8_000))
    others = [a.seconds for a in plan.answers[1:]]
    assert others == sorted(others)
    assert plan.answers[0].seconds <= 1.01 * min(others)
    for answer in plan.answers:
        assert answer.backward is not None
        if "ulysses" in answer.backward.name:
            assert answer.forward.strategies == answer.backward.strategies
    first = plan.answers[0]
    assert first.forward.name in plan.reason
    assert any(len(answer.mesh) == 2 for answer in plan.answers)


def test_a_cluster_written_by_hand_is_planned_for() -> None:
    text = Path("src/counterpoint/cluster/presets/a10x4-pcie.yaml")
    cluster = parse_cluster((Path(__file__).parents[2] / text).read_text())
    assert plan_attention(Question(GQA, cluster, 2, 4_000, phase="prefill")).answers


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"ranks": 5}, "5 ranks were asked for, but cluster a10x4-pcie has 1 to 4"),
        ({"tokens": 3}, "3 tokens do not reach 4 ranks"),
        ({"cached": 10}, "a cache goes with phase prefill"),
    ],
)
def test_impossible_questions_are_refused(change: dict, message: str) -> None:
    values = {"ranks": 4, "tokens": 100, **change}
    with pytest.raises(ValueError, match=message):
        Question(MHA, find_cluster("a10x4-pcie"), **values)


def test_the_command_prints_json_for_programs() -> None:
    arguments = [
        "plan",
        "attention",
        "--model",
        "smollm2-135m",
        "--cluster",
        "a10x4-pcie",
        "--tokens",
        "4096",
        "--json",
    ]
    done = subprocess.run([sys.executable, "-m", "counterpoint", *arguments], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    answers = json.loads(done.stdout)["answers"]
    assert answers[0]["seconds"] <= answers[-1]["seconds"]
    assert {"forward", "backward", "mesh", "layout"} <= answers[0].keys()
