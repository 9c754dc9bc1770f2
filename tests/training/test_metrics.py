"""metrics.jsonl: one line per step, also after a run was cut short and resumed."""

import pytest

from counterpoint.training.metrics import Metrics, read_metrics


def test_resuming_drops_what_came_after_the_checkpoint(tmp_path):
    metrics = Metrics(tmp_path, 0)
    for step in range(1, 8):
        metrics.write(step, {"loss": float(step)})
    metrics.close()
    with (tmp_path / "metrics.jsonl").open("a") as file:
        file.write('{"step": 8, "lo')  # the process was killed while writing
    metrics = Metrics(tmp_path, 5)
    for step in range(6, 10):
        metrics.write(step, {"loss": -float(step)})
    metrics.close()
    lines = read_metrics(tmp_path / "metrics.jsonl")
    assert [line["step"] for line in lines] == list(range(1, 10))
    assert [line["loss"] for line in lines] == [1, 2, 3, 4, 5, -6, -7, -8, -9]


def test_tensorboard_holds_the_same_values(tmp_path):
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    metrics = Metrics(tmp_path, 0, True)
    metrics.write(3, {"loss": 2.5, "exposed": None})
    metrics.close()
    events = EventAccumulator(str(tmp_path / "tensorboard")).Reload()
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(3, 2.5)]
    assert events.Tags()["scalars"] == ["loss"]


def test_tensorboard_missing_is_an_error_only_when_asked_for(tmp_path, monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    Metrics(tmp_path, 0, "auto").close()
    with pytest.raises(ValueError, match=r"pip install 'counterpoint\[tensorboard\]'"):
        Metrics(tmp_path, 0, True)
