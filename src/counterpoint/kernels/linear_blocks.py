"""The mathematics of linear attention in chunks, with torch: no decay, one decay per head, or one per channel.

    S_t = diag(a_t) S_(t-1) + k_t v_t^T        o_t = q_t S_t

Shapes: q, k (B, H, S, D), v, dout (B, H, S, E), states (B, H, D, E), all of one floating dtype; g = log a <= 0 is None,
(B, H, S, 1) or (B, H, S, D). Decays stay logarithms, and no exponent is ever above 0: whatever they are, nothing
overflows. Everything here looks to the past. The future is the past of the flipped sequence: see `flipped`.

Pairs of tokens inside a sub-chunk are multiplied out, the rest goes through the state at its start. Spans of many
sub-chunks bound the memory for those states.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

SPAN = 1024  # tokens whose states are held at a time
PAIRS, GATED_PAIRS = (
    64,
    16,
)  # tokens of a sub-chunk; fewer with decays per channel: a pair costs D exponentials then


def attend(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, strict: bool = False) -> Tensor:
    """o over these tokens, from an empty state: (B, H, S, E). strict: a token does not see itself."""
    return attend_from(q, k, v, g, None, strict)[0]


def attend_from(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, state: Tensor | None, strict: bool = False
) -> tuple[Tensor, Tensor]:
    """o over these tokens and the state after them, from the state before them (None: empty)."""
    if state is None:
        state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    outs = []
    for span in _spans(q, k, v, g, strict):
        entering, state = span.states(state)
        outs.append(span.out(entering))
    return torch.cat(outs, 2), state


def attend_backward(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, dout: Tensor, strict: bool = False
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv of `attend`; the gradient of g follows from them (`gate_gradient`)."""
    state = q.new_zeros(*q.shape[:2], q.shape[3], v.shape[3])
    spans, entering = _spans(q, k, v, g, strict), []
    for span in spans:
        entering.append(state)
        _, state = span.states(state)
    dstate, grads = torch.zeros_like(state), []
    for span, state, d in zip(
        reversed(spans), reversed(entering), reversed(dout.split(SPAN, 2)), strict=True
    ):
        *grad, dstate = span.backward(d, span.states(state)[0], dstate)
        grads.append(grad)
    dq, dk, dv = (torch.cat(parts[::-1], 2) for parts in zip(*grads, strict=True))
    return dq, dk, dv


def state_of(k: Tensor, v: Tensor, g: Tensor | None) -> Tensor:
    """The state that these tokens leave behind, from an empty one."""
    return decayed_to_end(k, g).transpose(-1, -2) @ v


def decayed_to_end(k: Tensor, g: Tensor | None) -> Tensor:
    """k_j times the decays after j."""
    return k if g is None else k * after(g, 2).exp()


def decayed_from_start(q: Tensor, g: Tensor | None) -> Tensor:
    """q_t times the decays up to and with t."""
    return q if g is None else q * g.cumsum(2).exp()


def fold(states: list[Tensor], totals: list[Tensor]) -> Tensor:
    """The state after several chunks, the farthest first. totals: log decays of all but the first, or none at all."""
    state = states[0]
    for i, added in enumerate(states[1:]):
        state = added + (state * totals[i].exp().unsqueeze(-1) if totals else state)
    return state


def gate_gradient(q: Tensor, dq: Tensor, k: Tensor, dk: Tensor, end: Tensor | None, width: int) -> Tensor:
    """dg of one stretch of tokens from the whole dq and dk: (B, H, S, width), width 1 or D.

    A term exp(G_t - G_j) q_t k_j, G the running sum of g, adds q_t dq_t to dG_t and takes k_j dk_j from dG_j. end: what
    the state behind the stretch adds to dG of its last token, (B, H, D).
    """
    # summed in float64: a sum over all later tokens is small only because large terms cancel
    change = q.double() * dq.double() - k.double() * dk.double()
    if end is not None:
        change[:, :, -1] += end
    if width == 1:
        change = change.sum(-1, keepdim=True)
    return change.flip(2).cumsum(2).flip(2).to(dq.dtype)


def flipped(g: Tensor | None) -> Tensor | None:
    """g for the flipped sequence, in which the past is the future: o_t = sum over j > t of a_(t+1) .. a_j q_t k_j v_j.

    Between two tokens lie the same decays either way, so they move by one place. That of the first token then lies
    behind the stretch: it applies to the state that leaves it. Attend with strict=True.
    """
    return None if g is None else torch.cat([torch.zeros_like(g[:, :, :1]), g[:, :, 1:].flip(2)], 2)


def after(g: Tensor, dim: int) -> Tensor:
    """For every token the sum of all g behind it."""
    later = torch.cat([g.narrow(dim, 1, g.shape[dim] - 1), torch.zeros_like(g.narrow(dim, 0, 1))], dim)
    return later.flip(dim).cumsum(dim).flip(dim)


def _spans(q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, strict: bool) -> list[_Span]:
    gates = [None] * -(-q.shape[2] // SPAN) if g is None else g.split(SPAN, 2)
    parts = zip(q.split(SPAN, 2), k.split(SPAN, 2), v.split(SPAN, 2), gates, strict=True)
    return [_Span(*part, strict) for part in parts]


class _Span:
    """Some sub-chunks, and what is computed from them: tensors (B, H, N, C, ...) for N of them."""

    def __init__(self, q: Tensor, k: Tensor, v: Tensor, g: Tensor | None, strict: bool) -> None:
        self.tokens = q.shape[2]
        self.gated = g is not None and g.shape[-1] > 1
        self.chunk = min(GATED_PAIRS if self.gated else PAIRS, self.tokens)
        self.q, self.k, self.v = self._cut(q), self._cut(k), self._cut(v)
        seen = torch.ones(self.chunk, self.chunk, dtype=torch.bool, device=q.device)
        self.unseen = seen.triu(0 if strict else 1)
        self.g = None if g is None else self._cut(g)
        self.from_start = self.to_end = self.total = q.new_ones(())
        if self.g is not None:
            self.from_start, self.to_end = self.g.cumsum(3).exp(), after(self.g, 3).exp()
            self.total = self.g.sum(3).exp().unsqueeze(-1)  # (B, H, N, D or 1, 1)

    def states(self, state: Tensor) -> tuple[Tensor, Tensor]:
        """The states before every sub-chunk (B, H, N, D, E), and that after the last one."""
        added = (self.k * self.to_end).transpose(-1, -2) @ self.v
        return self._scan(added, state, range(added.shape[2]))

    def out(self, entering: Tensor) -> Tensor:
        return self._joined(self._pairs() @ self.v + (self.q * self.from_start) @ entering)

    def backward(
        self, dout: Tensor, entering: Tensor, dstate: Tensor
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """dq, dk, dv and the gradient of the state before; dstate: that of the state after."""
        dout = self._cut(dout)
        added = (self.q * self.from_start).transpose(-1, -2) @ dout
        leaving, dstate = self._scan(added, dstate, range(added.shape[2] - 1, -1, -1))
        dq, dk = self._pairs_backward((dout @ self.v.transpose(-1, -2)).masked_fill_(self.unseen, 0.0))
        dq = dq + dout @ entering.transpose(-1, -2) * self.from_start
        dk = dk + self.v @ leaving.transpose(-1, -2) * self.to_end
        dv = self._pairs().transpose(-1, -2) @ dout + (self.k * self.to_end) @ leaving
        return self._joined(dq), self._joined(dk), self._joined(dv), dstate

    def _scan(self, added: Tensor, state: Tensor, order: range) -> tuple[Tensor, Tensor]:
        """From sub-chunk to sub-chunk: what there is before each, decayed over it, and what it adds."""
        before = torch.empty_like(added)
        for n in order:
            before[:, :, n] = state
            state = state * (self.total[:, :, n] if self.g is not None else self.total) + added[:, :, n]
        return before, state

    # ---- pairs of a sub-chunk -------------------------------------------------------------------
    def _pairs(self) -> Tensor:
        """(B, H, N, C, C): q_t . k_j under the decays between them; 0 where j is not seen."""
        if not self.gated:
            return (self.q @ self.k.transpose(-1, -2) * self._between()).masked_fill_(self.unseen, 0.0)
        pairs = self.q.new_zeros(*self.q.shape[:4], self.chunk)
        for t, decay in self._rows():
            pairs[..., t, : t + 1] = (self.q[..., t, None, :] * decay * self.k[..., : t + 1, :]).sum(-1)
        return pairs.masked_fill_(self.unseen, 0.0)

    def _pairs_backward(self, dpairs: Tensor) -> tuple[Tensor, Tensor]:
        if not self.gated:
            dpairs = dpairs * self._between()
            return dpairs @ self.k, dpairs.transpose(-1, -2) @ self.q
        dq, dk = torch.empty_like(self.q), torch.zeros_like(self.k)
        for t, decay in self._rows():
            weights = dpairs[..., t, : t + 1, None] * decay
            dq[..., t, :] = (weights * self.k[..., : t + 1, :]).sum(-2)
            dk[..., : t + 1, :] += weights * self.q[..., t, None, :]
        return dq, dk

    def _between(self) -> Tensor:
        """(B, H, N, C, C): one decay per head from j to t; 1 where there is none."""
        if self.g is None:
            return self.q.new_ones(())
        later = torch.ones(self.chunk, self.chunk, dtype=torch.bool, device=self.q.device).tril(-1)
        # every pair has a sum of its own: differences of running sums lose digits behind a strong decay
        return self.g.expand(*self.g.shape[:4], self.chunk).masked_fill(~later, 0.0).cumsum(-2).exp()

    def _rows(self):
        """For every token t of a sub-chunk the decays per channel from each j <= t: (B, H, N, t + 1, D)."""
        assert self.g is not None
        for t in range(self.chunk):
            yield t, after(self.g[..., : t + 1, :], 3).exp()

    def _cut(self, x: Tensor) -> Tensor:
        """(B, H, S, ...) -> (B, H, N, C, ...), filled up with zeros."""
        missing = -x.shape[2] % self.chunk
        return (F.pad(x, (0, 0, 0, missing)) if missing else x).unflatten(2, (-1, self.chunk))

    def _joined(self, x: Tensor) -> Tensor:
        return x.flatten(2, 3)[:, :, : self.tokens]
