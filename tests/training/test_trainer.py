"""A run's losses do not depend on how it is split, stopped and resumed; a lost worker ends it in seconds."""

import os
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch

from counterpoint.schedule.timeline import Timeline
from counterpoint.training.mesh import open_processes
from counterpoint.training.metrics import read_metrics
from counterpoint.training.trainer import train
from training.runs import metrics, small_config, start, train_processes


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """The uninterrupted run of one process."""
    torch.set_num_threads(1)
    directory = tmp_path_factory.mktemp("runs") / "alone"
    assert train(small_config(directory, "parallel.data=1", "training.evaluate_every=10")) == 0
    return directory


def keep_until(directory: Path, step: int) -> None:
    for path in (directory / "checkpoints").iterdir():
        if int(path.name[5:]) > step:
            shutil.rmtree(path)


def test_the_loss_falls_and_held_out_text_is_measured(alone):
    losses = metrics(alone)
    assert len(losses) == 20 and losses[-1] < losses[0] - 0.5
    lines = read_metrics(alone / "metrics.jsonl")
    assert [line["step"] for line in lines if "validation_loss" in line] == [10, 20]


def test_accumulation_equals_the_gradient_of_the_mean_token_loss(tmp_path):
    """One step over 2 sequences, against plain torch over the same tokens laid end to end."""
    import torch.nn.functional as F

    from counterpoint.model.decoder import Decoder
    from counterpoint.training.corpus import open_corpus
    from counterpoint.training.mesh import Processes
    from counterpoint.training.model import model_config
    from counterpoint.training.step import train_step
    from counterpoint.training.tokenizer import ByteTokenizer
    from counterpoint.training.trainer import open_stream

    config = small_config(tmp_path / "run", "parallel.data=1", "optimizer.clip=0")
    with open_processes(config.parallel, None) as processes:
        assert isinstance(processes, Processes) and processes.world_size == 1
        corpus, tokenizer = open_corpus(config.data.paths), ByteTokenizer()
        model = Decoder(model_config(config.model, tokenizer.vocab_size))
        optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
        before = {name: p.detach().clone() for name, p in model.named_parameters()}
        expected = {}
        stream = open_stream(config, corpus, tokenizer)
        total, count = torch.zeros(()), 0
        for batch in (next(stream) for _ in range(2)):
            documents = torch.repeat_interleave(
                torch.arange(len(batch.documents)), torch.tensor(batch.documents)
            )
            mask = (documents[:, None] == documents) & torch.ones(96, 96).tril().bool()
            positions = torch.cat([torch.arange(n) for n in batch.documents])
            logits = model(
                batch.tokens,
                positions,
                lambda q, k, v, mask=mask: F.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True),
            )
            total = total + F.cross_entropy(logits[0], batch.labels[0], reduction="sum")
            count += int((batch.labels >= 0).sum())
        (total / count).backward()
        expected = {name: p.grad.clone() for name, p in model.named_parameters()}
        optimizer.zero_grad()
        result = train_step(model, optimizer, open_stream(config, corpus, tokenizer), config, processes)
    assert result.loss == pytest.approx(float(total.detach() / count), rel=1e-6)
    for name, p in model.named_parameters():
        torch.testing.assert_close(before[name] - p.detach(), expected[name], rtol=1e-4, atol=2e-6)


@pytest.mark.processes
def test_sequence_over_four_processes_of_torchrun_gives_the_same_curve(alone):
    directory = alone.parent / "sequence"
    config = small_config(
        directory, "parallel.sequence=4", "metrics.timeline_steps=[3]", "checkpoint.every=0"
    )
    out, _ = train_processes(config, torchrun=4)
    assert metrics(directory) == pytest.approx(metrics(alone), abs=1e-4)
    assert metrics(directory, "gradient_norm") == pytest.approx(metrics(alone, "gradient_norm"), rel=1e-3)
    assert all(0 < share <= 1 for share in metrics(directory, "exposed"))
    assert "step 20/20" in out
    timeline = Timeline.read(directory / "timelines" / "step-00000003.json")
    assert timeline.ranks == [0, 1, 2, 3] and timeline.meta["forward"] == ["tokenring"]
    assert all(timeline.bytes_sent(rank) > 0 for rank in range(4))


@pytest.mark.processes
def test_resumed_on_fewer_processes_the_curve_goes_on(alone):
    """4 processes (data 2 x sequence 2), then 2, then 1, against one process without a stop."""
    directory = alone.parent / "resumed"
    config = small_config(directory, "parallel.data=2", "parallel.sequence=2", "training.steps=20")
    train_processes(config)
    assert metrics(directory) == pytest.approx(metrics(alone), abs=1e-4)

    keep_until(directory, 10)
    out, _ = train_processes(
        small_config(directory, "parallel.sequence=2", "parallel.layout=striped", "parallel.forward=ring")
    )
    assert "resuming after step 10" in out
    assert metrics(directory) == pytest.approx(metrics(alone), abs=1e-4)

    keep_until(directory, 15)
    newest = directory / "checkpoints" / "step-00000015"
    shutil.copytree(newest, newest.with_name("step-00000017"))
    damaged = next(newest.with_name("step-00000017").glob("*.distcp"))
    damaged.write_bytes(damaged.read_bytes()[:-7])
    assert train(small_config(directory, "parallel.data=1")) == 0
    assert (newest.with_name("step-00000017.damaged")).is_dir()
    assert metrics(directory) == pytest.approx(metrics(alone), abs=1e-4)


def wait_for_step(directory: Path, step: int) -> None:
    end = time.monotonic() + 60
    while len(read_metrics(directory / "metrics.jsonl")) < step:
        assert time.monotonic() < end, "the run did not start"
        time.sleep(0.05)


def children(pid: int) -> list[int]:
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


@pytest.mark.processes
def test_a_signal_saves_and_a_killed_worker_ends_the_run(tmp_path):
    directory = tmp_path / "run"
    config = small_config(directory, "parallel.sequence=2", "training.steps=5000", "checkpoint.every=0")
    process = start(config)
    wait_for_step(directory, 2)
    process.send_signal(signal.SIGTERM)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 143 and "the same command resumes" in out and not err
    (saved,) = (directory / "checkpoints").iterdir()
    assert int(saved.name[5:]) == len(read_metrics(directory / "metrics.jsonl"))

    process = start(config)
    wait_for_step(directory, int(saved.name[5:]) + 2)
    workers = children(process.pid)
    os.kill(workers[1], signal.SIGKILL)
    began = time.monotonic()
    out, err = process.communicate(timeout=30)
    assert time.monotonic() - began < 10
    assert process.returncode == 1 and err.startswith("error: rank 1 was killed by SIGKILL")
    assert err.count("\n") == 1 and "Traceback" not in err
    assert not any(Path(f"/proc/{pid}").exists() for pid in workers)
    assert [p.name for p in (directory / "checkpoints").iterdir()] == [saved.name]
