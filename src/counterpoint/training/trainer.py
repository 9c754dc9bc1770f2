"""A training run, from its configuration to its last checkpoint: read `train` from top to bottom."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import torch

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.planner.batch import BatchPlan
from counterpoint.schedule.timeline import RECORDED, Timeline
from counterpoint.training import checkpoint
from counterpoint.training.config import TrainConfig
from counterpoint.training.corpus import Corpus, open_corpus, open_rows
from counterpoint.training.data import PackedStream
from counterpoint.training.example_stream import ExampleStream
from counterpoint.training.launch import StopSignal, Worker
from counterpoint.training.mesh import Processes, open_processes
from counterpoint.training.metrics import Metrics
from counterpoint.training.model import check_attention, check_memory, model_config
from counterpoint.training.optimizer import learning_rate, make_optimizer, set_learning_rate
from counterpoint.training.phases import Phases
from counterpoint.training.progress import Reporter, warn
from counterpoint.training.ragged.lengths import check_batching, read_lengths
from counterpoint.training.ragged.source import Planner, RaggedBatches
from counterpoint.training.ragged.step import LAYOUT
from counterpoint.training.ragged.stream import BatchSize, RaggedStream
from counterpoint.training.start import first_model, frozen_reference
from counterpoint.training.step import Stream, evaluate, shard, train_step
from counterpoint.training.tokenizer import Tokenizer, open_tokenizer


@dataclass(slots=True)
class Run:
    """What a run consists of; `step` and `tokens` are done, `saved` is the step of the last checkpoint."""

    config: TrainConfig
    processes: Processes
    directory: Path
    shape: ModelConfig
    model: Decoder
    optimizer: torch.optim.Optimizer
    stream: Stream | RaggedBatches
    step: int = 0
    tokens: int = 0
    saved: int = 0

    @property
    def checkpoints(self) -> Path:
        return self.directory / "checkpoints"


def train(config: TrainConfig, worker: Worker | None = None) -> int:
    """Trains as `config` says, alone or as one of the workers of a run; returns the exit code.

    Starts from the newest checkpoint in the run's directory if there is one. SIGINT and SIGTERM finish the
    step, save and return 128 + the signal. Raises ValueError or OSError, with one clear line, for what the
    user can mend, and FloatingPointError when the loss is no longer a number.
    """
    steps, training = config.training.steps, config.training
    with StopSignal() as stop, open_processes(config.processes, worker) as processes, ExitStack() as closing:
        directory = Path(config.directory)
        corpus = open_documents(config)
        tokenizer = prepare_tokenizer(config, corpus, directory / "tokenizer", processes)
        processes.first(lambda: check_examples(config, corpus, tokenizer))
        shape = model_config(config.model, tokenizer.vocab_size)
        check_attention(config, shape)
        check_memory(config, shape, processes.device.type)
        check_batching(config, shape)
        planner = closing.enter_context(start_planner(config, shape, processes))
        opened = partial(open_batches, config, tokenizer, processes, planner)
        reference = frozen_reference(config, shape, processes)
        model = shard(first_model(config, shape), config, processes)
        optimizer = make_optimizer(model, config.optimizer)
        run = Run(config, processes, directory, shape, model, optimizer, opened(corpus.split("train")))
        resume(run)

        processes.first(lambda: (directory / "config.yaml").write_text(config.to_yaml()))
        metrics = Metrics(directory, run.step, config.metrics.tensorboard) if processes.rank == 0 else None
        with Reporter(metrics, run.step, steps) as reporter:
            reporter.say(headline(run))
            seconds, counted, signal = 0.0, run.tokens, 0
            while run.step < steps and not (signal := processes.largest(stop.received)):
                began = time.perf_counter()
                timeline = wanted_timeline(config, run.step + 1)
                lr = learning_rate(run.step, steps, config.optimizer)
                set_learning_rate(optimizer, lr)
                phases = Phases() if run.step + 1 in config.metrics.timeline_steps else None
                result = train_step(
                    model, optimizer, run.stream, config, processes, timeline, reference, phases
                )
                run.step += 1
                run.tokens += result.tokens
                seconds += time.perf_counter() - began

                check_loss(result.loss, run)
                reporter.advance(run.step)
                if is_due(run.step, training.log_every, steps):
                    speed = (run.tokens - counted) / seconds
                    reporter.log(run.step, result, lr, speed, run.tokens)
                    seconds, counted = 0.0, run.tokens
                if timeline is not None and phases is not None:
                    phases.add_to(timeline, processes.sequence_rank)
                    write_timeline(timeline, run, None if result.plan is None else result.plan.plan)
                if is_due(run.step, training.evaluate_every, steps):
                    held_out = opened(corpus.split("validation"), ahead=0)
                    loss = evaluate(model, held_out, config, processes, reference)
                    reporter.log_validation(run.step, loss)
                if is_due(run.step, config.checkpoint.every, steps):
                    save(run)
            if run.step > run.saved:
                save(run)
            if run.step < steps:
                reporter.say(f"stopped after step {run.step} and saved; the same command resumes")
                return 128 + int(signal)
            reporter.say(f"done: checkpoints, metrics and tokenizer are in {directory}")
    return 0


# ---- setting up --------------------------------------------------------------------------------------
def prepare_tokenizer(config: TrainConfig, corpus: Corpus, folder: Path, processes: Processes) -> Tokenizer:
    """The run's tokenizer: made by one process when it is not there yet, then read by all."""
    open_it = partial(open_tokenizer, config.data.tokenizer, corpus, folder, config.data.vocabulary)
    processes.first(lambda: open_it() and None)
    return open_it()


def open_documents(config: TrainConfig) -> Corpus:
    """The documents, or examples, that a configuration trains on."""
    if config.loss.objective == "pretrain":
        return open_corpus(config.data.paths, config.data.field)
    return open_rows(config.data.paths)


def check_examples(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> None:
    """ValueError naming file and line when one of the examples is none; texts are read as they come."""
    if config.loss.objective != "pretrain":
        data, objective = config.data, config.loss.objective
        ExampleStream(corpus, tokenizer, objective, data.sequence_length, config.training.seed).check()


def open_stream(config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer) -> Stream:
    """Sequences of a corpus, from its beginning."""
    data, seed, objective = config.data, config.training.seed, config.loss.objective
    if objective != "pretrain":
        return ExampleStream(corpus, tokenizer, objective, data.sequence_length, seed)
    return PackedStream(corpus, tokenizer, data.sequence_length, seed, data.document_masking)


def open_batches(
    config: TrainConfig,
    tokenizer: Tokenizer,
    processes: Processes,
    planner: Planner | None,
    corpus: Corpus,
    ahead: int | None = None,
) -> Stream | RaggedBatches:
    """Packed sequences of a corpus, or ragged batches with their plans, `ahead` of them planned in advance."""
    batching = config.batching
    if not batching.ragged:
        return open_stream(config, corpus, tokenizer)
    lengths = () if batching.lengths is None else tuple(read_lengths(batching.lengths).values())
    stream = open_ragged(config, corpus, tokenizer, lengths)
    return RaggedBatches(stream, planner, processes, batching.ahead if ahead is None else ahead)


def open_ragged(
    config: TrainConfig, corpus: Corpus, tokenizer: Tokenizer, lengths: Sequence[int]
) -> RaggedStream:
    """Ragged batches of a corpus, from its beginning; lengths: of their sequences, () for those of documents."""
    batching, longest = config.batching, config.data.sequence_length
    tokens = None if batching.sequences else batching.tokens or config.training.global_batch * longest
    size = BatchSize(tokens, batching.sequences)
    return RaggedStream(corpus, tokenizer, size, longest, config.training.seed, lengths)


def start_planner(
    config: TrainConfig, shape: ModelConfig, processes: Processes
) -> AbstractContextManager[Planner | None]:
    """What plans ragged batches, on rank 0; None on the others and for packed sequences."""
    if not config.batching.ragged or processes.rank:
        return nullcontext()
    from counterpoint.training.ragged.planning import planning

    return planning(config, shape, processes.world_size)


def resume(run: Run) -> None:
    """Takes up the checkpoint that the configuration asks for, if any; ValueError when it does not fit."""
    wanted, processes = run.config.checkpoint.resume, run.processes
    if wanted == "never":
        if processes.first(lambda: bool(checkpoint.list_checkpoints(run.checkpoints))):
            raise ValueError(
                f"{run.checkpoints} holds checkpoints and checkpoint.resume is never; "
                "choose another directory or set it to auto"
            )
        return
    path = checkpoint.find(run.checkpoints, processes, warn) if wanted == "auto" else Path(wanted)
    if path is None:
        return
    if wanted != "auto" and (fault := checkpoint.check(path, processes)):
        raise ValueError(f"checkpoint.resume = {path}: not a whole checkpoint ({fault}); name another one")
    state = checkpoint.read_state(path)
    if state.model != run.shape.to_dict():
        raise ValueError(f"{path} holds another model than this run's; choose another directory")
    if state.step > run.config.training.steps:
        raise ValueError(
            f"{path} is at step {state.step}, beyond training.steps = {run.config.training.steps}; raise it"
        )
    run.stream.load_state_dict(state.data)
    checkpoint.load(path, run.model, run.optimizer, processes)
    run.step, run.tokens, run.saved = state.step, state.tokens, state.step


# ---- while it runs -----------------------------------------------------------------------------------
def save(run: Run) -> None:
    """Writes a checkpoint of the run as it stands."""
    config = run.config.model_dump(mode="json")
    state = checkpoint.RunState(run.step, run.tokens, run.stream.state_dict(), config, run.shape.to_dict())
    keep = run.config.checkpoint.keep
    checkpoint.save(run.checkpoints, run.model, run.optimizer, state, keep, run.processes)
    run.saved = run.step


def check_loss(loss: float, run: Run) -> None:
    """FloatingPointError when the loss is no longer a number: what follows would not be worth saving."""
    if not math.isfinite(loss):
        raise FloatingPointError(
            f"the loss is {loss} at step {run.step}; lower optimizer.lr or raise optimizer.warmup and start "
            f"again from step {run.saved}"
        )


def is_due(step: int, every: int, steps: int) -> bool:
    """Whether something done every so many steps, 0 for never, and at the end, is due after `step`."""
    return every > 0 and (step % every == 0 or step == steps)


def wanted_timeline(config: TrainConfig, step: int) -> Timeline | None:
    """A timeline to record this step in, if anybody will read it."""
    exposed = config.metrics.exposed and config.processes.sequence_size > 1
    logged = is_due(step, config.training.log_every, config.training.steps)
    return Timeline() if (exposed and logged) or step in config.metrics.timeline_steps else None


def write_timeline(timeline: Timeline, run: Run, plan: BatchPlan | None = None) -> None:
    """The timelines of all ranks as one, for reading back (.json) and for Perfetto (.perfetto.json)."""
    parallel, folder = run.config.parallel, run.directory / "timelines"
    # the runtime numbers ranks within a replica
    offset = run.processes.data_rank * run.processes.sequence_size
    parts = run.processes.gather(renumbered(timeline, offset))

    def write() -> None:
        whole = Timeline.merge(parts)
        whole.meta |= {
            "step": run.step,
            "forward": list(parallel.strategies[0]),
            "backward": list(parallel.strategies[1]),
            "layout": parallel.layout,
            "data": parallel.data,
            "sequence": list(parallel.sequence),
            "sequence_length": run.config.data.sequence_length,
            RECORDED: "attention",  # the parameters' own messages and memory are torch's
        }
        if plan is not None:
            whole.meta |= {"layout": LAYOUT, "plan": plan.to_json()}
        folder.mkdir(exist_ok=True)
        whole.write(folder / f"step-{run.step:08d}.json")
        whole.write_perfetto(folder / f"step-{run.step:08d}.perfetto.json")

    run.processes.first(write)


def renumbered(timeline: Timeline, offset: int) -> Timeline:
    """The timeline with `offset` added to every rank."""
    spans = [
        replace(
            span,
            rank=span.rank + offset,
            peer=None if span.peer is None else span.peer + offset,
            links=tuple((peer + offset, nbytes) for peer, nbytes in span.links),
        )
        for span in timeline.spans
    ]
    memory = [replace(event, rank=event.rank + offset) for event in timeline.memory]
    return Timeline(timeline.source, spans, memory, timeline.meta)


def headline(run: Run) -> str:
    """What is about to run, in one line."""
    config, processes = run.config, run.processes
    start = f"resuming after step {run.step}" if run.step else "starting"
    axes = " x ".join(map(str, (processes.data_size, *config.parallel.sequence)))
    how = f", {'/'.join(config.parallel.strategies[0])}" if processes.sequence_size > 1 else ""
    length = config.data.sequence_length
    if isinstance(run.stream, RaggedBatches):
        size = run.stream.stream.size
        most = (
            f"{size.sequences:,} sequences"
            if size.sequences
            else f"up to {size.tokens:,} tokens in sequences"
        )
        work = f"{most} of at most {length:,} tokens per step, planned by {config.batching.solver} for"
        where = f"{processes.world_size} processes"
    else:
        work, where = (
            f"{config.training.global_batch} sequences of {length:,} tokens per step,",
            f"{axes} processes",
        )
        where += " (data x sequence)"
    return f"{start}: {run.shape.parameters():,} parameters, {work} {where}{how}, {processes.device.type}"
