"""An offload ratio that is left open is ByteScale's, found before training starts, and said in a line."""

from __future__ import annotations

import pytest
from typer.testing import CliRunner

from counterpoint.cli.app import app
from counterpoint.cluster.presets import find_cluster
from counterpoint.planner.memory import Question, offload_ratio
from counterpoint.training.config import load_config
from counterpoint.training.model import model_config
from counterpoint.training.offload import figures, settle_offload


def settled(*overrides: str, cluster: str = "dgx-a100"):
    config = load_config(None, ["model=smollm2-135m", f"memory.cluster={cluster}", *overrides])
    return settle_offload(config, model_config(config.model), lambda: figures(config, {}))


def test_the_ratio_is_what_a_layer_hides() -> None:
    ratios = []
    for length in (32_768, 131_072):
        config, line = settled("memory.layers=offload", f"data.sequence_length={length}")
        (layer,) = config.memory.policy.layers
        assert line.startswith("offload: ") and f"{layer.share:.1%}" in line and f"{length:,} tokens" in line
        ratios.append(layer.share)
        question = Question(model_config("smollm2-135m"), find_cluster("dgx-a100"), length)
        assert layer.share == pytest.approx(offload_ratio(question), abs=1e-3)
        assert config.data.sequence_length == length
    assert 0 < ratios[0] < ratios[1] <= 1  # attention grows faster than what is kept


def test_only_what_is_open_changes() -> None:
    layers = ["keep*10", "offload*10", "offload(0.25)*5", "recompute*5"]
    config, line = settled(f"memory.layers={layers}")
    found = config.memory.policy.layers
    assert [p.kind for p in found] == ["keep"] * 10 + ["offload"] * 15 + ["recompute"] * 5
    assert found[24].share == 0.25 and found[10].share not in (0.0, 0.25) and line
    explicit = load_config(None, ["memory.layers=offload(0.25)"])
    assert settle_offload(explicit, model_config("demo"), pytest.fail) == (explicit, "")


def test_what_is_not_known_is_asked_for(tmp_path) -> None:
    with pytest.raises(
        ValueError, match=r"devices of cluster edge-lan name no host memory; .*offload\(0.5\)"
    ):
        settled("memory.layers=offload", cluster="edge-lan")
    config = load_config(None, ["memory.layers=offload(auto)"])
    with pytest.raises(ValueError, match="has not been measured; run counterpoint calibrate"):
        figures(config, {"XDG_CACHE_HOME": str(tmp_path)})


def test_without_a_gpu_training_does_not_start(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    options = ["--set", f"directory={tmp_path}/run", "--set", "memory.layers=offload"]
    with pytest.raises(ValueError, match="offload needs a GPU"):
        CliRunner().invoke(app, ["train", *options], catch_exceptions=False)
    assert not (tmp_path / "run").exists()
