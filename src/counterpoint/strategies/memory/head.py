"""The last norm, the LM head and the loss, some tokens at a time (StreamBP, arXiv 2506.03077, section 3.2.1).

The loss is a sum over tokens, so their logits need not exist together: those of a piece are made, differentiated and
freed before the next ones. DPO and GRPO are the same sums, of terms that also read the log-probabilities of a frozen
reference; DPO's gradient has a common factor, which is multiplied in at the end.

Shapes: x (B, S, E), labels (B, S); pieces are rows of the B S tokens.
"""

from __future__ import annotations

from contextlib import nullcontext

from counterpoint.kernels.loss import LogSoftmax, LogSoftmaxBackward, TokenLoss, TokenLossBackward
from counterpoint.kernels.pointwise import Accumulate, Empty, Write
from counterpoint.kernels.projection import Linear, LinearInput, LinearWeight, View
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.memory.cost import Block
from counterpoint.strategies.memory.operators import Operators, Values


class HeadWriter(Operators):
    """Writes the head; weights are "norm" and "weight". `loss` is the sum of the losses of the tokens."""

    def __init__(
        self, builder: Builder, block: Block, weights: Values, rank: int | None, piece: int | None
    ) -> None:
        super().__init__(builder, block, weights, rank)
        self.count = block.batch * block.tokens
        self.piece = self.count if piece is None else min(piece, self.count)
        self.loss: Value | None = None

    def forward_backward(self, x: Value, labels: Value) -> Value:
        """The gradient of x."""
        saved: Values = {}
        h, flat = self._begin(x, labels, saved)
        dh = self.one(Empty(h.spec), h, name="dh")
        with self.pieces() if self.piece < self.count else nullcontext():
            for a, b in self._spans():
                part = self.rows(h, a, b)
                wanted = self.rows(flat, a, b)
                logs = self._log_probabilities(part, wanted)
                d = self.one(TokenLossBackward(), logs, wanted, name="dlogs")
                d = self.cast(self.one(LogSoftmaxBackward(), d, logs, name="dlogits"))
                dh = self.one(Write(a, b), dh, self.one(LinearInput(), d, self.weights["weight"]))
                if self.rank is None:
                    self.gradient("weight", self.one(LinearWeight(), d, part, name="dw"))
        dh = self.one(View((self.config.hidden_size,), (self.block.batch, self.block.tokens)), dh)
        return self.norm_back(dh, "x", "norm", saved)

    def forward(self, x: Value, labels: Value) -> Value:
        """The loss alone."""
        h, flat = self._begin(x, labels, {})
        for a, b in self._spans():
            self._log_probabilities(self.rows(h, a, b), self.rows(flat, a, b))
        assert self.loss is not None
        return self.loss

    def _begin(self, x: Value, labels: Value, saved: Values) -> tuple[Value, Value]:
        h = self.norm(x, "x", "norm", saved)
        lead = (1, self.count)
        return self.one(View((self.config.hidden_size,), lead), h), self.one(View((), lead), labels)

    def _log_probabilities(self, h: Value, labels: Value) -> Value:
        """Log-probabilities of a piece; its loss is added."""
        logits = self.one(Linear(), h, self.weights["weight"], name="logits")
        logs = self.one(LogSoftmax(), self.widened(logits), name="logs")
        loss = self.one(TokenLoss(), logs, labels, name="loss")
        self.loss = loss if self.loss is None else self.one(Accumulate(), self.loss, loss)
        return logs

    def _spans(self) -> list[tuple[int, int]]:
        return self.some([(a, min(a + self.piece, self.count)) for a in range(0, self.count, self.piece)])
