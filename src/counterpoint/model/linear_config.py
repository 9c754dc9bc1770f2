"""How the linear attention layers of a model are made, in the words of a config.json.

Nothing here imports torch.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

LINEAR_DECAYS = ("none", "retention", "scalar", "vector")
FEATURE_MAPS = ("identity", "silu", "elu")


@dataclass(frozen=True, slots=True)
class LinearLayers:
    """The linear attention layers of a model; all of them are alike.

    decay: "none" (basic linear attention), "retention" (one fixed decay per head), "scalar" (one per head and token,
    from the token, as in Mamba-2) or "vector" (one per channel and token, as in gated linear attention). decay_rates:
    the fixed decays of retention, one per head, above 0 and at most 1; empty: 1 - 2^(-5-i) for head i. conv_kernel_dim:
    width of a short convolution over q, k and v, 0 for none. feature_map: applied to q and k ("elu" is elu(x) + 1).
    output_gate: the normed output is multiplied by silu of a projection. Raises ValueError on impossible values.
    """

    num_heads: int
    key_head_dim: int
    value_head_dim: int
    decay: str = "scalar"
    decay_rates: tuple[float, ...] = ()
    conv_kernel_dim: int = 0
    feature_map: str = "silu"
    output_gate: bool = True

    def __post_init__(self) -> None:
        for key in ("num_heads", "key_head_dim", "value_head_dim"):
            if getattr(self, key) < 1:
                raise ValueError(f"linear_{key} {getattr(self, key)} must be positive")
        if self.conv_kernel_dim < 0:
            raise ValueError(f"linear_conv_kernel_dim {self.conv_kernel_dim} must be 0 (none) or above")
        for key, allowed in (("decay", LINEAR_DECAYS), ("feature_map", FEATURE_MAPS)):
            if getattr(self, key) not in allowed:
                raise ValueError(
                    f"linear_{key} {getattr(self, key)!r} is not supported; use one of {', '.join(allowed)}"
                )
        if self.decay_rates and self.decay != "retention":
            raise ValueError(f"linear_decay_rates go with linear_decay retention, not {self.decay}")
        if self.decay_rates and len(self.decay_rates) != self.num_heads:
            raise ValueError(
                f"linear_decay_rates gives {len(self.decay_rates)} decays for {self.num_heads} heads; give one each"
            )
        wrong = [rate for rate in self.decay_rates if not 0 < rate <= 1]
        if wrong:
            raise ValueError(f"linear_decay_rates has {wrong[0]:g}; a decay is above 0 and at most 1")

    @property
    def rates(self) -> tuple[float, ...]:
        """The fixed decay of every head under retention."""
        return self.decay_rates or tuple(1 - 2.0 ** (-5 - i) for i in range(self.num_heads))

    @property
    def decay_form(self) -> str:
        """What a state's decays look like: "none", "scalar" (per head) or "vector" (per channel)."""
        return "scalar" if self.decay == "retention" else self.decay

    @property
    def channels(self) -> int:
        """Channels of q, k and v together, which the convolution runs over."""
        return self.num_heads * (2 * self.key_head_dim + self.value_head_dim)

    def parameters(self, hidden: int) -> int:
        """Trained parameters of one such layer without norms and feed-forward."""
        keys, values = self.num_heads * self.key_head_dim, self.num_heads * self.value_head_dim
        count = hidden * (2 * keys + values) + values * hidden + self.value_head_dim
        count += self.channels * self.conv_kernel_dim + (hidden * values if self.output_gate else 0)
        if self.decay == "scalar":
            count += (hidden + 1) * self.num_heads
        if self.decay == "vector":
            count += hidden * DECAY_RANK + (DECAY_RANK + 1) * keys
        return count

    @classmethod
    def from_dict(cls, data: Mapping[str, Any], heads: int, head_dim: int) -> LinearLayers:
        """From the linear_* keys of a config.json; what is missing is as in the softmax layers."""
        whole = {
            "num_heads": heads, "key_head_dim": head_dim, "value_head_dim": head_dim, "conv_kernel_dim": 0
        }  # fmt: skip
        values: dict[str, Any] = {}
        for key, default in whole.items():
            value = data.get(f"linear_{key}")
            value = default if value is None else value
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"linear_{key} {value!r} must be a whole number")
            values[key] = value
        rates = data.get("linear_decay_rates") or ()
        try:
            values["decay_rates"] = tuple(float(rate) for rate in rates)
        except (TypeError, ValueError):
            raise ValueError(f"linear_decay_rates {rates!r} must be a list of numbers") from None
        gate = data.get("linear_output_gate", True)
        if not isinstance(gate, bool):
            raise ValueError(f"linear_output_gate {gate!r} must be true or false")
        for key, default in (("decay", "scalar"), ("feature_map", "silu")):
            values[key] = data.get(f"linear_{key}", default)
        return cls(**values, output_gate=gate)

    def to_dict(self) -> dict[str, Any]:
        """The linear_* keys of a config.json."""
        return {
            "linear_num_heads": self.num_heads,
            "linear_key_head_dim": self.key_head_dim,
            "linear_value_head_dim": self.value_head_dim,
            "linear_decay": self.decay,
            "linear_decay_rates": list(self.decay_rates),
            "linear_conv_kernel_dim": self.conv_kernel_dim,
            "linear_feature_map": self.feature_map,
            "linear_output_gate": self.output_gate,
        }


TEMPERATURE = 16.0  # softens learned decays towards 1 (GLA, arXiv 2312.06635, section 4.4)
DECAY_RANK = 16  # of the projection that makes one decay per channel (GLA, arXiv 2312.06635, section 4.4)
LINEAR_KEYS = tuple(LinearLayers(1, 1, 1).to_dict())
