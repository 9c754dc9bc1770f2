"""The page and the example: what they say is what there is."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("transformers", reason="needs the extra hf: pip install counterpoint[hf]")

from counterpoint.integrations.support import MODEL_TYPES
from counterpoint.strategies.sequence.attention import STRATEGIES

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "huggingface.md").read_text()


def test_the_page_names_every_supported_type_and_strategy():
    [types] = re.findall(r"Supported types: (.*)\.", PAGE)
    assert re.findall(r"`(\w+)`", types) == list(MODEL_TYPES)
    assert [name for name in STRATEGIES if f"`{name}`" not in PAGE] == []


@pytest.mark.processes
def test_the_example_trains_and_its_first_loss_is_that_of_one_process(tmp_path):
    config = {
        "model_type": "qwen3",
        "vocab_size": 256,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 2,
        "num_attention_heads": 6,
        "num_key_value_heads": 3,
        "head_dim": 8,
        "tie_word_embeddings": True,
    }
    (tmp_path / "config.json").write_text(json.dumps(config))
    [flags] = re.findall(r"torchrun --nproc-per-node 2 examples/huggingface.py (.*)", PAGE)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    command += [str(ROOT / "examples" / "huggingface.py"), *flags.split(), "--tokens", "101", "--steps", "3"]
    done = subprocess.run(
        [*command, "--model", str(tmp_path / "config.json")],
        capture_output=True,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "src")},
        timeout=120,
    )
    assert done.returncode == 0, done.stderr
    losses = [float(loss) for loss in re.findall(r"loss ([\d.]+), 5\d of 101 tokens", done.stdout)]
    [alone] = re.findall(r"alone ([\d.]+)", done.stdout)
    assert losses[0] == pytest.approx(float(alone), abs=2e-6)
    assert losses == sorted(losses, reverse=True) and len(set(losses)) == 3
