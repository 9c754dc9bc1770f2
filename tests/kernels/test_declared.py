"""Kernels make what they declare: shapes, dtypes, and which results share memory with which inputs."""

from __future__ import annotations

import pytest

from counterpoint.runtime.executor import _Run
from counterpoint.schedule.schedule import Compute
from support.cases import Case, run_case
from support.grid import STRATEGIES

CASES = [
    {"tokens": 61},
    {"window": 9, "causal": False},
    {"documents": (3, 20, 9), "layout": "document-zigzag", "kv_heads": 2},
    {"dtype": "bfloat16", "kv_heads": 1, "layout": "striped"},
    {"dtype": "float64", "tokens": 5},
    {"mesh": (2, 2), "kv_heads": 2, "tokens": 30},
]


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_every_value_of_every_strategy(strategy: str, monkeypatch: pytest.MonkeyPatch) -> None:
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
    for changes in CASES:
        forward = "/".join([strategy] * len(changes.get("mesh", (4,))))
        backward = forward.replace(strategy, "ring")
        outcome = run_case(Case(**({"forward": forward, "backward": backward} | changes)))
        assert outcome.worst < (0.1 if changes.get("dtype") == "bfloat16" else 2e-5), outcome.errors
        run_case(Case(**({"forward": forward} | changes)))
    assert len(seen) >= 5
