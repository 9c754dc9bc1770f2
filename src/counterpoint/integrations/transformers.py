"""Hugging Face transformers models on a sequence that is sharded over ranks.

    parallel = sequence_parallel(model, mesh=mesh, forward="tokenring", backward="ring")
    batch = parallel.shard(input_ids, labels=labels)  # every rank passes the whole batch and gets its part
    loss = parallel(**batch).loss                     # the same number on every rank
    loss.backward()
    parallel.reduce_gradients()                       # now as if one process had seen the whole sequence

The model stays the user's object. What changes is its attention implementation ("counterpoint", in
transformers' attention interface), its loss function and a forward pre-hook; `restore` takes all three back.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import Tensor, nn
from transformers import AttentionInterface, PreTrainedModel
from transformers.masking_utils import AttentionMaskInterface

from counterpoint.integrations.sharding import ShardedBatch, document_lengths, shard_batch
from counterpoint.integrations.support import check_mask, check_model
from counterpoint.runtime.attention import attention
from counterpoint.runtime.engine import Engine
from counterpoint.schedule.timeline import Timeline
from counterpoint.strategies.sequence.attention import AttentionProblem, Choices, parse_choices
from counterpoint.strategies.sequence.blocks import AttentionShape
from counterpoint.strategies.sequence.layout import SequenceLayout

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

NAME = "counterpoint"
"""The name in transformers' attention interface."""


def sequence_parallel(
    model: PreTrainedModel,
    *,
    mesh: DeviceMesh | None = None,
    layout: str = "zigzag",
    forward: Choices = "tokenring",
    backward: Choices | None = None,
    timeline: Timeline | None = None,
    timeout: float = 300.0,
) -> SequenceParallel:
    """Make a transformers decoder attend over a sequence that is sharded over the ranks of a mesh.

    model: a causal language model or its base model, of a type in `counterpoint.integrations.support`. Call
    this on every rank of the mesh, before the model is wrapped (DDP, FSDP). layout: name of a
    `SequenceLayout`. mesh, forward, backward, timeline, timeout: as in `counterpoint.attention`.

    Raises ValueError for a model, a layout or a strategy that is not supported, with what is.
    """
    return SequenceParallel(model, mesh, layout, forward, backward, timeline, timeout)


class SequenceParallel:
    """What a sequence-parallel model needs to know: its mesh, layout and strategies; see `sequence_parallel`.

    rank, world_size: this process's place among the ranks that share the sequence.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        mesh: DeviceMesh | None,
        layout: str,
        forward: Choices,
        backward: Choices | None,
        timeline: Timeline | None,
        timeout: float,
    ) -> None:
        check_model(model)
        if isinstance(getattr(model.__dict__.get("_loss_function"), "__self__", None), SequenceParallel):
            raise ValueError(
                "the model is sequence-parallel already; call restore() on what made it so first"
            )
        self.model, self.mesh, self.layout = model, mesh, layout
        self.engine = Engine.of(mesh, timeout=timeout)
        self.rank, self.world_size = self.engine.rank, self.engine.world_size
        self._check_strategies(forward, backward)
        self._attend = partial(
            attention, mesh=mesh, forward=forward, backward=backward, timeline=timeline, timeout=timeout
        )
        self._own_loss = model.loss_function
        self._had_loss = "_loss_function" in model.__dict__
        previous = model.config._attn_implementation
        self._own_attention = "sdpa" if previous in (NAME, None) else previous
        model.set_attn_implementation(NAME)
        if model.config._attn_implementation != NAME:
            raise ValueError(
                f"transformers cannot change the attention of {type(model).__name__}; "
                "call sequence_parallel before fully_shard and other wrappers"
            )
        model.loss_function = self._loss
        self._hook = model.register_forward_pre_hook(self._before_forward, with_kwargs=True)

    def shard(
        self,
        input_ids: Tensor,
        *,
        labels: Tensor | None = None,
        documents: tuple[int, ...] | list[int] | None = None,
        position_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        num_items_in_batch: int | Tensor | None = None,
    ) -> ShardedBatch:
        """This rank's part of a batch, as keyword arguments of the model; every rank passes the same batch.

        input_ids, labels: (batch, tokens); labels are not shifted, -100 is not predicted, as everywhere in
        transformers. documents: lengths of packed documents, which do not see each other; without them they
        are read from position_ids (1 or batch, tokens), which restart where a document begins.
        attention_mask: only without padding. num_items_in_batch: what the summed loss is divided by; None
        means the labels of this batch. With gradient accumulation pass the labels of the whole step.

        The labels of the result are shifted already, across the borders of the shards too.
        Raises ValueError for padding and for shapes and documents that do not fit.
        """
        if input_ids.ndim != 2:
            raise ValueError(f"input_ids must be (batch, tokens), got {list(input_ids.shape)}")
        check_mask(attention_mask)
        if documents is None:
            documents = () if position_ids is None else document_lengths(position_ids)
        layout = SequenceLayout(self.layout, input_ids.shape[1], self.world_size, tuple(documents))
        return shard_batch(layout, self.rank, input_ids, labels, position_ids, num_items_in_batch)

    def __call__(self, **batch: Any) -> Any:
        """The model's output for this rank's part of the sequence; its loss is that of the whole sequence.

        The gradients that loss.backward() leaves must be summed over the ranks: by `reduce_gradients`, or,
        from loss * world_size, by DDP or FSDP2, which average.
        """
        return self.model(**batch)

    def reduce_gradients(self) -> None:
        """Sum the gradients over the ranks that share the sequence, once per step after the last backward.

        For a model that neither DDP nor FSDP wraps. Raises ValueError for a model that FSDP2 has sharded.
        """
        from torch.distributed.tensor import DTensor

        grads = [p.grad for p in self.model.parameters() if p.grad is not None]
        if any(isinstance(grad, DTensor) for grad in grads):
            raise ValueError("FSDP has summed these gradients already; leave reduce_gradients out")
        self._sum(*grads)

    def restore(self) -> None:
        """Give the model its own attention and loss back, for generate and whole sequences in one process."""
        self._hook.remove()
        self.model.set_attn_implementation(self._own_attention)
        if self._had_loss:
            self.model.loss_function = self._own_loss
        else:
            del self.model._loss_function

    def __deepcopy__(self, memo: dict[int, Any]) -> SequenceParallel:
        # copies of a model (averaged weights, say) talk over the same mesh, which cannot be copied
        return self

    def _check_strategies(self, forward: Choices, backward: Choices | None) -> None:
        fits = SequenceLayout(self.layout, self.world_size, self.world_size)
        first = parse_choices(forward)
        second = first if backward is None else parse_choices(backward)
        if self.mesh is not None:
            AttentionProblem(AttentionShape(1, 1, 1, 1), fits, self.engine.shape, first, second)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict]:
        layout = kwargs.pop("sequence_layout", None)
        if layout is None:
            raise ValueError(
                "a sequence-parallel model runs on batches from parallel.shard(...); for generate, and for "
                "whole sequences in one process, call parallel.restore() first"
            )
        check_mask(kwargs.pop("attention_mask", None))
        if kwargs.get("past_key_values") is not None or kwargs.setdefault("use_cache", False):
            raise ValueError(
                "a sharded sequence has no key-value cache; leave past_key_values and use_cache out"
            )
        if kwargs.get("output_attentions"):
            raise ValueError("a sharded sequence never forms attention weights; leave output_attentions out")
        return args, {**kwargs, "sharded_attention": partial(self._attend, layout=layout)}

    def _loss(self, logits: Tensor, labels: Tensor, vocab_size: int, **kwargs: Any) -> Tensor:
        if kwargs.get("shift_labels") is None or kwargs.get("num_items_in_batch") is None:
            raise ValueError("labels must be shifted across the shards: give them to parallel.shard")
        own = self._own_loss(logits=logits, labels=labels, vocab_size=vocab_size, **kwargs)
        total = own.detach().clone()
        self._sum(total)
        # the value is the sum over the ranks, the gradient is this rank's share of it
        return own + (total - own.detach())

    def _sum(self, *tensors: Tensor) -> None:
        for axis in range(self.mesh.ndim if self.mesh is not None and self.world_size > 1 else 0):
            assert self.mesh is not None
            group = self.mesh.get_group(axis)
            for work in [dist.all_reduce(x, group=group, async_op=True) for x in tensors]:
                assert work is not None
                work.wait()


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    is_causal: bool | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """transformers' attention interface: (batch, heads, tokens, head_dim) in, tokens before heads out."""
    attend = kwargs.get("sharded_attention")
    if attend is None:
        raise ValueError(
            f'the attention implementation "{NAME}" comes with a mesh: call '
            "counterpoint.integrations.transformers.sequence_parallel(model, ...), and run all of that model"
        )
    check_mask(attention_mask)
    if dropout:
        raise ValueError(
            f"attention dropout is {dropout}, and a sharded sequence has none; "
            "build the model with attention_dropout=0.0"
        )
    for name in ("softcap", "s_aux", "position_bias", "head_mask"):
        if kwargs.get(name) is not None:
            raise ValueError(f"{type(module).__name__} attends with {name}, which is not supported")
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    out = attend(query, key, value, causal=causal, window=sliding_window, scale=scaling)
    return out.transpose(1, 2).contiguous(), None


def attention_mask(*args: Any, attention_mask: Tensor | None = None, **kwargs: Any) -> None:
    """transformers' mask interface: no mask is ever formed, strategies know it from the layout."""
    check_mask(attention_mask)


AttentionInterface.register(NAME, attention_forward)
AttentionMaskInterface.register(NAME, attention_mask)
