"""From training to text: generate and export read what train wrote."""

import subprocess
import sys

import pytest
import torch

from counterpoint.training.trained import load_trained
from counterpoint.training.trainer import train
from training.runs import small_config


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    directory = tmp_path_factory.mktemp("trained") / "run"
    config = small_config(
        directory, "training.steps=4", "parallel.data=1", "data.tokenizer=bpe", "data.vocabulary=300"
    )
    assert train(config) == 0
    return directory


def test_export_and_run_directory_hold_the_same_model(run, tmp_path):
    command = [sys.executable, "-m", "counterpoint", "export", str(run), str(tmp_path / "hf")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    ours, tokenizer = load_trained(run)
    theirs, other = load_trained(tmp_path / "hf")
    assert tokenizer.encode("both go on") == other.encode("both go on")
    for (name, p), q in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        assert torch.equal(p, q), name


def test_generate_continues_the_prompt_the_same_way_for_the_same_seed(run):
    command = [
        sys.executable,
        "-m",
        "counterpoint",
        "generate",
        str(run),
        "-p",
        "the voice",
        "-n",
        "8",
        "--seed",
    ]
    texts = [
        subprocess.run([*command, seed], capture_output=True, text=True, timeout=60, check=True).stdout
        for seed in ("1", "1")
    ]
    assert texts[0] == texts[1] and texts[0].startswith("the voice") and len(texts[0]) > len("the voice\n")
