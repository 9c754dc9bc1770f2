"""Strategies by name with options, as users write them: "tokenring(packets=4, relay=false)"."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from counterpoint.kernels.kernel import TensorSpec


@dataclass(frozen=True, slots=True)
class Choice:
    """A strategy by name with options, for one axis of the mesh."""

    name: str
    options: tuple[tuple[str, Any], ...] = ()

    def __str__(self) -> str:
        return self.name + (f"({', '.join(f'{k}={v}' for k, v in self.options)})" if self.options else "")


@lru_cache(maxsize=256)
def parse_choice(text: str, known: tuple[str, ...]) -> Choice:
    """A strategy in a user's words. Raises ValueError for one that is not known, with those that are."""
    match = re.fullmatch(r"\s*(\w+)\s*(?:\((.*)\))?\s*", text)
    if not match or match[1] not in known:
        raise ValueError(f"strategy {text!r} is unknown; use one of {', '.join(known)}")
    options = {}
    for item in filter(None, (part.strip() for part in (match[2] or "").split(","))):
        key, equals, value = (x.strip() for x in item.partition("="))
        if not equals:
            raise ValueError(f"option {item!r} of strategy {match[1]} has no value; write name=value")
        words = {"true": True, "false": False, "none": None}
        options[key] = words.get(value.lower(), int(value) if re.fullmatch(r"-?\d+", value) else value)
    return Choice(match[1], tuple(sorted(options.items())))


def check_options(
    choice: Choice, direction: str, functions: Iterable[Callable], known: Sequence[str]
) -> None:
    """ValueError unless the choice is one of the known strategies, and its options are keywords of its functions."""
    if choice.name not in known:
        raise ValueError(f"strategy {choice.name!r} is unknown; use one of {', '.join(known)}")
    allowed = frozenset[str]().union(*(options_of(function) for function in functions))
    for key, value in choice.options:
        if key not in allowed:
            names = f"it has {', '.join(sorted(allowed))}" if allowed else "it has none"
            raise ValueError(f"{direction} strategy {choice.name} has no option {key!r}; {names}")
        if key == "wire_dtype" and value is not None:
            TensorSpec((), value)


@lru_cache(maxsize=64)
def options_of(function: Callable) -> frozenset[str]:
    """The keywords that a strategy takes as options."""
    return frozenset(
        p.name for p in inspect.signature(function).parameters.values() if p.kind is p.KEYWORD_ONLY
    )
