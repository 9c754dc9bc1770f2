"""A layer of a model, whatever its type, as a schedule: alone here, or written into that of a step."""

from __future__ import annotations

from math import prod

from counterpoint.kernels.kernel import TensorSpec
from counterpoint.kernels.module import Operator
from counterpoint.kernels.pointwise import After
from counterpoint.model.work import LAYER_PARTS, Part
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Compute, Schedule, Value
from counterpoint.strategies.memory.cost import Block
from counterpoint.strategies.memory.layer import LayerWriter, Recipe
from counterpoint.strategies.memory.linear import LinearLayerWriter
from counterpoint.strategies.memory.operators import Values
from counterpoint.strategies.memory.policy import LayerPolicy
from counterpoint.strategies.memory.weights import adapter_weights, layer_weights


def write_layer(
    builder: Builder, recipe: Recipe, layer: int, weights: Values, cos: Value, sin: Value
) -> LayerWriter:
    """The writer of layer `layer` of the recipe's model."""
    kind = LinearLayerWriter if recipe.block.config.is_linear(layer) else LayerWriter
    return kind(builder, recipe, layer, weights, cos, sin)


def layer_schedule(recipe: Recipe, layer: int = 0) -> Schedule:
    """One layer forward and backward: inputs x, dy, cos, sin and the weights, outputs y, dx and the gradients."""
    block, config = recipe.block, recipe.block.config
    builder = Builder(f"layer {recipe.policy}", 0, 1)
    x = builder.input("x", TensorSpec((block.batch, block.tokens, config.hidden_size), block.dtype))
    dy = builder.input("dy", x.spec)
    angles = TensorSpec((1, block.tokens, 1, config.head_dim), block.dtype)
    cos, sin = builder.input("cos", angles), builder.input("sin", angles)
    specs = layer_weights(config, block.dtype, layer)
    if recipe.rank is not None:
        specs |= adapter_weights(config, recipe.rank, layer)
    weights = {name: builder.input(name, spec) for name, spec in specs.items()}
    writer = write_layer(builder, recipe, layer, weights, cos, sin)
    y = writer.forward(x)
    builder.phase = "mlp backward"
    start = builder.compute(After(), dy, y, names=("dy",))[0]
    dx = writer.backward(start)
    return builder.finish({"y": y, "dx": dx, **writer.grads})


def forward_schedule(recipe: Recipe, layer: int = 0) -> Schedule:
    """A layer's forward pass alone: inputs x, cos, sin and the weights, output y."""
    whole = layer_schedule(recipe, layer)
    steps = []
    for step in whole.steps:
        steps.append(step)
        if any(v.name == whole.outputs["y"] for v in step.writes):
            break
    needed = {name for step in steps for name in step.reads}
    inputs = tuple(v for v in whole.inputs if v.name in needed)
    return Schedule(f"{whole.name} forward", 0, 1, inputs, {"y": whole.outputs["y"]}, tuple(steps))


def layer_parts(block: Block, layer: int) -> dict[str, Part]:
    """The parts of a layer as `model.work.model_parts` has them, read off its schedule: qkv, out and mlp.

    Attention itself is left out: between ranks it is a schedule of its own.
    """
    config = block.config
    schedule = layer_schedule(Recipe(block.at(layer), LayerPolicy("keep")), layer)
    found: dict[str, list[Operator]] = {}
    for step, phase in zip(schedule.steps, schedule.phases, strict=True):
        assert isinstance(step, Compute)
        kernel, inputs = step.kernel, [schedule.values[name].spec for name in step.inputs]
        work = kernel.work(*inputs)
        if work.flops or work.nbytes:
            operator = Operator(kernel.label(), kernel.operator, work, block.dtype)
            found.setdefault(phase, []).append(operator)
    counts: dict[str, int] = dict.fromkeys(LAYER_PARTS, 0)
    for name, spec in layer_weights(config, block.dtype, layer).items():
        counts[_part_of(name)] += prod(spec.shape)
    return {
        part: Part(tuple(found[part]), tuple(found[f"{part} backward"]), count)
        for part, count in counts.items()
    }


def _part_of(name: str) -> str:
    """The part that a parameter is used in."""
    base = name.removesuffix(".bias")
    if base in ("gate_proj", "up_proj", "down_proj", "post_attention_layernorm"):
        return "mlp"
    return "out" if base in ("o_proj", "o_norm", "g_proj") else "qkv"
