"""Small training runs for tests: the same model and data, in this process or through the command line."""

import os
import subprocess
import sys
from pathlib import Path

from counterpoint.training.config import TrainConfig, load_config
from counterpoint.training.metrics import read_metrics

SMALL = [
    "model=tiny",
    "data.sequence_length=96",
    "training.steps=20",
    "training.global_batch=2",
    "training.evaluate_every=0",
    "optimizer.warmup=4",
    "optimizer.lr=3e-3",
    "checkpoint.every=5",
    "checkpoint.keep=9",
    "metrics.tensorboard=false",
]


def write_corpus(directory: Path) -> Path:
    """Documents of many lengths, some longer than a sequence."""
    path = directory / "corpus.jsonl"
    if not path.exists():
        words = [
            "the",
            "voice",
            "answers",
            "a",
            "theme",
            "at",
            "another",
            "pitch",
            "and",
            "both",
            "go",
            "on",
            "together",
        ]
        texts = [" ".join(words[(i * k) % len(words)] for k in range(3 + i * 7 % 90)) for i in range(120)]
        path.write_text("".join(f'{{"text": "{text}"}}\n' for text in texts))
    return path


def small_config(directory: Path, *overrides: str) -> TrainConfig:
    paths = f"data.paths={write_corpus(directory.parent)}"
    return load_config(None, [*SMALL, paths, f"directory={directory}", *overrides])


def start(config: TrainConfig, torchrun: int = 0) -> subprocess.Popen[str]:
    """`counterpoint train` as a user starts it, or torchrun with so many processes."""
    Path(config.directory).mkdir(parents=True, exist_ok=True)
    file = Path(config.directory).with_suffix(".yaml")
    file.write_text(config.to_yaml())
    command = [sys.executable, "-m"]
    if torchrun:
        command += ["torch.distributed.run", "--nproc-per-node", str(torchrun)]
        command += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0", "-m"]
    command += ["counterpoint", "train", str(file)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    return subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def train_processes(config: TrainConfig, torchrun: int = 0) -> tuple[str, str]:
    """Runs it to its end, which must be a good one; standard output and error."""
    process = start(config, torchrun)
    out, err = process.communicate(timeout=180)
    assert process.returncode == 0, out + err
    return out, err


def metrics(directory: Path, name: str = "loss") -> list[float]:
    lines = [line for line in read_metrics(directory / "metrics.jsonl") if name in line]
    assert [line["step"] for line in lines] == list(range(1, len(lines) + 1))
    return [line[name] for line in lines]
