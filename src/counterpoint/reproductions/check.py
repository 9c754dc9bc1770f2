"""A claim, how to find out whether it comes out, and what came out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any, Literal, get_args

from counterpoint.emulation.namespaces import Unsupported
from counterpoint.reproductions.bench import Bench

Kind = Literal["exact", "bytes", "simulated", "emulated", "measured"]
Verdict = Literal["holds", "outside", "reported", "failed", "not carried out"]
KINDS: tuple[str, ...] = get_args(Kind)


@dataclass(frozen=True, slots=True)
class Tolerance:
    """How far from the claim a figure may lie: a share of the claim plus an absolute part.

    side: "both"; or "at most" and "at least", when only one direction counts against the claim.
    """

    relative: float = 0.0
    absolute: float = 0.0
    side: Literal["both", "at most", "at least"] = "both"

    def holds(self, got: float, claimed: float) -> bool:
        room = self.relative * abs(claimed) + self.absolute
        return (self.side == "at least" or got <= claimed + room) and (
            self.side == "at most" or got >= claimed - room
        )

    def __str__(self) -> str:
        parts = [f"{self.relative * 100:g} %"] if self.relative else []
        parts += [f"{self.absolute:g}"] if self.absolute else []
        if self.side == "both":
            return "± " + " + ".join(parts) if parts else "exactly"
        return self.side + (f" (± {' + '.join(parts)})" if parts else "")


EXACTLY = Tolerance()


@dataclass(frozen=True, slots=True)
class Check:
    """One claim of a paper, or what follows from its formulas.

    value: the claimed figure in `unit`. source: the section, figure or formula it is from. measure: finds the figure
    that comes out, in the same unit. tolerance None: the figure is reported without a verdict, and `note` says why.
    note: what a reader must know to judge the figure, above all when it does not come out.
    """

    claim: str
    value: float
    unit: str
    source: str
    kind: Kind
    tolerance: Tolerance | None
    measure: Callable[[Bench], float]
    note: str = ""

    def __post_init__(self) -> None:
        assert self.tolerance is not None or self.note, f"{self.claim}: no tolerance, and no reason why"


@dataclass(frozen=True, slots=True)
class Reproduction:
    """All checks of one system; `summary` says in a line what they cover, `remarks` what holds for several figures."""

    name: str
    summary: str
    checks: tuple[Check, ...]
    remarks: tuple[str, ...] = ()

    def kinds(self) -> dict[str, int]:
        """How many checks there are of each kind."""
        counts = {kind: sum(check.kind == kind for check in self.checks) for kind in KINDS}
        return {kind: n for kind, n in counts.items() if n}


@dataclass(frozen=True, slots=True)
class Result:
    """What came out of a check: a figure, or the error that prevented one.

    unsupported: the error is that this machine cannot carry it out, which says nothing about the claim.
    """

    check: Check
    got: float | None = None
    error: str = ""
    unsupported: bool = False

    @property
    def verdict(self) -> Verdict:
        if self.got is None:
            return "not carried out" if self.unsupported else "failed"
        if self.check.tolerance is None:
            return "reported"
        return "holds" if self.check.tolerance.holds(self.got, self.check.value) else "outside"

    @property
    def difference(self) -> float | None:
        """Of the figure from the claim, as a share of the claim; absolute where the claim is zero."""
        if self.got is None:
            return None
        value = self.check.value
        return (self.got - value) / abs(value) if value else self.got

    def to_json(self) -> dict[str, Any]:
        check, tolerance = self.check, self.check.tolerance
        limits = tolerance and {
            "relative": tolerance.relative, "absolute": tolerance.absolute, "side": tolerance.side,
        }  # fmt: skip
        return {
            "claim": check.claim, "claimed": check.value, "unit": check.unit, "source": check.source,
            "kind": check.kind, "tolerance": limits, "got": self.got, "difference": self.difference,
            "verdict": self.verdict, "note": check.note, "error": self.error,
        }  # fmt: skip


def run(checks: Iterable[Check], bench: Bench) -> Iterator[Result]:
    """The results one by one. A check that cannot be carried out is a result too; the others go on."""
    for check in checks:
        try:
            yield Result(check, float(check.measure(bench)))
        except Unsupported as error:
            yield Result(check, None, str(error), unsupported=True)
        except (ValueError, RuntimeError, OSError) as error:
            yield Result(check, None, " ".join(str(error).split()) or type(error).__name__)


def holds(results: Iterable[Result]) -> bool:
    """Whether nothing lies outside its tolerance and nothing failed."""
    return all(result.verdict not in ("outside", "failed") for result in results)
