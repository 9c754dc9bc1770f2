"""The page of a run directory shows what the directory holds, and says what is missing or damaged."""

import json
from dataclasses import replace

import pytest

from counterpoint.report.run import recorded_timelines, report_run
from counterpoint.report.sections import Section
from counterpoint.schedule.timeline import RECORDED, Span, Timeline


@pytest.fixture
def directory(tmp_path, tokenring):
    (tmp_path / "timelines").mkdir()
    for step in (5, 20):
        timeline = tokenring(2, jitter=0.1, seed=step, source="measured")
        timeline.meta["forward"] = ["ring", "tokenring"]
        timeline.write(tmp_path / "timelines" / f"step-{step:08d}.json")
        timeline.write_perfetto(tmp_path / "timelines" / f"step-{step:08d}.perfetto.json")
    lines = [
        {"step": i, "loss": 5.0 - i / 10, "tokens_per_second": 900.0, "exposed": None} for i in range(1, 21)
    ]
    lines.append({"step": 20, "validation_loss": 3.25})
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    (tmp_path / "config.yaml").write_text("training:\n  steps: 20 # <last>\n")
    return tmp_path


def test_a_run_becomes_a_page(directory):
    page = report_run(directory, sections=[Section("Samples", preformatted="def f(): ...")])
    assert page == directory / "report.html"
    html = page.read_text()
    order = [html.index(f"<h2>{h}</h2>") for h in ("Loss", "Timeline", "Speed", "Samples", "Configuration")]
    assert order == sorted(order)
    for cell in ("4.9000", "3.0000", "3.2500"):
        assert f">{cell}</td>" in html
    assert "steps: 20 # &lt;last&gt;" in html
    assert "step 20: from rank (row) to rank (column)" in html
    assert "forward ring, tokenring" in html
    assert "step 5" not in html


def test_two_timelines_of_a_run_are_compared(directory):
    html = report_run(directory, directory / "both.html", timelines=2).read_text()
    assert "Largest differences" in html
    assert "step 5" in html and "step 20" in html


def test_a_recorded_part_is_compared_with_the_same_part_of_a_prediction(directory, tokenring):
    """The trainer records the messages of attention; a predicted step sends parameters as well."""
    attention = tokenring(2, source="simulated")
    spans = [replace(s, phase="attention forward") for s in attention.spans]
    state = Span(
        0, "state", "collective", "gather", 0.0, 1e-3, nbytes=10**9, links=((1, 10**9),), phase="gather"
    )
    predicted = Timeline("simulated", [*spans, state], attention.memory)
    for name, part in (("part", "attention"), ("whole", "")):
        measured = tokenring(2, source="measured")
        measured.meta |= {RECORDED: part} if part else {}
        measured.write(directory / "timelines" / "step-00000030.json")
        html = report_run(directory, directory / f"{name}.html", predicted=predicted).read_text()
        assert ("Bytes sent for attention" in html) == bool(part)
        assert ("Peak of a rank" in html) == (not part)
        assert ("Both count the same bytes" in html) == bool(part)


def test_files_for_perfetto_are_not_timelines(directory):
    assert sorted(recorded_timelines(directory)) == [5, 20]


def test_what_is_not_a_run_is_refused(tmp_path, directory):
    with pytest.raises(FileNotFoundError, match="not a directory"):
        report_run(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(ValueError, match=r"neither metrics\.jsonl nor timelines"):
        report_run(tmp_path / "empty")
    damaged = directory / "timelines" / "step-00000020.json"
    damaged.write_text(damaged.read_text()[:100])
    with pytest.raises(ValueError, match=r"step-00000020\.json is not a timeline"):
        report_run(directory)
    assert not (directory / "report.html").exists()
