"""Kernels make what they declare: shapes, dtypes, and which results share memory with which inputs."""

from __future__ import annotations

import pytest

from counterpoint.runtime.executor import _Run
from counterpoint.schedule.schedule import Compute
from counterpoint.strategies.sequence.linear_builder import DECAYS
from support.cases import Case, run_case
from support.grid import STRATEGIES
from support.linear import LinearCase, run_linear

CASES = [
    {"tokens": 61},
    {"window": 9, "causal": False},
    {"documents": (3, 20, 9), "layout": "document-zigzag", "kv_heads": 2},
    {"dtype": "bfloat16", "kv_heads": 1, "layout": "striped"},
    {"dtype": "float64", "tokens": 5},
    {"mesh": (2, 2), "kv_heads": 2, "tokens": 30},
]


@pytest.fixture
def seen(monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """Checks everything that ranks compute while a test runs; the kernels that were seen."""
    defined, seen = _Run._defined, set()

    def checked(self: _Run, step, made, counted: bool = False) -> None:
        for value, tensor in zip(step.writes, made, strict=True):
            assert tuple(tensor.shape) == value.spec.shape, step
            assert str(tensor.dtype) == f"torch.{value.spec.dtype}", step
            assert tensor.numel() * tensor.element_size() == value.nbytes
        if isinstance(step, Compute):
            memory = [self.values[name].untyped_storage().data_ptr() for name in step.inputs]
            for i, tensor in enumerate(made):
                shared = {
                    j for j, address in enumerate(memory) if address == tensor.untyped_storage().data_ptr()
                }
                expected = {step.kernel.aliases[i]} if i in step.kernel.aliases else set()
                root = self.schedule.memory.root
                assert {root[step.inputs[j]] for j in shared} == {root[step.inputs[j]] for j in expected}, (
                    step
                )
            seen.add(type(step.kernel).__name__)
        defined(self, step, made, counted)

    monkeypatch.setattr(_Run, "_defined", checked)
    return seen


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_value_of_every_strategy(strategy: str, seen: set[str]) -> None:
    for changes in CASES:
        forward = "/".join([strategy] * len(changes.get("mesh", (4,))))
        backward = forward.replace(strategy, "ring")
        outcome = run_case(Case(**({"forward": forward, "backward": backward} | changes)))
        assert outcome.worst < (0.1 if changes.get("dtype") == "bfloat16" else 2e-5), outcome.errors
        run_case(Case(**({"forward": forward} | changes)))
    assert len(seen) >= 5


@pytest.mark.parametrize("decay", DECAYS)
def test_every_value_of_linear_attention(decay: str, seen: set[str]) -> None:
    for causal, dtype in ((True, "float64"), (False, "float32"), (True, "bfloat16")):
        for strategy in ("states", "states_chain", "states(wire_dtype=bfloat16)"):
            case = LinearCase(4, 50, decay, strategy, causal=causal, dtype=dtype, documents=(3, 36, 11))
            assert run_linear(case).worst < 0.1
    assert len(seen) >= 8
