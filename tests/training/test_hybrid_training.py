"""Models with linear attention layers train, verify, resume, export and sample like the others."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.step import PHASES
from counterpoint.training.export import load_pretrained
from counterpoint.training.trained import load_trained
from counterpoint.training.trainer import train
from training.runs import metrics, small_config, train_processes

HYBRID = (
    "model={preset: tiny, layer_types: [linear_attention, full_attention], linear_decay: vector, "
    "linear_conv_kernel_dim: 3}"
)

SETTINGS = (HYBRID, "training.steps=10", "optimizer.schedule=constant")


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("hybrid") / "alone"
    assert train(small_config(directory, *SETTINGS, "parallel.data=1", "metrics.timeline_steps=[2]")) == 0
    return directory


@pytest.mark.processes
def test_losses_do_not_depend_on_processes_and_survive_a_change_of_layout(alone: Path) -> None:
    """Zigzag softmax layers and contiguous linear ones over two processes, then a resumed run of one."""
    directory = alone.parent / "shared"
    shared = ("parallel.sequence=2", "parallel.layout=zigzag", "training.steps=6")
    train_processes(small_config(directory, *SETTINGS, *shared))
    assert metrics(directory) == pytest.approx(metrics(alone)[:6], rel=2e-5)
    assert train(small_config(directory, *SETTINGS, "parallel.data=1")) == 0
    assert metrics(directory) == pytest.approx(metrics(alone), rel=2e-5)


def test_a_recorded_step_has_the_phases_of_a_predicted_one(alone: Path) -> None:
    timeline = Timeline.read(alone / "timelines" / "step-00000002.json")
    phases = {span.phase for span in timeline.spans}
    assert (
        phases <= set(PHASES) and {"qkv", "attention forward", "attention backward", "mlp backward"} <= phases
    )


def test_it_learns(alone: Path) -> None:
    losses = metrics(alone)
    assert losses[-1] < losses[0] - 0.5


def test_export_reads_back_here_and_is_refused_clearly_by_transformers(alone: Path) -> None:
    target = alone.parent / "exported"
    done = subprocess.run(
        [sys.executable, "-m", "counterpoint", "export", str(alone), str(target)],
        capture_output=True,
        text=True,
    )
    assert (
        done.returncode == 0 and "transformers has no class for model_type counterpoint_hybrid" in done.stderr
    )
    model, again = load_trained(alone)[0], load_pretrained(target)
    assert again.config == model.config
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name])
    transformers = pytest.importorskip("transformers")
    with pytest.raises(ValueError, match="counterpoint_hybrid"):
        transformers.AutoModelForCausalLM.from_pretrained(str(target))


def test_generate_samples_from_it(alone: Path) -> None:
    command = [sys.executable, "-m", "counterpoint", "generate", str(alone), "--prompt", "the voice"]
    done = subprocess.run([*command, "--max-new-tokens", "12"], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("the voice")


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ("parallel.linear=ring", "strategy 'ring' is unknown; use one of states, states_chain"),
        ("parallel.linear=states(packets=2)", "has no option 'packets'"),
        ("model.linear_decay=fast", "linear_decay 'fast' is not supported"),
        (
            "model.linear_dekay=none",
            "unknown key model.linear_dekay; the nearest known one is model.linear_decay",
        ),
    ],
)
def test_mistakes_are_found_before_training(tmp_path: Path, setting: str, message: str) -> None:
    command = [
        sys.executable,
        "-m",
        "counterpoint",
        "train",
        "--set",
        f"directory={tmp_path}",
        "--set",
        HYBRID,
    ]
    done = subprocess.run(
        [*command, "--set", "parallel.sequence=2", "--set", setting], capture_output=True, text=True
    )
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "checkpoints").exists()
