"""Schedules as JSON and as tables: there and back for every strategy, the same text every time, errors that help."""

from __future__ import annotations

import copy
import difflib
import json
import subprocess
import sys
from pathlib import Path

import pytest

from counterpoint.schedule.schedule import Collective, Recv, Send
from counterpoint.schedule.store import from_json, to_json
from counterpoint.schedule.table import table
from counterpoint.strategies.sequence.attention import backward_schedule, forward_schedule
from support.cases import Case
from support.grid import STRATEGIES
from support.linear import LinearCase

CASES = {
    **{name: Case((4,), name, heads=8, kv_heads=2, tokens=61) for name in STRATEGIES},
    "window": Case(
        (3,), "tokenring(packets=2)", heads=4, kv_heads=2, tokens=50, window=9, documents=(20, 30)
    ),
    "composed": Case(
        (2, 2), "ulysses/ring(wire_dtype=bfloat16)", "tokenring(relay=false)/allgather", tokens=33
    ),
    "linear": LinearCase(3, 30, "scalar", "states(wire_dtype=bfloat16)", causal=False),
    "linear chain": LinearCase(3, 30, "vector", "states_chain", documents=(20, 10)),
    "mixed dtype": Case((2,), "tokenring(wire_dtype=float32)", dtype="bfloat16"),
}
schedules = pytest.mark.parametrize("name", CASES)


@schedules
def test_json_there_and_back(name: str) -> None:
    for made in CASES[name].schedules():
        for schedule in made:
            text = json.dumps(to_json(schedule))
            again = from_json(json.loads(text))
            assert again == schedule
            assert json.dumps(to_json(again)) == text
            assert again.sent_bytes() == schedule.sent_bytes() and again.memory == schedule.memory


@schedules
def test_table_is_the_same_every_time_and_complete(name: str) -> None:
    for made in CASES[name].schedules():
        for schedule in made:
            text = table(schedule)
            assert text == table(from_json(to_json(schedule))) == str(schedule)
            lines = text.splitlines()
            numbered = [line for line in lines if line.split()[:1] and line.split()[0].isdigit()]
            assert [int(line.split()[0]) for line in numbered] == list(range(len(schedule.steps)))
            for step, line in zip(schedule.steps, numbered, strict=True):
                assert step.stream in line and step.label() in line
                assert all(n in line for n in step.reads) and all(
                    f"{v.name} {v.spec}" in line for v in step.writes
                )
                assert isinstance(step, Send | Recv | Collective) == line.endswith((" in", " out"))
            assert all(line == line.rstrip() for line in lines)


def test_the_wire_column_adds_up_to_the_bytes_sent() -> None:
    for made in Case((4,), "tokenring", tokens=61).schedules():
        for schedule in made:
            cells = [line.split() for line in table(schedule).splitlines() if line.endswith(" out")]
            assert sum(int(cell[-2].replace(",", "")) for cell in cells) == sum(
                schedule.sent_bytes().values()
            )


def test_one_changed_step_changes_one_line() -> None:
    schedule = forward_schedule(CASES["ring"].problem(), 1)
    data = to_json(schedule)
    first = next(step for step in data["steps"] if step["step"] == "compute")
    first["kernel"]["scale"] = 0.5
    assert from_json(data) != schedule
    data = to_json(schedule)
    next(step for step in data["steps"] if step["step"] == "send")["to"] = 3
    before, after = table(schedule).splitlines(), table(from_json(data)).splitlines()
    changed_lines = [line for line in difflib.ndiff(before, after) if line[0] in "+-"]
    assert len(changed_lines) == 2


def test_schedules_of_one_problem_are_made_once_and_equal_ones_again() -> None:
    case = CASES["tokenring"]
    assert forward_schedule(case.problem(), 0) is forward_schedule(case.problem(), 0)
    assert hash(case.problem()) == hash(CASES["tokenring"].problem())
    assert backward_schedule(case.problem(), 0) == from_json(to_json(backward_schedule(case.problem(), 0)))


def broken(change) -> str:
    data = copy.deepcopy(to_json(forward_schedule(CASES["tokenring"].problem(), 0)))
    change(data)
    with pytest.raises(ValueError) as caught:
        from_json(data)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_damaged_files_name_the_step() -> None:
    steps = to_json(forward_schedule(CASES["tokenring"].problem(), 0))["steps"]
    compute = next(i for i, step in enumerate(steps) if step["step"] == "compute")
    text = broken(lambda d: d["steps"][2].update(step="jump"))
    assert "step 2" in text and "'jump'" in text and "collective" in text
    assert f"step {compute} " in broken(lambda d: d["steps"][compute]["kernel"].update(name="magic"))
    assert f"step {compute} " in broken(lambda d: d["steps"][compute].pop("inputs"))
    send = next(i for i, step in enumerate(steps) if step["step"] == "send")
    assert f"step {send} " in broken(lambda d: d["steps"][send].update(to="nowhere"))
    assert "no entry 'steps'" in broken(lambda d: d.pop("steps"))
    assert "input" in broken(lambda d: d["inputs"][0].pop("spec"))


def test_a_schedule_is_read_where_no_strategy_was_imported(tmp_path: Path) -> None:
    """Its kernels are known by name to the store itself."""
    names = set()
    for case in ("rsa", "window", "composed"):
        schedules = [s for made in CASES[case].schedules() for s in made]
        names |= {
            step["kernel"]["name"] for s in schedules for step in to_json(s)["steps"] if "kernel" in step
        }
        (tmp_path / f"{case}.json").write_text(json.dumps([to_json(s) for s in schedules]))
    assert {"scores", "attend", "assemble"} <= names
    program = (
        "import json, sys; from counterpoint.schedule.store import from_json\n"
        "for path in sys.argv[1:]: [from_json(s) for s in json.load(open(path))]"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, *tmp_path.glob("*.json")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
