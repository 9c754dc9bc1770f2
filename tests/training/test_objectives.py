"""SFT, DPO and GRPO: streamed losses are the written formulas, bad lines are named, interrupted runs go on exactly."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from counterpoint.model.decoder import Decoder
from counterpoint.training.config import TrainConfig, load_config
from counterpoint.training.mesh import open_processes
from counterpoint.training.model import model_config
from counterpoint.training.start import frozen_reference
from counterpoint.training.step import sequence_loss
from counterpoint.training.tokenizer import ByteTokenizer
from counterpoint.training.trainer import open_documents, open_stream, train
from training.runs import metrics, train_processes

SMALL = [
    "model={preset: tiny, num_hidden_layers: 1}", "data.sequence_length=96", "training.steps=6",
    "training.global_batch=2", "training.evaluate_every=3", "training.evaluate_batches=1", "optimizer.warmup=0",
    "optimizer.lr=3e-3", "checkpoint.every=2", "checkpoint.keep=9", "metrics.tensorboard=false",
    "parallel.data=1",
]  # fmt: skip


def rows(objective: str) -> list[dict]:
    def line(i: int) -> dict:
        prompt = f"{i} + {i + 1} ="[: 3 + i % 8]
        if objective == "sft":
            turns = [("user", prompt), ("assistant", f" {i}"), ("user", "and?"), ("assistant", "no")]
            messages = [{"role": role, "content": content} for role, content in turns]
            return {"messages": messages} if i % 3 == 0 else {"prompt": prompt, "completion": f" {2 * i + 1}"}
        if objective == "dpo":
            return {"prompt": prompt, "chosen": f" {2 * i + 1}.", "rejected": " many" * (1 + i % 3)}
        answers = [f" {2 * i + k}" * (k % 2 + 1) for k in range(3)]
        old = {"old_logprobs": [[-5.0 - k] * (len(a) + 1) for k, a in enumerate(answers)]}
        given = {"prompt": prompt, "completions": answers, "rewards": [0, 1, 0.5]}
        return given | (old if i % 2 else {})

    return [line(i) for i in range(9)]


def config_for(directory: Path, objective: str, *overrides: str, lines: list | None = None) -> TrainConfig:
    directory.parent.mkdir(parents=True, exist_ok=True)
    path = directory.parent / f"{objective}.jsonl"
    lines = rows(objective) if lines is None else lines
    path.write_text("".join((x if isinstance(x, str) else json.dumps(x)) + "\n" for x in lines))
    given = [f"data.paths={path}", f"directory={directory}", f"loss.objective={objective}"]
    return load_config(None, [*SMALL, *given, *overrides])


def written_loss(model: Decoder, reference: Decoder, batch, config: TrainConfig) -> torch.Tensor:
    """The loss of a sequence as the papers write it, from all logits, answer by answer."""

    def logprobs(m: Decoder) -> list[torch.Tensor]:
        found, start = [], 0
        for n in batch.documents:
            tokens, labels = (x[:, start : start + n] for x in (batch.tokens, batch.labels))
            logits = m(
                tokens,
                torch.arange(n),
                lambda q, k, v: F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True),
            )
            kept = labels[0] >= 0
            chosen = F.log_softmax(logits[0, kept], -1).gather(1, labels[0, kept, None])[:, 0]
            found.append(chosen)
            start += n
        return found

    new = logprobs(model)
    with torch.no_grad():
        frozen = logprobs(reference)
    if config.loss.objective == "sft":
        return -torch.cat(new).sum()
    if config.loss.objective == "dpo":
        (w, l), (rw, rl) = (map(torch.sum, x) for x in (new, frozen))
        return -F.logsigmoid(config.loss.beta * ((w - rw) - (l - rl)))
    rewards = torch.tensor([0, 1, 0.5])
    advantages = (rewards - rewards.mean()) / (rewards.std(correction=0) + 1e-6)
    told = batch.values["old"][batch.labels >= 0].split([len(x) for x in new])
    total = torch.zeros(())
    for lp, ref, old, a in zip(new, frozen, told, advantages, strict=True):
        ratio = (lp - (ref if old.isnan().any() else old)).exp()
        gain = torch.minimum(ratio * a, ratio.clamp(1 - config.loss.clip, 1 + config.loss.clip) * a)
        away = ref - lp
        total = total + (config.loss.kl * (away.exp() - away - 1) - gain).mean() / 3
    return total


@pytest.mark.parametrize("objective", ["sft", "dpo", "grpo"])
@pytest.mark.parametrize("tied", [True, False])
def test_streamed_losses_are_the_written_ones(tmp_path, objective, tied):
    """Loss and gradients, for 1 to 8 chunks, of a model that has moved away from its reference."""
    model = f"model={{preset: tiny, tie_word_embeddings: {tied}, initializer_range: 0.05}}".lower()
    config = config_for(tmp_path / "run", objective, model)
    shape = model_config(config.model, ByteTokenizer().vocab_size)
    moved = Decoder(shape, config.training.seed)
    with torch.no_grad():
        for p in moved.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    with open_processes(config.parallel, None) as processes:
        reference = frozen_reference(config, shape, processes) or moved
        stream = open_stream(config, open_documents(config).split("train"), ByteTokenizer())
        for batch in (next(stream) for _ in range(2)):
            expected_loss = written_loss(moved, reference, batch, config)
            expected = torch.autograd.grad(expected_loss, list(moved.parameters()))
            for chunks in range(1, 9):
                memory = f"{{layers: stream({chunks}), head_tokens: {2 * chunks}}}"
                policy = config_for(tmp_path / "run", objective, model, f"memory={memory}")
                loss = sequence_loss(moved, batch, policy, processes, reference)
                found = torch.autograd.grad(loss, list(moved.parameters()))
                assert float(loss.detach()) == pytest.approx(
                    float(expected_loss.detach()), rel=1e-6, abs=1e-6
                )
                apart = sum(float((a - b).square().sum()) for a, b in zip(found, expected, strict=True))
                whole = sum(float(b.square().sum()) for b in expected)
                assert (apart / whole) ** 0.5 <= 1e-6


@pytest.mark.parametrize("objective", ["sft", "dpo", "grpo"])
def test_a_run_that_was_interrupted_goes_on_exactly(tmp_path, objective):
    torch.set_num_threads(1)
    memory = "memory={layers: stream(3), head_tokens: 8}"
    whole, halves = tmp_path / "whole", tmp_path / "halves"
    assert train(config_for(whole, objective, memory)) == 0
    assert train(config_for(halves, objective, memory)) == 0
    for step in (4, 6):  # as if it had been killed after step 3
        shutil.rmtree(halves / "checkpoints" / f"step-0000000{step}")
    assert train(config_for(halves, objective, memory)) == 0
    for name in ("loss", "gradient_norm", "tokens"):
        assert metrics(halves, name) == metrics(whole, name)
    losses = metrics(whole)
    start = {"dpo": 0.6931472}.get(objective)
    assert start is None or losses[0] == pytest.approx(start, abs=1e-6)
    assert len(set(losses)) == 6


@pytest.mark.processes
@pytest.mark.parametrize("objective", ["dpo", "grpo"])
def test_shared_by_two_processes_the_curve_is_the_same(tmp_path, objective):
    memory = "memory={layers: stream(2), mlp_tiles: 2, head_tokens: 8}"
    assert train(config_for(tmp_path / "alone", objective)) == 0
    train_processes(config_for(tmp_path / "shared", objective, memory, "parallel.sequence=2"))
    assert metrics(tmp_path / "shared") == pytest.approx(metrics(tmp_path / "alone"), abs=1e-5)


MESSAGE = {"role": "user", "content": "x"}
BAD = {
    ("sft", '{"prompt": "x"'): r"not valid JSON",
    ("sft", "[1]"): r"holds a list, expected an object",
    ("sft", '{"prompt": "x", "text": "y"}'): r"completion is missing; the line has prompt, text",
    ("sft", '{"prompt": 3, "completion": "y"}'): r"prompt is a number, expected a text",
    ("sft", json.dumps({"messages": [MESSAGE]})): r"no assistant message",
    ("sft", '{"messages": [{"role": "user"}]}'): r"messages\[0\].content is missing",
    ("sft", '{"messages": [3]}'): r"messages\[0\] is a number",
    (
        "sft",
        json.dumps({"prompt": "x" * 100, "completion": "y"}),
    ): r"102 tokens exceed data.sequence_length = 96",
    ("dpo", '{"prompt": "x", "chosen": "y"}'): r"rejected is missing",
    ("dpo", '{"prompt": "x", "chosen": "y", "rejected": null}'): r"rejected is a null, expected a text",
    (
        "grpo",
        '{"prompt": "x", "completions": [], "rewards": []}',
    ): r"completions must be a list of at least one",
    ("grpo", '{"prompt": "x", "completions": ["a"], "rewards": [1, 2]}'): r"rewards must be 1 finite numbers",
    ("grpo", '{"prompt": "x", "completions": ["a"], "rewards": [NaN]}'): r"rewards must be 1 finite numbers",
    ("grpo", '{"prompt": "x", "completions": ["a"], "rewards": [1], "old_logprobs": [[-1]]}'): (
        r"old_logprobs\[0\] has 1 numbers, completions\[0\] has 2 tokens with its end mark"
    ),
}


@pytest.mark.parametrize(("objective", "line"), BAD, ids=[reason[:30] for reason in BAD.values()])
def test_a_bad_line_is_named_before_training_starts(tmp_path, objective, line):
    config = config_for(tmp_path / "run", objective, lines=[*rows(objective)[:4], "", line, *rows(objective)])
    where = rf"{objective}.jsonl:6: .*{BAD[objective, line]}"
    with pytest.raises(ValueError, match=where) as error:
        train(config)
    assert "\n" not in str(error.value)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_what_is_no_file_of_examples_is_refused(tmp_path):
    with pytest.raises(ValueError, match=r"data.paths is empty; name jsonl files"):
        train(load_config(None, ["loss.objective=dpo", f"directory={tmp_path}", "parallel.data=1"]))
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(ValueError, match=r"a.txt: not a jsonl file"):
        train(config_for(tmp_path / "run", "sft", f"data.paths={tmp_path}/a.txt"))
    with pytest.raises(ValueError, match=r"1 examples; give two"):
        train(config_for(tmp_path / "run", "sft", lines=rows("sft")[:1]))


def test_training_starts_from_another_runs_weights(tmp_path):
    first = tmp_path / "first"
    assert train(config_for(first, "sft", "training.steps=2")) == 0
    start = f"training.start={first}"
    assert train(config_for(tmp_path / "second", "dpo", start)) == 0
    assert metrics(tmp_path / "second")[0] == pytest.approx(0.6931472, abs=1e-6)
    with pytest.raises(ValueError, match="this run's own directory"):
        train(config_for(first, "sft", start))
    with pytest.raises(ValueError, match=r"training.start = .* another shape than this run's"):
        train(config_for(tmp_path / "third", "sft", start, "model=tiny"))
    with pytest.raises(ValueError, match=r"loss.reference: .*no such directory"):
        train(config_for(tmp_path / "third", "dpo", "loss.reference=nowhere"))


def test_examples_are_packed_whole_and_the_stream_resumes(tmp_path):
    config = config_for(tmp_path / "run", "sft")
    corpus, tokenizer = open_documents(config).split("train"), ByteTokenizer()
    stream = open_stream(config, corpus, tokenizer)
    batches = [next(stream) for _ in range(12)]
    assert all(sum(b.documents) == b.tokens.shape[1] <= 96 for b in batches)
    assert any(len(b.documents) > 1 for b in batches)
    ends = [
        (b.tokens[0, sum(b.documents[: i + 1]) - 1] == 256) for b in batches for i in range(len(b.documents))
    ]
    assert all(ends)
    again = open_stream(config, corpus, tokenizer)
    again.skip(5)
    other = open_stream(config, corpus, tokenizer)
    other.load_state_dict(again.state_dict())
    for batch in batches[5:]:
        assert torch.equal(batch.tokens, next(again).tokens)
        assert torch.equal(batch.labels, next(other).labels)
