"""The table of attention kernels: what the CPU can check of those that need a GPU, and how one is chosen."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from counterpoint.kernels import choice, flex
from counterpoint.kernels.aten import window
from counterpoint.kernels.backends import CPU_FLASH, PLAIN, Backend, Problem, find, table
from counterpoint.kernels.blocks import attend, attend_backward
from counterpoint.kernels.calls import Form
from counterpoint.kernels.choice import Trial, bucket, choose, fastest, measure
from counterpoint.kernels.mask import Area, AttentionMask, one_document
from support import reference

ON_GPU = Problem("cuda", torch.bfloat16, 8, 2, 64, "causal", 1, 2, 100)
ON_CPU = replace(ON_GPU, device="cpu", dtype=torch.float32)
MASKS = ("full", "causal", "bands")


def tensors(problem: Problem, device: str, tokens: int = 100):
    heads = (problem.heads, problem.kv_heads, problem.kv_heads, problem.heads)
    return [
        torch.randn(problem.batch, tokens, n, problem.head_dim, dtype=problem.dtype, device=device)
        for n in heads
    ]


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("name", ["flash", "cudnn", "efficient"])
def test_calls_of_gpu_kernels_fit_their_operators(name: str, mask, request: pytest.FixtureRequest) -> None:
    """Against torch's own shape functions, on tensors without data: argument lists, shapes and dtypes of results."""
    problem, backend = replace(ON_GPU, mask=mask), find(name)
    if name == "cudnn" and mask == "bands":
        assert backend.refuses(problem)
        return
    assert not backend.refuses(problem)
    q, k, v, dout = tensors(problem, "meta")
    areas = choice.areas(replace(problem, tokens=100))
    out, lse = backend.forward(q, k, v, areas, 0.1)
    assert (out.shape, out.dtype, lse.shape, lse.dtype) == (q.shape, q.dtype, q.shape[:3], torch.float32)
    grads = backend.backward(dout, q, k, v, out, lse, areas, 0.1)
    for grad, like in zip(grads, (q, k, v), strict=True):
        assert (grad.shape, grad.dtype) == (like.shape, torch.float32)


@given(
    st.integers(1, 12), st.integers(1, 12), st.booleans(), st.none() | st.integers(1, 12), st.integers(0, 8)
)
def test_bands_are_windows_of_flash_attention(queries, keys, causal, width, ahead) -> None:
    """Flash attention sees keys from i + T - S - left to i + T - S + right, and takes no negative widths."""
    tokens = one_document(queries + keys + ahead)
    q, k = tokens.pick([(ahead, ahead + queries)]), tokens.pick([(0, keys)])
    for a in AttentionMask(causal, width).areas(q, k):
        if a.lo is None:
            continue
        left, right = window(Form(lo=a.lo, hi=a.hi), a.rows, a.columns)
        assert left is not None and left >= 0 and (right is None or right >= 0)
        shift = a.columns - a.rows
        for i in range(a.rows):
            for j in range(a.columns):
                ours = j - i >= a.lo and (a.hi is None or j - i <= a.hi)
                assert ours == (j >= i + shift - left and (right is None or j <= i + shift + right))


def softmax_attention(areas: tuple[Area, ...], scale: float):
    """Differentiable in out and in the logsumexp, as FlexAttention is on a GPU."""

    def run(q, k, v):
        group = q.shape[2] // k.shape[2]
        k, v = (x.repeat_interleave(group, 2) for x in (k, v))
        scores = torch.einsum("bshd,bthd->bhst", q, k) * scale
        seen = torch.zeros(scores.shape[-2:], dtype=torch.bool)
        for a in areas:
            block = torch.ones(a.rows, a.columns, dtype=torch.bool)
            seen[a.q_start : a.q_stop, a.k_start : a.k_stop] = block if a.hi is None else block.tril(a.hi)
        lse = scores.masked_fill(~seen, -1e9).logsumexp(-1)
        p = torch.exp(scores.masked_fill(~seen, -torch.inf) - lse.unsqueeze(-1))
        return torch.einsum("bhst,bthd->bshd", p, v), lse.transpose(1, 2)

    return run


def test_a_backward_through_the_gradient_of_the_logsumexp_is_that_of_the_block() -> None:
    """Rows 0 to 7 see nothing in this block; the rows' logsumexp and output come from more keys than its own."""
    areas = (Area(8, 40, 0, 16), Area(16, 40, 16, 40, None, 0))
    problem = replace(ON_CPU, dtype=torch.float64)
    q, k, v, dout = tensors(problem, "cpu", 40)
    out, lse = torch.randn_like(q), attend(q, k, v, areas, scale=0.2)[1].clamp_min(0.0) + 0.3
    expected = attend_backward(dout, q, k, v, out, lse, areas, scale=0.2)
    got = flex.backward_of(softmax_attention(areas, 0.2), dout, q, k, v, out, lse)
    for a, b in zip(got, expected, strict=True):
        assert reference.error(a, b) < 1e-6


@pytest.mark.parametrize(
    "mask", [AttentionMask(), AttentionMask(True, 30, (40, 30)), AttentionMask(False, 9)]
)
def test_flex_attention_sees_the_areas(mask: AttentionMask) -> None:
    q, k, v, dout = (x[:, :70] for x in tensors(ON_CPU, "cpu"))
    areas = mask.areas(one_document(70), one_document(70))
    seen = reference.visible(70, mask.causal, mask.window, mask.documents)
    expected = reference.attention(q, k, v, dout, seen, 0.2)
    out, lse = flex.forward(q, k, v, areas, 0.2, compiled=False)
    assert reference.error(out, expected.out) < 2e-6 and reference.error(lse, expected.lse, 1.0) < 2e-6


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_plain_and_flash_agree_on_a_cpu(mask, dtype) -> None:
    problem = replace(ON_CPU, mask=mask, dtype=dtype, tokens=300, areas=3)
    for which in ("forward", "backward"):
        assert choice.wrong(CPU_FLASH, choice.Data(problem, torch.device("cpu")).args(which), which) == ""


def test_a_wrong_kernel_and_one_that_fails_are_left_out() -> None:
    def wrong(q, k, v, areas, scale):
        return CPU_FLASH.forward(q, k, v, areas, scale * 1.01)

    def fails(*_):
        raise RuntimeError("no kernel image\nfor this device")

    backends = [
        replace(CPU_FLASH, name="wrong", forward=wrong),
        replace(CPU_FLASH, name="fails", forward=fails),
    ]
    found = measure(ON_CPU, "forward", [*backends, find("flash")])
    assert [t.seconds for t in found] == [None, None, None]
    assert (
        found[0].why.startswith("wrong: out differs by")
        and found[1].why == "fails: no kernel image for this device"
    )
    assert found[2].why == "runs on cuda"


def test_the_fastest_that_is_allowed() -> None:
    trials = [Trial("plain", 3.0), Trial("flash", 1.0), Trial("triton", 2.0), Trial("cudnn", None, "fails")]
    assert fastest(trials, deterministic=False).name == "flash"
    assert fastest(trials, deterministic=True).name == "triton"
    assert fastest([Trial("cudnn", None, "fails")], False) is PLAIN


def test_a_cpu_takes_flash_attention_without_measuring(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(choice, "measure", None)
    assert choose(ON_CPU, "forward") is CPU_FLASH and choose(ON_CPU, "backward", True) is CPU_FLASH


@given(
    st.integers(1, 8),
    st.integers(1, 200_000),
    st.sampled_from([1, 2, 8]),
    st.integers(1, 16),
    st.integers(1, 99),
)
def test_problems_of_a_class_share_one_measurement(batch, tokens, group, kv_heads, areas) -> None:
    problem = replace(
        ON_GPU, batch=batch, tokens=tokens, heads=group * kv_heads, kv_heads=kv_heads, areas=areas
    )
    b = bucket(problem)
    assert bucket(b) == b and b.heads // b.kv_heads == group and b.tokens <= choice.LONGEST
    made = choice.areas(b)
    assert len(made) == b.areas and any(a.causal for a in made)
    assert (
        Problem.of(
            *(torch.empty(1, b.tokens, n, 64, device="meta") for n in (b.heads, b.kv_heads)), made
        ).mask
        == "causal"
    )


def test_choices_are_kept_whole_and_bad_files_are_as_none(tmp_path: Path) -> None:
    path, trials = tmp_path / "new" / "attention.json", [Trial("flash", 1.5), Trial("cudnn", None, "fails")]
    assert choice.load(path) == {}
    choice.keep(path, "a", trials)
    choice.keep(path, "b", trials[:1])
    assert choice.load(path) == {"a": trials, "b": trials[:1]}
    for text in ("", "[]", "{", json.dumps({"a": [["no such kernel", 1.0, ""]]}), json.dumps({"a": [[1]]})):
        path.write_text(text)
        assert choice.load(path) == {}


def test_an_explicit_backend() -> None:
    q, k, v, dout = tensors(ON_CPU, "cpu")
    out, lse = attend(q, k, v, AttentionMask(window=20), backend="plain")
    for got, expected in zip((out, lse), attend(q, k, v, AttentionMask(window=20)), strict=True):
        assert reference.error(got, expected) < 2e-6
    with pytest.raises(ValueError, match="'flash' cannot compute this: it runs on cuda"):
        attend_backward(dout, q, k, v, out, lse, AttentionMask(), backend="flash")
    with pytest.raises(ValueError, match="'fast' is unknown; use one of cpu-flash, flash"):
        attend(q, k, v, AttentionMask(), backend="fast")


def test_names_are_one_each_and_every_refusal_says_why() -> None:
    names = [backend.name for backend in table()]
    assert len(set(names)) == len(names)
    for backend in table():
        assert isinstance(backend, Backend)
        for problem in (ON_CPU, ON_GPU, replace(ON_GPU, head_dim=20), replace(ON_GPU, dtype=torch.float64)):
            why = backend.refuses(problem)
            assert why == why.strip() and (backend.name != "plain" or not why)
    assert all(
        b.refuses(replace(ON_GPU, dtype=torch.float64))
        for b in table()
        if b is not PLAIN and b.name != "plain"
    )


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_every_kernel_that_takes_a_problem_on_this_gpu_is_correct(mask, dtype) -> None:
    for dim, areas in ((64, 1), (128, 3), (96, 1)):
        problem = replace(ON_GPU, mask=mask, dtype=dtype, head_dim=dim, areas=areas, tokens=1000)
        data = choice.Data(problem, torch.device("cuda"))
        for backend in table():
            if backend.refuses(problem) or backend.compiles:
                continue
            for which in ("forward", "backward"):
                said = choice.wrong(backend, data.args(which), which)
                assert not said or not backend.name.startswith("triton"), f"{backend.name}, {which}: {said}"
        assert choose(problem, "forward").name != "plain"


@pytest.mark.parametrize("groups", [(), (1, 3)])
@pytest.mark.parametrize("name", [None, "plain"])
def test_delta_serves_in_place_of_the_output(name: str | None, groups: tuple[int, ...]) -> None:
    q, k, v, dout = (x[:, :, :4] for x in tensors(replace(ON_CPU, dtype=torch.float64), "cpu"))
    out, lse = attend(q, k, v, AttentionMask(), groups=groups)
    delta = (dout * out).sum(-1)
    of_out, of_delta = (
        attend_backward(dout, q, k, v, row, lse, AttentionMask(), groups=groups, backend=name)
        for row in (out, delta)
    )
    for a, b in zip(of_delta, of_out, strict=True):
        assert reference.error(a, b) < 1e-12
