"""Parameters, gradients and optimizer states of one rank, as the ZeRO stages shard them (arXiv 1910.02054).

stage 0: gradients are summed over the ranks, every rank updates all parameters.
stage 1: every rank keeps whole gradients, updates its share and hands it to the others.
stage 2: only the rank's share of a group's gradients stays once they are summed.
stage 3: of the parameters, too; a group's are gathered for its forward pass and again for its backward pass.

A group is a layer, the embedding, or the head. Each exchange sends (N - 1) / N of a group's bytes from every rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod

from counterpoint.kernels.flat import AdamW, FlatJoin, FlatPart, Flatten, Unflatten
from counterpoint.kernels.kernel import Kernel, TensorSpec
from counterpoint.kernels.pointwise import Accumulate, After
from counterpoint.kernels.projection import Total
from counterpoint.schedule.builder import Builder
from counterpoint.schedule.schedule import Value
from counterpoint.strategies.memory.operators import Values


@dataclass(frozen=True, slots=True)
class Training:
    """What is trained, and what it takes beside activations.

    rank: of LoRA adapters (float32, their states too); None trains all parameters. state: dtype of AdamW's two moments.
    master: a float32 copy of 2-byte parameters. zero: stage of sharding over `ranks`. reference: a frozen copy of the
    model is run forward first (DPO, GRPO); adapters need no copy, the model without them is it. update: the optimizer's
    step is part of it. old_gradients: gradients of an earlier micro-batch lie there from the beginning.
    """

    rank: int | None = None
    state: str = "float32"
    master: bool = False
    zero: int = 0
    ranks: int = 1
    reference: bool = False
    update: bool = True
    old_gradients: bool = False

    def __post_init__(self) -> None:
        if not 0 <= self.zero <= 3:
            raise ValueError(f"zero {self.zero}: the stages of sharding are 0, 1, 2 and 3")
        if self.ranks < 1:
            raise ValueError(f"{self.ranks} ranks: give at least 1")
        if self.rank is not None and self.rank < 1:
            raise ValueError(f"LoRA of rank {self.rank}: give at least 1")
        if self.state not in ("float32", "bfloat16"):
            raise ValueError(f"optimizer states in {self.state!r}: use float32 or bfloat16")

    @property
    def sharded(self) -> bool:
        """Whether parameters live in shares."""
        return self.zero == 3 and self.ranks > 1

    def count(self, specs: Mapping[str, TensorSpec]) -> int:
        """Numbers in a group, rounded up so that the ranks' shares are equal."""
        return -(-sum(prod(s.shape) for s in specs.values()) // self.ranks) * self.ranks

    def share(self, specs: Mapping[str, TensorSpec]) -> TensorSpec:
        """What one rank holds of a group that is sharded."""
        return TensorSpec((self.count(specs) // self.ranks,), _dtype(specs))

    def states(self, specs: Mapping[str, TensorSpec]) -> dict[str, TensorSpec]:
        """The optimizer's states of one rank for a group."""
        count = self.count(specs) if self.zero == 0 else self.share(specs).shape[0]
        moment = self.state if self.rank is None else "float32"
        kinds = {"m": moment, "v": moment}
        if self.master and _dtype(specs) not in ("float32", "float64"):
            kinds["master"] = "float32"
        return {name: TensorSpec((count,), dtype) for name, dtype in kinds.items()}


class Shards:
    """Writes what happens to the groups of parameters; `gradients` holds what is still to be applied."""

    def __init__(self, builder: Builder, training: Training, rank: int) -> None:
        self.builder, self.training, self.rank = builder, training, rank
        self.gradients: Values = {}
        self.outputs: Values = {}
        self._weights: dict[str, Values] = {}
        self._shares: Values = {}
        self._specs: dict[str, Mapping[str, TensorSpec]] = {}
        self._trained: dict[str, Mapping[str, TensorSpec]] = {}
        self._states: dict[str, list[Value]] = {}
        self._whole: Values = {}
        self._reduced: set[str] = set()

    def declare(
        self, group: str, specs: Mapping[str, TensorSpec], adapters: Mapping[str, TensorSpec] | None = None
    ) -> None:
        """The inputs of a group: its parameters, the adapters beside them, the states of what is trained."""
        t, full = self.training, self.training.rank is None
        if t.sharded:
            self._shares[group] = self.builder.input(f"{group}.share", t.share(specs), full)
            self._specs[group], self._weights[group] = specs, {}
        else:
            self._weights[group] = {n: self.builder.input(f"{group}.{n}", s, full) for n, s in specs.items()}
        for name, spec in (adapters or {}).items():
            self._weights[group][name] = self.builder.input(f"{group}.{name}", spec, True)
        trained = specs if full else adapters
        if not trained:
            return
        self._trained[group] = trained
        states = t.states(trained)
        self._states[group] = [self.builder.input(f"{group}.{n}", s, True) for n, s in states.items()]
        if t.old_gradients:
            whole = t.count(trained) if t.zero < 2 else t.share(trained).shape[0]
            spec = TensorSpec((whole,), _dtype(trained))
            self.gradients[group] = self.builder.input(f"{group}.gradient", spec, True)

    def weights(self, group: str, after: Value) -> Values:
        """The whole parameters of a group; sharded ones are gathered from all ranks once `after` exists."""
        if not self.training.sharded:
            return self._weights[group]
        row = self._all_gather(self._one(After(), self._shares[group], after), "parameters")
        found, start = dict(self._weights[group]), 0
        for name, spec in self._specs[group].items():
            found[name] = self._one(FlatPart(start, spec.shape), row, name=name)
            start += prod(spec.shape)
        return found

    def reduce(self, group: str, grads: Values) -> None:
        """Sums the gradients of a group over the ranks, into what the stage keeps of them."""
        t = self.training
        if group not in self._trained:
            return
        specs = self._trained[group]
        self._reduced.add(group)
        old = self.gradients.get(group)
        if t.ranks == 1 and old is not None:
            self.gradients[group] = self._added(old, specs, grads)
            return
        if t.ranks == 1:
            self.gradients.update({f"{group}.{name}": grads[name] for name in specs})
            return
        flat = Flatten(t.count(specs), _dtype(specs))
        row = self._one(flat, *(grads[name] for name in specs), name=f"{group}.row")
        if old is not None and t.zero < 2:  # earlier micro-batches, before the ranks exchange the sum
            row = self._one(Accumulate(), old, row)
        if t.zero == 1:
            self._whole[group] = row  # all of it stays until the update
        row = self._reduce_scatter(row)
        if t.zero == 0:
            row = self._all_gather(row, "gradients")
        if old is not None and t.zero >= 2:
            row = self._one(Accumulate(), old, row)
        self.gradients[group] = row

    def _added(self, row: Value, specs: Mapping[str, TensorSpec], grads: Values) -> Value:
        """The row with every gradient added in its place."""
        start, done = 0, []
        for name, spec in specs.items():
            done.append(self._one(Accumulate(), self._one(FlatPart(start, spec.shape), row), grads[name]))
            start += prod(spec.shape)
        return self._one(After(), row, *done)

    def held(self) -> int:
        """Bytes of the gradients of groups that have been reduced, beside those that were there from the beginning."""
        t = self.training
        reduced = [v for name, v in self.gradients.items() if name.split(".")[0] in self._reduced]
        rows, whole = (sum(v.nbytes for v in part) for part in (reduced, self._whole.values()))
        if not t.old_gradients:
            return rows + (whole if t.ranks > 1 else 0)
        return rows if t.zero < 2 and t.ranks > 1 else 0

    def update(self) -> None:
        """AdamW on all groups, in the order in which they were declared."""
        t = self.training
        for group, specs in self._trained.items():
            row = self._gradient(group)
            adam, states = AdamW(master=len(self._states[group]) == 3), self._states[group]
            if t.sharded and t.rank is None:
                share, *states = self.builder.compute(adam, self._shares[group], row, *states)
                self.outputs[f"{group}.share"] = share
            else:
                weights = [self._weights[group][name] for name in specs]
                flat = self._one(Flatten(t.count(specs), _dtype(specs)), *weights, name=f"{group}.row")
                if t.zero and t.ranks > 1:
                    shape = t.share(specs).shape
                    mine = self._one(FlatPart(self.rank * shape[0], shape), flat)
                    mine, *states = self.builder.compute(adam, mine, row, *states)
                    flat = self._all_gather(mine, "parameters")
                else:
                    flat, *states = self.builder.compute(adam, flat, row, *states)
                new = self.builder.compute(Unflatten(len(weights)), flat, *weights, names=tuple(specs))
                self.outputs.update({f"{group}.{n}": v for n, v in zip(specs, new, strict=True)})
            names = t.states(specs)
            self.outputs.update({f"{group}.{n}": v for n, v in zip(names, states, strict=True)})

    def _gradient(self, group: str) -> Value:
        """The gradient of a group as the row that its update takes."""
        specs = self._trained[group]
        if group not in self.gradients:
            parts = [self.gradients.pop(f"{group}.{name}") for name in specs]
            row = Flatten(self.training.count(specs), _dtype(specs))
            return self._one(row, *parts, name=f"{group}.row")
        row = self.gradients.pop(group)
        return self._one(After(), row, self._whole.pop(group)) if group in self._whole else row

    # ---- exchanges -----------------------------------------------------------------------------------
    def _reduce_scatter(self, row: Value) -> Value:
        """This rank's share of the sum of the row over all ranks."""
        n, me = self.training.ranks, self.rank
        share = TensorSpec((row.spec.shape[0] // n,), row.spec.dtype)
        places = [(me + i) % n for i in range(n)]
        parts = [self._one(FlatPart(p * share.shape[0], share.shape), row) for p in places]
        sends = {p: [part] for p, part in zip(places[1:], parts[1:], strict=True)}
        recvs = {(me - i) % n: [("part", share)] for i in range(1, n)}
        got = self.builder.collective("reduce_scatter", "gradients", sends, recvs)
        others = (got[(me - i) % n][0] for i in range(1, n))
        return self._one(Total(row.spec.dtype), parts[0], *others, name="share")

    def _all_gather(self, share: Value, channel: str) -> Value:
        """The shares of all ranks, in the order of the ranks."""
        n, me = self.training.ranks, self.rank
        sends = {(me + i) % n: [share] for i in range(1, n)}
        recvs = {(me - i) % n: [("part", share.spec)] for i in range(1, n)}
        got = self.builder.collective("all_gather", channel, sends, recvs)
        parts = [share, *(got[(me - i) % n][0] for i in range(1, n))]
        return self._one(FlatJoin(tuple((me - rank) % n for rank in range(n))), *parts, name="whole")

    def _one(self, kernel: Kernel, *inputs: Value, name: str | None = None) -> Value:
        return self.builder.compute(kernel, *inputs, names=None if name is None else (name,))[0]


def _dtype(specs: Mapping[str, TensorSpec]) -> str:
    return next(iter(specs.values())).dtype
