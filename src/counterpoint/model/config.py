"""The shape of a transformer, read from and written to a Hugging Face config.json (Llama family).

Nothing here imports torch.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from counterpoint.model.linear_config import LINEAR_KEYS, LinearLayers
from counterpoint.model.presets import PRESETS

# What a config.json of each model type means where it is silent: the defaults of transformers' own classes.
_DEFAULTS: dict[str, dict[str, Any]] = {
    "llama": {"max_position_embeddings": 2048},
    "mistral": {"max_position_embeddings": 131072, "num_key_value_heads": 8, "sliding_window": 4096},
    "qwen2": {"max_position_embeddings": 32768, "num_key_value_heads": 32, "sliding_window": 4096},
    "qwen3": {
        "max_position_embeddings": 32768,
        "num_key_value_heads": 32,
        "sliding_window": 4096,
        "head_dim": 128,
    },
    "counterpoint_hybrid": {"max_position_embeddings": 2048},
}
_ARCHITECTURES = {
    "llama": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "counterpoint_hybrid": "CounterpointHybridForCausalLM",
}
HYBRID = "counterpoint_hybrid"  # Llama with linear attention in some layers: no class of transformers


@dataclass(frozen=True, slots=True)
class RopeScaling:
    """Llama 3.1's stretching of slow rotary frequencies (rope_type "llama3" in Hugging Face's words)."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclass(frozen=True, slots=True)
class ModelConfig:
    """A decoder-only transformer: RoPE, RMSNorm, SwiGLU, grouped queries; field names are Hugging Face's.

    `sliding_window` w lets a query see w keys, itself included; None is full causal attention. `layer_types`
    names each layer "sliding_attention", "full_attention" or "linear_attention"; empty means that all layers
    are alike. `linear` says how linear attention layers are made, which model_type counterpoint_hybrid has.
    `attention_bias` is the bias of the q, k and v projections, `output_bias` that of o. Raises ValueError
    on impossible values.
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    model_type: str = "llama"
    max_position_embeddings: int = 2048
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling | None = None
    rms_norm_eps: float = 1e-6
    tie_word_embeddings: bool = False
    sliding_window: int | None = None
    layer_types: tuple[str, ...] = ()
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    initializer_range: float = 0.02
    linear: LinearLayers | None = None

    def __post_init__(self) -> None:
        _check(self)

    # ---- reading -------------------------------------------------------------------------------
    @classmethod
    def read(cls, path: str | Path) -> ModelConfig:
        """The config in a config.json, or in a directory that holds one; ValueError when it is not one."""
        path = Path(path)
        file = path / "config.json" if path.is_dir() else path
        if not file.is_file():
            raise ValueError(f"{file}: no such file; give a Hugging Face config.json or a directory with one")
        try:
            data = json.loads(file.read_text(encoding="utf-8"))
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{file}: not valid JSON ({error})") from None
        if not isinstance(data, dict):
            raise ValueError(f"{file}: holds a {type(data).__name__}, expected a JSON object")
        try:
            return cls.from_dict(data)
        except ValueError as error:
            raise ValueError(f"{file}: {error}") from None

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> ModelConfig:
        """The config in the words of a Hugging Face config.json; keys that shape nothing are ignored."""
        family = data.get("model_type")
        if family not in _DEFAULTS:
            raise ValueError(f"model_type {family!r} is not supported; supported are {', '.join(_DEFAULTS)}")
        given = {**_DEFAULTS[family], **data}
        if given.get("hidden_act", "silu") not in ("silu", "swish"):
            raise ValueError(f"hidden_act {given['hidden_act']!r} is not supported; only silu (SwiGLU) is")
        needed = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        missing = [key for key in needed if given.get(key) is None]
        if missing:
            raise ValueError(f"{', '.join(missing)} missing; a config.json of type {family} must give it")
        sizes = {key: _integer(key, given[key]) for key in needed}
        heads = sizes["num_attention_heads"]
        head_dim = _integer("head_dim", _or(given.get("head_dim"), sizes["hidden_size"] // max(heads, 1)))
        family, linear = _linear(family, given, heads, head_dim)
        theta, scaling = _rope(given)
        window, layer_types = _windows(family, given, sizes["num_hidden_layers"])
        bias = bool(given.get("attention_bias", False))
        return cls(
            **sizes,
            num_key_value_heads=_integer("num_key_value_heads", _or(given.get("num_key_value_heads"), heads)),
            head_dim=head_dim,
            model_type=family,
            max_position_embeddings=_integer("max_position_embeddings", given["max_position_embeddings"]),
            rope_theta=theta,
            rope_scaling=scaling,
            rms_norm_eps=float(given.get("rms_norm_eps", 1e-6)),
            tie_word_embeddings=bool(given.get("tie_word_embeddings", False)),
            sliding_window=window,
            layer_types=layer_types,
            attention_bias=family == "qwen2" or (bias and family != "mistral"),
            output_bias=bias and family in ("llama", "qwen3", HYBRID),
            mlp_bias=family in ("llama", HYBRID) and bool(given.get("mlp_bias", False)),
            qk_norm=family == "qwen3",
            initializer_range=float(given.get("initializer_range", 0.02)),
            linear=linear,
        )

    @classmethod
    def preset(cls, name: str, **changes: Any) -> ModelConfig:
        """A named small shape (see counterpoint.model.presets), with some fields changed."""
        if name not in PRESETS:
            raise ValueError(f"unknown model preset {name!r}; presets are {', '.join(PRESETS)}")
        try:
            return replace(cls.from_dict(PRESETS[name]), **changes)
        except TypeError as error:
            raise ValueError(f"preset {name!r}: {error}") from None

    # ---- writing -------------------------------------------------------------------------------
    def to_dict(self) -> dict[str, Any]:
        """The content of a config.json that transformers (4 and 5) and `from_dict` read back."""
        data: dict[str, Any] = {
            "architectures": [_ARCHITECTURES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "num_key_value_heads": self.num_key_value_heads,
            "head_dim": self.head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": self.max_position_embeddings,
            "initializer_range": self.initializer_range,
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tie_word_embeddings,
            "rope_theta": self.rope_theta,
            "rope_scaling": None,
            "attention_dropout": 0.0,
            "use_cache": True,
            "dtype": "float32",
        }
        if self.rope_scaling is not None:
            s = self.rope_scaling
            data["rope_scaling"] = {
                "rope_type": "llama3",
                "factor": s.factor,
                "low_freq_factor": s.low_freq_factor,
                "high_freq_factor": s.high_freq_factor,
                "original_max_position_embeddings": s.original_max_position_embeddings,
            }
        if self.model_type in ("llama", "qwen3", HYBRID):
            data["attention_bias"] = self.attention_bias
        if self.model_type in ("llama", HYBRID):
            data["mlp_bias"] = self.mlp_bias
        if self.linear is not None:
            data |= {"layer_types": list(self.layer_types), "sliding_window": self.sliding_window}
            data |= self.linear.to_dict()
        if self.model_type == "mistral":
            data["sliding_window"] = self.sliding_window
        if self.model_type in ("qwen2", "qwen3"):
            data["use_sliding_window"] = self.sliding_window is not None
            data["sliding_window"] = self.sliding_window
            names = ("full_attention" if self.window(i) is None else "sliding_attention" for i in self.layers)
            data["layer_types"] = list(names)
        return data

    # ---- what follows from the shape -----------------------------------------------------------
    @property
    def layers(self) -> range:
        return range(self.num_hidden_layers)

    def window(self, layer: int) -> int | None:
        """Keys a query of this layer sees, itself included; None when it sees all before it."""
        if self.layer_types and self.layer_types[layer] != "sliding_attention":
            return None
        return self.sliding_window

    def is_linear(self, layer: int) -> bool:
        """Whether this layer attends linearly, through a state, instead of by softmax."""
        return bool(self.layer_types) and self.layer_types[layer] == "linear_attention"

    def parameters(self) -> int:
        """Number of trained parameters; a tied head counts once."""
        h, f, d = self.hidden_size, self.intermediate_size, self.head_dim
        q, kv = self.num_attention_heads * d, self.num_key_value_heads * d
        softmax = 2 * h * q + 2 * h * kv + self.attention_bias * (q + 2 * kv) + self.output_bias * h
        softmax += self.qk_norm * 2 * d
        rest = 3 * h * f + 2 * h + self.mlp_bias * (2 * f + h)
        linear = sum(map(self.is_linear, self.layers))
        layers = self.num_hidden_layers * rest + (self.num_hidden_layers - linear) * softmax
        layers += linear * self.linear.parameters(h) if self.linear is not None else 0
        return layers + self.vocab_size * h * (1 if self.tie_word_embeddings else 2) + h

    def flops_per_token(self, sequence_length: int) -> float:
        """Floating-point operations to train on one token of a causal sequence (forward and backward).

        6 N + 12 L H D k: N are the parameters that multiply every token (the head counts, tied or not; the
        input embedding is a look-up and does not), k the mean number of keys a query sees, (S + 1) / 2 under
        the causal mask and less with a sliding window. A linear layer adds 12 H D E: its state is written and read.
        Source: PaLM (arXiv 2204.02311), appendix B, with the causal mask taken into account.
        """
        if sequence_length < 1:
            raise ValueError(f"sequence_length {sequence_length} must be at least 1")
        h = self.hidden_size
        matmul = self.parameters() - (0 if self.tie_word_embeddings else self.vocab_size * h)
        width = self.num_attention_heads * self.head_dim
        softmax = [layer for layer in self.layers if not self.is_linear(layer)]
        keys = sum(_mean_keys(sequence_length, self.window(layer)) for layer in softmax)
        states, s = len(self.layers) - len(softmax), self.linear
        state = s.num_heads * s.key_head_dim * s.value_head_dim if s is not None else 0
        return 6.0 * matmul + 12.0 * width * keys + 12.0 * states * state


def _mean_keys(length: int, window: int | None) -> float:
    w = length if window is None else min(window, length)
    return (w * (w + 1) / 2 + (length - w) * w) / length


def _or(value: Any, default: Any) -> Any:
    return default if value is None else value


def _integer(key: str, value: Any) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{key} {value!r} must be a whole number")
    return value


def _rope(given: Mapping[str, Any]) -> tuple[float, RopeScaling | None]:
    """Base and scaling, from transformers 5's `rope_parameters` or the older `rope_theta`, `rope_scaling`."""
    parameters = {**(given.get("rope_scaling") or {}), **(given.get("rope_parameters") or {})}
    theta = float(_or(parameters.get("rope_theta"), _or(given.get("rope_theta"), 10000.0)))
    fraction = _or(parameters.get("partial_rotary_factor"), _or(given.get("partial_rotary_factor"), 1.0))
    if fraction != 1.0:
        raise ValueError(f"partial_rotary_factor {fraction} is not supported; only 1.0 is")
    kind = parameters.get("rope_type", parameters.get("type", "default"))
    if kind == "default":
        return theta, None
    if kind != "llama3":
        raise ValueError(f"rope_type {kind!r} is not supported; supported are default and llama3")
    names = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")
    missing = [name for name in names if name not in parameters]
    if missing:
        raise ValueError(f"rope_type llama3 needs {', '.join(missing)}")
    original = _integer(names[3], parameters[names[3]])
    factor, low, high = (float(parameters[name]) for name in names[:3])
    return theta, RopeScaling(factor, low, high, original)


def _linear(
    family: str, given: Mapping[str, Any], heads: int, head_dim: int
) -> tuple[str, LinearLayers | None]:
    """The family once its layers are known, and how its linear layers are made."""
    kinds = given.get("layer_types") or ()
    if "linear_attention" in kinds:
        if family not in ("llama", HYBRID):
            raise ValueError(
                f"layers of type linear_attention go with model_type {HYBRID} or llama, not {family}"
            )
        return HYBRID, LinearLayers.from_dict(given, heads, head_dim)
    if family == HYBRID:
        raise ValueError(f"model_type {HYBRID} needs layers of type linear_attention in layer_types")
    strays = [key for key in LINEAR_KEYS if key in given]
    if strays and family == "llama":
        raise ValueError(
            f"{strays[0]} is given, but no layer is linear; name linear_attention layers in layer_types"
        )
    return family, None


def _windows(family: str, given: Mapping[str, Any], layers: int) -> tuple[int | None, tuple[str, ...]]:
    window = given.get("sliding_window")
    if family == HYBRID:
        return None if window is None else _integer("sliding_window", window), tuple(given["layer_types"])
    if family == "llama" or window is None:
        return None, ()
    window = _integer("sliding_window", window)
    if family == "mistral":
        return window, ()
    if not given.get("use_sliding_window", False):
        return None, ()
    first = given.get("max_window_layers", 28)
    kinds = given.get("layer_types") or [
        ("full" if i < first else "sliding") + "_attention" for i in range(layers)
    ]
    if all(kind == "sliding_attention" for kind in kinds):
        return window, ()
    return (window, tuple(kinds)) if "sliding_attention" in kinds else (None, ())


def _check(c: ModelConfig) -> None:
    if c.model_type not in _DEFAULTS:
        raise ValueError(
            f"model_type {c.model_type!r} is not supported; supported are {', '.join(_DEFAULTS)}"
        )
    positive = (
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
        "max_position_embeddings",
        "sliding_window",
        "rope_theta",
        "rms_norm_eps",
    )
    for key in positive:
        value = getattr(c, key)
        if value is not None and not value > 0:
            raise ValueError(f"{key} {value} must be positive")
    if c.num_attention_heads % c.num_key_value_heads:
        raise ValueError(
            f"num_attention_heads {c.num_attention_heads} is not a multiple of num_key_value_heads "
            f"{c.num_key_value_heads}; every key/value head serves the same number of query heads"
        )
    if c.head_dim % 2:
        raise ValueError(f"head_dim {c.head_dim} is odd; rotary embedding needs an even one")
    if c.layer_types and len(c.layer_types) != c.num_hidden_layers:
        raise ValueError(
            f"layer_types names {len(c.layer_types)} layers, num_hidden_layers is {c.num_hidden_layers}"
        )
    unknown = set(c.layer_types) - {"full_attention", "sliding_attention", "linear_attention"}
    if unknown:
        raise ValueError(
            f"layer_types {sorted(unknown)} not supported; use full_attention, sliding_attention or linear_attention"
        )
    if (c.linear is None) == ("linear_attention" in c.layer_types) or (c.linear is None) == (
        c.model_type == HYBRID
    ):
        raise ValueError(
            f"linear_attention layers, model_type {HYBRID} and the shape of linear layers go together; "
            "read such a model from a config.json or with ModelConfig.from_dict"
        )
    if c.linear is not None and "sliding_attention" in c.layer_types and c.sliding_window is None:
        raise ValueError("layer_types names sliding_attention, but sliding_window is not given")
    s = c.rope_scaling
    if s is not None and not (s.factor > 0 and 0 < s.low_freq_factor < s.high_freq_factor):
        raise ValueError(f"rope scaling {s} needs factor > 0 and 0 < low_freq_factor < high_freq_factor")
