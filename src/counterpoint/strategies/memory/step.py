"""One training step of a whole model under a memory policy, as the schedule of one of N ranks.

Forward and backward through all layers and the head, the exchange of gradients and parameters, and AdamW. Every rank
has sequences of its own. Parameters, gradients and optimizer states are values like activations, so that the memory of
the schedule is the memory of the step: gradients come into being while the inputs that layers kept go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.loss import Embed, EmbedBackward
from counterpoint.kernels.pointwise import Accumulate, Empty
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Schedule, Value
from counterpoint.strategies.memory.cost import Block
from counterpoint.strategies.memory.head import HeadWriter
from counterpoint.strategies.memory.layer import LayerWriter, Recipe
from counterpoint.strategies.memory.layers import write_layer
from counterpoint.strategies.memory.operators import Values
from counterpoint.strategies.memory.policy import LayerPolicy, MemoryPolicy
from counterpoint.strategies.memory.sharding import Shards, Training
from counterpoint.strategies.memory.weights import adapter_weights, layer_weights


@dataclass(frozen=True, slots=True)
class Step:
    """The sequences of one rank, what is kept of them, and what is trained. masked: see `Recipe`."""

    block: Block
    policy: MemoryPolicy
    training: Training
    masked: bool = False

    def recipe(self, layer: int) -> Recipe:
        policy = self.policy.layer(layer, self.block.config.num_hidden_layers)
        return Recipe(self.block.at(layer), policy, self.policy.mlp_tiles, self.training.rank, self.masked)


def parameter_groups(block: Block) -> dict[str, dict[str, TensorSpec]]:
    """The parameters of a model by group: "embed", one per layer ("0", "1", ...), "head"."""
    c = block.config
    table = {"weight": TensorSpec((c.vocab_size, c.hidden_size), block.dtype)}
    head = {"norm": TensorSpec((c.hidden_size,), block.dtype), **({} if c.tie_word_embeddings else table)}
    return {"embed": table, **{f"{i}": layer_weights(c, block.dtype, i) for i in c.layers}, "head": head}


def step_schedule(step: Step, rank: int = 0) -> Schedule:
    """What a rank does in a step.

    Inputs: tokens and labels (B, S), rotary angles "cos" and "sin" (1, S, 1, D), parameters and states by group.
    Outputs: "loss" (a sum over this rank's tokens), parameters and states, or gradients without an update.
    """
    return _Writer(step, rank).write()


class _Writer:
    def __init__(self, step: Step, rank: int) -> None:
        self.step, self.block, self.config, self.training = step, step.block, step.block.config, step.training
        self.builder = Builder(f"step {step.training.zero}", rank, step.training.ranks)
        self.shards = Shards(self.builder, step.training, rank)

    def write(self) -> Schedule:
        c, block, b = self.config, self.block, self.builder
        tokens = b.input("tokens", TensorSpec((block.batch, block.tokens), "int64"))
        labels = b.input("labels", tokens.spec)
        angles = TensorSpec((1, block.tokens, 1, c.head_dim), block.dtype)
        cos, sin = b.input("cos", angles), b.input("sin", angles)
        for group, specs in parameter_groups(block).items():
            rank = self.training.rank
            adapters = adapter_weights(c, rank, int(group)) if rank is not None and group.isdigit() else None
            self.shards.declare(group, specs, adapters)
        outputs: Values = {}
        b.phase = "reference"
        if self.training.reference:
            outputs["reference"] = self._reference(tokens, labels, cos, sin)
        b.phase = "embedding"
        x = b.compute(Embed(), tokens, self.shards.weights("embed", tokens)["weight"], names=("x",))[0]
        writers: list[LayerWriter] = []
        for i in c.layers:
            writers.append(write_layer(b, self.step.recipe(i), i, self.shards.weights(f"{i}", x), cos, sin))
            x = writers[-1].forward(x)
        b.phase = "head"
        dx, tied, outputs["loss"] = self._head(x, labels)
        for i in reversed(c.layers):
            writer = writers.pop()
            writer.prefetch(dx)
            if writers:
                writers[-1].prefetch(dx)
            writer.weights = self.shards.weights(f"{i}", dx)
            dx = writer.backward(dx)
            b.phase = "reduce"
            self.shards.reduce(f"{i}", writer.grads)
        b.phase = "embedding backward"
        if self.training.rank is None:
            weight = self.shards.weights("embed", dx)["weight"]
            made = b.compute(EmbedBackward(), dx, tokens, weight, names=("dw",))[0]
            if tied is not None:
                made = b.compute(Accumulate(), tied, made)[0]
            self.shards.reduce("embed", {"weight": made})
        else:
            outputs["end"] = b.compute(Empty(TensorSpec((0,))), dx, names=("end",))[0]  # dx itself goes
        b.phase = "optimizer"
        if self.training.update:
            self.shards.update()
        gradients = {f"gradient {name}": v for name, v in self.shards.gradients.items()}
        return b.finish({**outputs, **self.shards.outputs, **gradients})

    def _head(self, x: Value, labels: Value) -> tuple[Value, Value | None, Value]:
        """(gradient of x, gradient of the embedding where it is the head's weight too, loss)."""
        weights = dict(self.shards.weights("head", x))
        tied = "weight" not in weights
        if tied:
            weights["weight"] = self.shards.weights("embed", x)["weight"]
        head = HeadWriter(self.builder, self.block, weights, self.training.rank, self.step.policy.head_tokens)
        dx = head.forward_backward(x, labels)
        assert head.loss is not None
        self.shards.reduce("head", head.grads)
        return dx, head.grads.get("weight") if tied else None, head.loss

    def _reference(self, tokens: Value, labels: Value, cos: Value, sin: Value) -> Value:
        """The frozen model's loss: with adapters that of the model without them, else of a copy."""
        block, b, policy = self.block, self.builder, self.step.policy
        copies = self.training.rank is None

        def weights(group: str, after: Value) -> Values:
            if not copies:
                return self.shards.weights(group, after)
            specs = parameter_groups(block)[group]
            return {name: b.input(f"reference.{group}.{name}", spec) for name, spec in specs.items()}

        embed = weights("embed", tokens)
        x = b.compute(Embed(), tokens, embed["weight"], names=("x",))[0]
        for i in self.config.layers:
            recipe = replace(self.step.recipe(i), rank=None)
            if recipe.policy.kind == "offload":
                recipe = replace(recipe, policy=LayerPolicy("keep"))
            x = write_layer(b, recipe, i, weights(f"{i}", x), cos, sin).forward(x)
        last = weights("head", x)
        if "weight" not in last:
            last = {**last, "weight": (embed if copies else weights("embed", x))["weight"]}
        return HeadWriter(b, block, last, None, policy.head_tokens).forward(x, labels)
