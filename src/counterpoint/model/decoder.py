"""A decoder-only transformer whose parameters bear the names of transformers' LlamaForCausalLM.

Shapes: B batch, S tokens at hand (of this rank), H query heads, G key/value heads, D head dimension,
E hidden size, V vocabulary. How tokens attend to each other is the caller's affair: `forward` is given
a function, so that nothing here knows whether the sequence lives in one process or in many.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from counterpoint.model.config import ModelConfig
from counterpoint.model.linear import LinearAttention, Mix
from counterpoint.model.loss import token_loss

# q (B, H, S, D), k (B, G, S, D), v (B, G, S, D) -> out (B, H, S, D)
Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
# layer, x (B, S, E), cos, sin (1 or B, 1, S, D), attend -> x: runs a layer, and decides what it keeps
RunLayer = Callable[["Layer", Tensor, Tensor, Tensor, Any], Tensor]
# hidden states (B, S, E), head -> whatever is wanted of them
UseHidden = Callable[[Tensor, nn.Linear], Any]
# brings hidden states (B, S, E) to the layout of the layer that comes next
Move = Callable[[Tensor], Tensor]


class Linear(nn.Linear):
    """nn.Linear without its own initialisation: Decoder.initialise fills it from one seeded generator."""

    def reset_parameters(self) -> None:
        pass


class Embedding(nn.Embedding):
    """nn.Embedding without its own initialisation, for the same reason."""

    def reset_parameters(self) -> None:
        pass


class Attention(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, self.head_dim = config.hidden_size, config.head_dim
        q, kv = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
        self.q_proj = Linear(hidden, q, bias=config.attention_bias)
        self.k_proj = Linear(hidden, kv, bias=config.attention_bias)
        self.v_proj = Linear(hidden, kv, bias=config.attention_bias)
        self.o_proj = Linear(q, hidden, bias=config.output_bias)
        norm = nn.RMSNorm if config.qk_norm else _no_norm
        self.q_norm = norm(config.head_dim, config.rms_norm_eps)
        self.k_norm = norm(config.head_dim, config.rms_norm_eps)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend) -> Tensor:
        return self.output(attend(self.queries(x, cos, sin), *self.keys_values(x, cos, sin)))

    def queries(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        """(B, H, S, D), rotated."""
        q = self._heads(self.q_proj(x))
        # back to the projection's dtype: under autocast the norm and the angles are float32
        return _rotate(self.q_norm(q).transpose(1, 2), cos, sin).to(q.dtype)

    def keys_values(self, x: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        """(B, G, S, D) each, the keys rotated."""
        k, v = self._heads(self.k_proj(x)), self._heads(self.v_proj(x))
        return _rotate(self.k_norm(k).transpose(1, 2), cos, sin).to(k.dtype), v.transpose(1, 2)

    def output(self, out: Tensor) -> Tensor:
        """(B, H, S, D) of attention to (B, S, E)."""
        return self.o_proj(out.transpose(1, 2).flatten(2))

    def _heads(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, self.head_dim))


class FeedForward(nn.Module):
    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        hidden, inner, bias = config.hidden_size, config.intermediate_size, config.mlp_bias
        self.gate_proj = Linear(hidden, inner, bias=bias)
        self.up_proj = Linear(hidden, inner, bias=bias)
        self.down_proj = Linear(inner, hidden, bias=bias)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Layer(nn.Module):
    def __init__(self, config: ModelConfig, index: int) -> None:
        super().__init__()
        self.config = config
        self.self_attn: Any = (
            LinearAttention(config, Linear) if config.is_linear(index) else Attention(config)
        )
        self.mlp = FeedForward(config)
        self.input_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.post_attention_layernorm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self, x: Tensor, cos: Tensor, sin: Tensor, attend: Attend | Mix, run: RunLayer | None = None
    ) -> Tensor:
        # through the module's own call, so that what wraps modules (FSDP) sees one forward per layer
        return self.compute(x, cos, sin, attend) if run is None else run(self, x, cos, sin, attend)

    def compute(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        attend: Attend | Mix,
        mlp: Callable[[Tensor], Tensor] | None = None,
    ) -> Tensor:
        """The layer as it is written, with another way to run its feed-forward if given."""
        given = (attend,) if isinstance(self.self_attn, LinearAttention) else (cos, sin, attend)
        x = x + self.self_attn(self.input_layernorm(x), *given)
        return self.feed_forward(x, mlp)

    def feed_forward(self, x: Tensor, mlp: Callable[[Tensor], Tensor] | None = None) -> Tensor:
        return x + (mlp or self.mlp)(self.post_attention_layernorm(x))


class Trunk(nn.Module):
    """The decoder without its head: tokens (B, S) to hidden states (B, S, E)."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.embed_tokens = Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Layer(config, i) for i in config.layers)
        self.norm = nn.RMSNorm(config.hidden_size, config.rms_norm_eps)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attend: Attend | Sequence[Attend | Mix],
        run: Sequence[RunLayer | None] | None = None,
        moves: Mapping[int, Move] | None = None,
    ) -> Tensor:
        per_layer = [attend] * len(self.layers) if callable(attend) else attend
        if len(per_layer) != len(self.layers):
            raise ValueError(
                f"{len(per_layer)} attention functions for {len(self.layers)} layers; give one or all"
            )
        x = self.embed_tokens(tokens)
        cos, sin = rotary_angles(self.config, position_ids)
        cos, sin = cos.to(x.dtype), sin.to(x.dtype)
        runs = [None] * len(self.layers) if run is None else run
        for i, (layer, attend_here, run_here) in enumerate(zip(self.layers, per_layer, runs, strict=True)):
            if moves is not None and i in moves:
                x = moves[i](x)
            x = layer(x, cos, sin, attend_here, run_here)
        return self.norm(x)


class Decoder(nn.Module):
    """A causal language model of the given shape, initialised from `seed` (the global RNG is left alone)."""

    def __init__(self, config: ModelConfig, seed: int = 0) -> None:
        super().__init__()
        self.config = config
        self.model = Trunk(config)
        self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)
        if config.tie_word_embeddings:
            self.lm_head.weight = self.model.embed_tokens.weight
        self.initialise(seed)

    def forward(
        self,
        tokens: Tensor,
        position_ids: Tensor,
        attend: Attend | Sequence[Attend | Mix],
        labels: Tensor | None = None,
        *,
        run: Sequence[RunLayer | None] | None = None,
        use: UseHidden | None = None,
        moves: Mapping[int, Move] | None = None,
    ) -> Any:
        """Logits (B, S, V); with labels the sum of the token losses and the number of tokens that counted.

        tokens (B, S) int64; position_ids (S,) or (B, S), positions inside each document; attend: one function
        for all layers or a sequence with one per layer (for windows that differ, a cache, or linear layers, which
        need a `Mix`); labels (B, S), already shifted, -100 where no loss is wanted (see `token_loss`); run: how each
        layer is run, and with it what is kept for the backward pass (see counterpoint.runtime.memory), None as
        written; use: what is made of the hidden states and the head instead of logits, and returned. moves: by
        layer, what is done to hidden states before it, where layers keep tokens in different layouts; tokens then
        come in the layout of the first layer, position_ids in that of softmax layers, labels in that of the last.
        """
        hidden = self.model(tokens, position_ids, attend, run, moves)
        if use is not None:
            return use(hidden, self.lm_head)
        if labels is None:
            return self.lm_head(hidden)
        return token_loss(hidden, self.lm_head.weight, labels)

    @torch.no_grad()
    def initialise(self, seed: int) -> None:
        """Fill all parameters: normal with the config's deviation, projections into the residual scaled down.

        The outputs of attention and feed-forward are divided by sqrt(2 L) so that the residual stream's
        variance does not grow with depth (GPT-2, section 2.3). Does nothing on the meta device.
        """
        generator = torch.Generator().manual_seed(seed)
        deviation = self.config.initializer_range
        residual = deviation / math.sqrt(2 * self.config.num_hidden_layers)
        for name, parameter in self.named_parameters():
            if parameter.is_meta:
                return
            if name.endswith("bias"):
                parameter.zero_()
            elif parameter.dim() == 1:
                parameter.fill_(1.0)
            elif name.endswith("conv_weight"):
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, 0.5, generator=generator))
            else:
                scale = residual if name.endswith(("o_proj.weight", "down_proj.weight")) else deviation
                parameter.copy_(torch.empty(parameter.shape).normal_(0.0, scale, generator=generator))


def rotary_angles(config: ModelConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Cosine and sine (1 or B, 1, S, D) float32 of the rotary embedding at position_ids (S,) or (B, S).

    Source: RoFormer (arXiv 2104.09864) with halves rotated as in Llama; Llama 3.1's frequency scaling.
    """
    d, device = config.head_dim, position_ids.device
    frequency = config.rope_theta ** -(torch.arange(0, d, 2, dtype=torch.float32, device=device) / d)
    if config.rope_scaling is not None:
        s = config.rope_scaling
        turns = s.original_max_position_embeddings * frequency / (2 * math.pi)
        # 1 keeps a frequency (fast: many turns in the original context), 0 divides it by the factor (slow)
        keep = ((turns - s.low_freq_factor) / (s.high_freq_factor - s.low_freq_factor)).clamp(0, 1)
        frequency = keep * frequency + (1 - keep) * frequency / s.factor
    positions = position_ids if position_ids.dim() == 2 else position_ids[None]
    angle = (positions[:, None, :, None].float() * frequency).repeat(1, 1, 1, 2)
    return angle.cos(), angle.sin()


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


def _no_norm(_dim: int, _eps: float) -> nn.Module:
    return nn.Identity()
