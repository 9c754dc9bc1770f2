"""StreamBP (arXiv 2506.03077): exact, its memory by operators, the longest sequences of its tables, its times.

Nothing is fitted. The set-ups are those of the paper's appendix D and of the scripts and classes in its repository:
pure bfloat16 AdamW (parameters, gradients and both moments 2 bytes each) or rank-32 adapters in float32, batch 1 (DPO:
a pair, GRPO: a group of 8), logits 100 and layers 500 tokens at a time, norms and repeated keys as transformers 4.51
runs them, explicit T x T masks where the scripts pass one.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import partial

from counterpoint.cluster.presets import find_cluster
from counterpoint.model.config import ModelConfig
from counterpoint.model.shapes import find_shape
from counterpoint.planner.memory import first_layers, roomy
from counterpoint.reproductions.check import EXACTLY, Check, Reproduction, Tolerance
from counterpoint.reproductions.streambp_code import PublishedStream
from counterpoint.simulator.fold import fold
from counterpoint.simulator.simulate import simulate
from counterpoint.strategies.memory.cost import (
    Block,
    backward_saved_bytes,
    chunk_lengths,
    visible_pairs,
)
from counterpoint.strategies.memory.footprint import footprint
from counterpoint.strategies.memory.layer import LayerWriter
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Training
from counterpoint.strategies.memory.step import Step, step_schedule

GIB = 2**30
# The card has 80 GiB; the largest peaks that the paper's figure 3 shows for it are 77 to 78 GiB, the rest being CUDA's
# own and what the allocator cannot use.
BUDGET = 78 * GIB
WITHIN = Tolerance(relative=0.15)

KEEP = MemoryPolicy((LayerPolicy("keep"),))
CHECKPOINT = MemoryPolicy((LayerPolicy("recompute"),))
STREAM = MemoryPolicy((LayerPolicy("stream"),), head_tokens=100)  # chunks are PublishedStream's
POLICIES = {"no checkpoints": KEEP, "checkpoints": CHECKPOINT, "StreamBP": STREAM}


@dataclass(frozen=True, slots=True)
class Setup:
    """One of the paper's runs. optimizer: whether its states are there (not when the backward pass alone is measured).

    logits_stay: the caller holds the bfloat16 logits during the backward pass. head_bytes: bytes per logit at the
    head's peak where it is not that of cross entropy. more: further bytes that stay.
    """

    model: str
    training: Training
    sequences: int = 1
    optimizer: bool = True
    logits_stay: bool = False
    mask: bool = False
    more: int = 0

    def bytes_needed(self, policy: MemoryPolicy, tokens: int) -> int:
        """Peak bytes of a step on a rank."""
        config = find_shape(self.model)
        block = Block(config, self.sequences, tokens, "bfloat16", "narrow")
        writes = PublishedStream if policy is STREAM else LayerWriter
        peak = footprint(Step(block, policy, self.training), writes=writes)
        needed = peak.total - (0 if self.optimizer else peak.optimizer) + self.more
        if self.logits_stay and policy is not STREAM:
            needed += 2 * self.sequences * tokens * config.vocab_size
        if self.mask or policy is not STREAM:
            needed += 2 * self.sequences * tokens * tokens
        return needed

    def longest(self, policy: MemoryPolicy, budget: int = BUDGET) -> float:
        """Thousands of tokens of the longest sequence that fits."""
        low, high = 0, 256
        while self.bytes_needed(policy, high) <= budget:
            low, high = high, 2 * high
        while high - low > max(1, low // 300):
            middle = (low + high) // 2
            low, high = (middle, high) if self.bytes_needed(policy, middle) <= budget else (low, middle)
        return low / 1e3


FULL, LORA = Training(state="bfloat16"), Training(rank=32)
BACKWARD = replace(FULL, update=False, old_gradients=True)


# ---- longest sequences -------------------------------------------------------------------------------------------
SFT = {  # table 3: no checkpoints, checkpoints, StreamBP; thousands of tokens
    ("qwen3-4b", "full"): (7.0, 28.5, 200.0), ("qwen3-4b", "LoRA"): (7.1, 36.5, 247.0),
    ("qwen3-8b", "full"): (3.4, 15.7, 72.0), ("qwen3-8b", "LoRA"): (5.1, 30.6, 142.4),
    ("qwen3-14b", "LoRA"): (2.9, 23.0, 84.6), ("qwen3-32b", "LoRA"): (0.4, 5.9, 16.3),
}  # fmt: skip
DPO = {
    ("qwen3-4b", "full"): (18.7, 57.2), ("qwen3-4b", "LoRA"): (32.2, 100.2), ("qwen3-8b", "LoRA"): (25.5, 60.9),
    ("qwen3-14b", "LoRA"): (18.5, 36.9), ("qwen3-32b", "LoRA"): (4.4, 7.8),
}  # fmt: skip
GRPO = {
    ("qwen3-4b", "full"): (8.5, 18.2), ("qwen3-4b", "LoRA"): (12.1, 27.5), ("qwen3-8b", "LoRA"): (9.5, 16.5),
    ("qwen3-14b", "LoRA"): (6.9, 10.1),
}  # fmt: skip
ZERO = {
    3: (18.6, 92.4),
    4: (20.5, 112.0),
    5: (22.3, 121.5),
    6: (23.1, 128.7),
    7: (23.5, 131.4),
    8: (23.7, 131.8),
}
BP = {
    "qwen3-8b": (4.7, 20.0, 110.0),
    "qwen3-14b": (1.7, 9.0, 40.0),
    "qwen3-32b": (0.44, 5.7, 16.0),
}  # figure 3

AUTOCAST = (
    "without checkpoints the casts of mixed precision are kept too (copies of what adapters read, in two dtypes); they "
    "are not counted here, so more seems to fit"
)
ROWWISE = (
    "TRL takes the log-softmax of one sequence after the other, in bfloat16, and of the completion only; here the "
    "logits of all are counted as cross entropy makes them, 12 bytes each, so less seems to fit"
)
UNEVEN = {
    (
        "backward pass",
        "qwen3-32b",
    ): "16.0 here and 16.3 in table 3, which holds optimizer states besides: read in steps of 1K",
    (
        "ZeRO-2",
        3,
    ): "from 3 to 4 GPUs the published length grows by 19.6K, more than a twelfth of the states could give",
    ("DPO", "qwen3-4b LoRA"): "at 100K two masks of T x T would be 40 GB: here the trainer did not make them",
}
PROMPTS = "the lengths of prompt and completion within this figure are not published"


def sft(key: tuple[str, str]) -> Setup:
    return Setup(key[0], FULL if key[1] == "full" else LORA)


def preference(key: tuple[str, str], sequences: int) -> Setup:
    """Full training holds a copy of the model as reference; the trainers hand the trunk a mask of T x T a sequence."""
    training, copies = (FULL, 1) if key[1] == "full" else (LORA, 0)
    return Setup(key[0], training, sequences, mask=True, more=2 * copies * find_shape(key[0]).parameters())


def zero(ranks: int, stream: bool) -> Setup:
    """Two micro-batches a step: the gradients' shares of the first are there. The streamed head's gradient stays whole
    until the end of the backward pass."""
    config = find_shape("qwen3-8b")
    head = 2 * config.vocab_size * config.hidden_size if stream else 0
    training = replace(FULL, zero=2, ranks=ranks, old_gradients=True)
    return Setup("qwen3-8b", training, logits_stay=True, more=head)


def bp(model: str) -> Setup:
    """The backward pass alone: gradients of an earlier pass are there, optimizer states are not."""
    training = BACKWARD if model != "qwen3-32b" else replace(LORA, update=False, old_gradients=True)
    return Setup(model, training, optimizer=False, logits_stay=True)


def length_checks() -> list[Check]:
    checks = []

    def add(
        what: str, claimed: float, source: str, setup: Setup, name: str, tolerance, note: str = ""
    ) -> None:
        checks.append(
            Check(
                f"{what}: longest, {name}", claimed, "K tokens", source, "simulated", tolerance,
                lambda bench, setup=setup, name=name: setup.longest(POLICIES[name]), note,
            )
        )  # fmt: skip

    for key, row in SFT.items():
        for name, claimed in zip(POLICIES, row, strict=True):
            unsure = name == "no checkpoints" and key[1] == "LoRA"
            tolerance, note = (None, AUTOCAST) if unsure else (WITHIN, "")
            add(f"SFT {key[0][6:]} {key[1]}", claimed, "table 3", sft(key), name, tolerance, note)
    for model, row in BP.items():
        for name, claimed in zip(POLICIES, row, strict=True):
            unsure = name == "no checkpoints" and model == "qwen3-32b"
            tolerance, note = (None, AUTOCAST) if unsure else (WITHIN, "")
            if name == "StreamBP" and ("backward pass", model) in UNEVEN:
                tolerance, note = None, UNEVEN["backward pass", model]
            add(f"backward pass {model[6:]}", claimed, "figure 3", bp(model), name, tolerance, note)
    for ranks, row in ZERO.items():
        for name, claimed in zip(("checkpoints", "StreamBP"), row, strict=True):
            setup = zero(ranks, name == "StreamBP")
            unsure = UNEVEN.get(("ZeRO-2", ranks), "") if name == "StreamBP" else ""
            add(
                f"ZeRO-2 8b, {ranks} GPUs",
                claimed,
                "table 4",
                setup,
                name,
                None if unsure else WITHIN,
                unsure,
            )
    for objective, rows, sequences in (("DPO", DPO, 2), ("GRPO", GRPO, 8)):
        for key, row in rows.items():
            for name, claimed in zip(("checkpoints", "StreamBP"), row, strict=True):
                tolerance, note = (None, ROWWISE) if name == "checkpoints" else (WITHIN, PROMPTS)
                if name == "StreamBP" and (objective, " ".join(key)) in UNEVEN:
                    tolerance, note = None, UNEVEN[objective, " ".join(key)]
                setup = preference(key, sequences)
                add(f"{objective} {key[0][6:]} {key[1]}", claimed, "table 3", setup, name, tolerance, note)
    return checks


def memory_checks() -> list[Check]:
    """Table 9: peak memory of the backward pass of another architecture."""
    rows = {
        "no checkpoints": {3: 54.2},
        "checkpoints": {3: 35.8, 6: 41.7, 9: 47.6, 18: 65.6},
        "StreamBP": {3: 31.8, 6: 32.7, 9: 33.6, 18: 37.2},
    }
    setup = Setup("llama-3.1-8b", BACKWARD, optimizer=False, logits_stay=True)
    return [
        Check(
            f"backward pass Llama 3.1-8B, {k}K tokens: peak, {name}", claimed, "GiB", "table 9", "simulated", WITHIN,
            lambda bench, name=name, k=k: setup.bytes_needed(POLICIES[name], 1000 * k) / GIB,
        )
        for name, row in rows.items()
        for k, claimed in row.items()
    ]  # fmt: skip


# ---- work ---------------------------------------------------------------------------------------------------------
def work_checks() -> list[Check]:
    """Scores of D chunks that see their prefix, over those of all pairs: (1 + D) / (2 D)."""

    def computed(pieces: int) -> float:
        tokens = 24_000
        done, start = 0, 0
        for length in chunk_lengths(tokens, pieces):
            start += length
            done += length * start
        return done / tokens**2

    def saved(pieces: int) -> float:
        """Buffers of a chunk over those of the whole layer, input, keys and values apart."""
        block = Block(find_shape("qwen3-8b"), 1, 24_000, "bfloat16", "fused")

        def beside(policy: LayerPolicy) -> int:
            c = block.config
            whole = block.tokens * 2 * (c.hidden_size + 2 * c.num_key_value_heads * c.head_dim)
            return backward_saved_bytes(block, policy) - whole

        return beside(LayerPolicy("stream", pieces)) / beside(LayerPolicy("stream", 1))

    block = Block(find_shape("qwen3-4b"), 1, 24_000)
    return [
        *(
            Check(
                f"D = {d}: scores that chunks compute over all T x T", (1 + d) / (2 * d), "x", "section 3.2.2", "bytes",
                Tolerance(relative=1e-9), lambda bench, d=d: computed(d),
            )
            for d in (1, 3, 12, 48)
        ),
        *(
            Check(
                f"D = {d}: buffers of a chunk over those of the sequence", 1 / d, "x", "section 3.2.2", "bytes",
                Tolerance(relative=1e-9), lambda bench, d=d: saved(d),
            )
            for d in (2, 6, 24)
        ),
        Check(
            "T = 24K: pairs that causal attention needs over T x T", 0.5, "x", "formula", "bytes",
            Tolerance(relative=1e-3), lambda bench: visible_pairs(block) / 24_000**2,
        ),
    ]  # fmt: skip


# ---- time ---------------------------------------------------------------------------------------------------------
TIMES = {6: (2.5, 2.6), 9: (4.7, 4.7), 12: (7.4, 7.0), 18: (14.7, 13.2), 24: (24.3, 21.2)}
RATES = (
    "attention with an explicit mask (torch's memory-efficient kernel) is slower than FlashAttention-2, whose "
    "published rates the description of the card has; no rates of that kernel are published"
)


def seconds(config: ModelConfig, policy: MemoryPolicy, tokens: int, training: Training = BACKWARD) -> float:
    """A forward and backward pass, every score computed and masked, simulated with few layers and continued."""
    cluster = roomy(find_cluster("dgx-a100").subset(training.ranks))

    def took(layers: int) -> float:
        block = Block(first_layers(config, layers), 1, tokens, "bfloat16", "narrow")
        step = Step(block, policy, training, masked=True)
        schedules, symmetry = fold(partial(step_schedule, step), (training.ranks,))
        return simulate(schedules, cluster, symmetry=symmetry).seconds

    few, more = took(2), took(3)
    return few + (config.num_hidden_layers - 2) * (more - few)


def time_checks() -> list[Check]:
    model = find_shape("qwen3-4b")
    thirds = MemoryPolicy((LayerPolicy("stream", 3),), head_tokens=1000)
    checks = []
    for k, (baseline, streamed) in TIMES.items():
        for name, policy, claimed in (("checkpoints", CHECKPOINT, baseline), ("StreamBP", thirds, streamed)):
            checks.append(
                Check(
                    f"backward pass 4b, {k}K tokens: {name}", claimed, "s", "table 1", "simulated", None,
                    lambda bench, k=k, policy=policy: seconds(model, policy, 1000 * k), RATES,
                )
            )  # fmt: skip
    for k in (18, 24):
        checks.append(
            Check(
                f"backward pass 4b, {k}K tokens: StreamBP over checkpoints", round(TIMES[k][1] / TIMES[k][0], 3), "x",
                "table 1", "simulated", WITHIN,
                lambda bench, k=k: seconds(model, thirds, 1000 * k) / seconds(model, CHECKPOINT, 1000 * k),
            )
        )  # fmt: skip
    return checks


def exact_checks() -> list[Check]:
    """A streamed step against autograd, by the schedule and by the training runtime; what autograd is left to hold."""
    close = Tolerance(absolute=1e-12, side="at most")

    def found(what: str, pieces: int) -> float:
        from counterpoint.reproductions import streambp_exact  # torch is loaded for these checks only

        return getattr(streambp_exact, what)(pieces)

    checks = [
        Check(
            f"D = {d}: {how}: loss and all gradients against autograd, float64", 0.0, "", "section 3", "exact", close,
            lambda bench, d=d, what=what: found(what, d),
        )
        for how, what in (("schedule", "largest_difference"), ("training", "runtime_difference"))
        for d in (1, 2, 5, 8)
    ]  # fmt: skip
    return [
        *checks,
        Check(
            "D = 5: bytes autograd holds between the passes over the formula's", 1.0, "x", "conformance", "measured",
            EXACTLY, lambda bench: found("held_over_formula", 5),
        ),
    ]  # fmt: skip


REPRODUCTION = Reproduction(
    "streambp",
    "gradients against autograd; what chunks compute and hold; longest sequences for SFT, DPO, GRPO, ZeRO-2 and for "
    "the backward pass alone; times (in part)",
    (*exact_checks(), *work_checks(), *length_checks(), *memory_checks(), *time_checks()),
)
