"""Learning rates, decay groups, gradient norms."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.model.config import ModelConfig
from counterpoint.model.decoder import Decoder
from counterpoint.training.config import OptimizerConfig
from counterpoint.training.optimizer import clip_gradients, learning_rate, make_optimizer


@given(st.integers(1, 300), st.data())
def test_rates_rise_then_fall_between_their_bounds(steps, data):
    warmup = data.draw(st.integers(0, steps))
    config = OptimizerConfig(lr=1.0, min_lr=0.1, warmup=warmup)  # type: ignore[call-arg]
    rates = [learning_rate(step, steps, config) for step in range(steps)]
    assert rates[:warmup] == sorted(rates[:warmup])
    assert rates[warmup:] == sorted(rates[warmup:], reverse=True)
    assert min(rates) > 0 and max(rates) <= 1.0
    if warmup:
        assert rates[warmup - 1] == 1.0
    if warmup < steps:
        assert rates[-1] == pytest.approx(0.1)


def test_matrices_decay_and_vectors_do_not():
    model = Decoder(ModelConfig.preset("tiny"))
    optimizer = make_optimizer(model, OptimizerConfig(weight_decay=0.3))  # type: ignore[call-arg]
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert {name for name, p in model.named_parameters() if not decay[p]} == {
        name for name, _ in model.named_parameters() if "norm" in name
    }


@pytest.mark.parametrize("limit", [0.0, 0.5, 100.0])
def test_clipping_scales_to_the_limit_and_reports_the_norm_before(limit):
    model = torch.nn.Linear(4, 3)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    norm = 15**0.5
    assert clip_gradients(model, limit) == pytest.approx(norm)
    after = sum(float(p.grad.square().sum()) for p in model.parameters()) ** 0.5
    assert after == pytest.approx(min(norm, limit) if limit else norm, rel=1e-5)
