"""Small models with layers of linear attention, in every form that these have, for property-based tests."""

from __future__ import annotations

from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig


def hybrid(
    decay: str = "scalar",
    conv: int = 0,
    feature: str = "silu",
    gate: bool = True,
    *,
    layers: str = "lf",
    **changes,
) -> ModelConfig:
    """layers: a letter each, l linear and f softmax attention."""
    names = {"l": "linear_attention", "f": "full_attention"}
    return ModelConfig.from_dict(
        {
            "model_type": "counterpoint_hybrid", "vocab_size": 40, "hidden_size": 24, "intermediate_size": 40,
            "num_hidden_layers": len(layers), "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8,
            "layer_types": [names[letter] for letter in layers], "linear_decay": decay,
            "linear_conv_kernel_dim": conv, "linear_feature_map": feature, "linear_output_gate": gate,
            "linear_num_heads": 3, "linear_key_head_dim": 5, "linear_value_head_dim": 7, **changes,
        }
    )  # fmt: skip


def hybrids(layers: str = "lf", **changes) -> st.SearchStrategy[ModelConfig]:
    """All forms of decay, convolution, feature map and gate."""
    return st.builds(
        lambda decay, conv, feature, gate: hybrid(decay, conv, feature, gate, layers=layers, **changes),
        st.sampled_from(["none", "retention", "scalar", "vector"]),
        st.sampled_from([0, 1, 4]),
        st.sampled_from(["identity", "silu", "elu"]),
        st.booleans(),
    )


class OneProcess:
    """How the tokens of a linear attention layer meet when one process has them all."""

    def __call__(self, q, k, v, log_decay):
        from counterpoint import linear_attention

        return linear_attention(q, k, v, log_decay, check=False)

    def convolve(self, x, weight):
        from counterpoint import short_convolution

        return short_convolution(x, weight)
