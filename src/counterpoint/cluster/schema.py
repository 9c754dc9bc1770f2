"""The cluster file as pydantic sees it: keys, types, units. build.py checks them together."""

from __future__ import annotations

import difflib
from collections.abc import Callable
from functools import partial
from itertools import pairwise
from typing import Annotated, Any

from pydantic import BaseModel, BeforeValidator, ConfigDict, model_validator
from pydantic_core import PydanticCustomError

from counterpoint.cluster.cluster import LEVELS, LINK_KINDS
from counterpoint.cluster.curves import Curve
from counterpoint.cluster.device import DTYPES, WORK_CLASSES
from counterpoint.cluster.units import Dimension, parse_quantity


def mistake(message: str, *keys: str | int) -> PydanticCustomError:
    """An error at the place of the value under validation, or at `keys` below it."""
    return PydanticCustomError("cluster", "{message}", {"message": message, "keys": keys})


def nearest(word: str, known: list[str] | tuple[str, ...]) -> str:
    """' (did you mean x?)' where one of the known names is close, else nothing."""
    close = difflib.get_close_matches(word, known, n=1, cutoff=0.6)
    return f" (did you mean '{close[0]}'?)" if close else ""


class Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", arbitrary_types_allowed=True, frozen=True)

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            raise mistake(f"{_a(data)} stands where a mapping of {', '.join(_keys(cls))} is needed")
        for key in data:
            if key not in _keys(cls):
                allowed = ", ".join(_keys(cls))
                raise mistake(
                    f"unknown key '{key}'{nearest(str(key), _keys(cls))}; allowed are {allowed}", key
                )
        return data


def _keys(model: type[BaseModel]) -> list[str]:
    return list(model.model_fields)


def _a(value: Any) -> str:
    if value is None:
        return "nothing"
    names = {
        bool: "true or false",
        int: "a number",
        float: "a number",
        str: "text",
        list: "a list",
        dict: "a mapping",
    }
    kind = names.get(type(value), type(value).__name__)
    return f"'{value}'" if isinstance(value, str) and len(value) < 40 else kind


def _quantity(value: Any, dimension: Dimension, zero: bool = False) -> float:
    try:
        number = parse_quantity(value, dimension)
    except ValueError as error:
        raise mistake(str(error)) from None
    if not (number > 0 or (zero and number == 0)) or number == float("inf"):
        what = "negative" if number < 0 else f"{number:g}"
        raise mistake(f"{value} is {what}; give a value above zero{' or zero' if zero else ''}")
    return number


def _curve(value: Any, size: Dimension, rate: Dimension) -> Curve:
    if not isinstance(value, dict):
        return Curve.constant(_quantity(value, rate))
    if not value:
        raise mistake("the table is empty; give one rate, or sizes with the rate at each")
    points = []
    for key, entry in value.items():
        try:
            points.append((_quantity(key, size), _quantity(entry, rate)))
        except PydanticCustomError as error:
            raise mistake(error.message(), key) from None
    if len(points) == 1:  # one point says nothing about other sizes: the rate stands for all of them
        return Curve.constant(points[0][1])
    curve = Curve.of(points)
    sizes = [point[0] for point in curve.points]
    twice = [a for a, b in pairwise(sizes) if a == b]
    if twice:
        raise mistake(f"the table gives the size {twice[0]:.0f} twice")
    if falling := curve.falling_time():
        smaller, larger = (f"{x:.0f}" for x in falling)
        raise mistake(
            f"by this table size {larger} takes less time than size {smaller}; correct one of the two rates"
        )
    return curve


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise mistake(f"{_a(value)} given where text is needed")
    return value


def _whole(value: Any, least: int = 1) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise mistake(f"{_a(value)} given where a whole number is needed")
    if value < least:
        raise mistake(f"{value} is too small; give {least} or more")
    return value


def _ratio(value: Any) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise mistake(f"{_a(value)} given where a number is needed")
    if not 1 <= value < float("inf"):
        raise mistake(f"{value} is below 1; 2 means that half of what the level inside sends gets through")
    return float(value)


def _collective(value: Any) -> dict[int, Curve]:
    table = _table(value, _attained)
    for ranks in table:
        if isinstance(ranks, bool) or not isinstance(ranks, int) or ranks < 2:
            raise mistake(f"{_a(ranks)} given where a number of ranks (2 or more) is needed", ranks)
    return table


def _flag(value: Any) -> bool:
    if not isinstance(value, bool):
        raise mistake(f"{_a(value)} given where true or false is needed")
    return value


def _one_of(value: Any, known: tuple[str, ...], what: str) -> str:
    if value not in known:
        raise mistake(
            f"unknown {what} {_a(value)}{nearest(str(value), known)}; allowed are {', '.join(known)}"
        )
    return value


def _table(
    value: Any, check: Callable[[Any], Any], names: tuple[str, ...] = (), what: str = ""
) -> dict[Any, Any]:
    """A mapping whose keys are `names` (any, where there are none) and whose values pass `check`."""
    if not isinstance(value, dict):
        raise mistake(f"{_a(value)} given where a mapping is needed")
    checked = {}
    for key, entry in value.items():
        try:
            if names:
                _one_of(key, names, what)
            checked[key] = check(entry)
        except PydanticCustomError as error:
            raise mistake(error.message(), key, *(error.context or {}).get("keys", ())) from None
    return checked


def _endpoints(value: Any) -> tuple[int, int]:
    if not isinstance(value, list) or len(value) != 2:
        raise mistake(f"{_a(value)} given where two device numbers such as [0, 1] are needed")
    a, b = (_whole(entry, least=0) for entry in value)
    if a == b:
        raise mistake(f"a link from device {a} to itself; give two different devices")
    return a, b


def _runs(value: Any) -> tuple[tuple[str, int], ...]:
    wrong = (
        "placement is a list such as [laptop: 4, phone: 2], a device type and how many ranks in a row have it"
    )
    if not isinstance(value, list):
        raise mistake(wrong)
    runs = []
    for index, entry in enumerate(value):
        if not isinstance(entry, dict) or len(entry) != 1:
            raise mistake(wrong, index)
        [(name, count)] = entry.items()
        try:
            runs.append((str(name), _whole(count)))
        except PydanticCustomError as error:
            raise mistake(error.message(), index, name) from None
    return tuple(runs)


_rates = partial(_curve, size="flops", rate="flops_per_second")
_attained = partial(_curve, size="bytes", rate="bytes_per_second")

Text = Annotated[str, BeforeValidator(_text)]
Whole = Annotated[int, BeforeValidator(_whole)]
Flag = Annotated[bool, BeforeValidator(_flag)]
Bytes = Annotated[float, BeforeValidator(partial(_quantity, dimension="bytes"))]
Bandwidth = Annotated[float, BeforeValidator(partial(_quantity, dimension="bytes_per_second"))]
Seconds = Annotated[float, BeforeValidator(partial(_quantity, dimension="seconds", zero=True))]
Attained = Annotated[Curve, BeforeValidator(_attained)]
LevelText = Annotated[str, BeforeValidator(partial(_one_of, known=LEVELS, what="level"))]
LinkText = Annotated[str, BeforeValidator(partial(_one_of, known=LINK_KINDS, what="link kind"))]
Peaks = Annotated[
    dict[str, float],
    BeforeValidator(
        partial(_table, check=partial(_quantity, dimension="flops_per_second"), names=DTYPES, what="dtype")
    ),
]
Rates = Annotated[
    dict[str, dict[str, Curve]],
    BeforeValidator(
        partial(
            _table,
            check=partial(_table, check=_rates, names=DTYPES, what="dtype"),
            names=WORK_CLASSES,
            what="work class",
        )
    ),
]
Collectives = Annotated[
    dict[str, dict[int, Curve]],
    BeforeValidator(
        partial(
            _table,
            check=_collective,
            names=("all_reduce", "all_gather", "reduce_scatter", "all_to_all", "broadcast"),
            what="collective",
        )
    ),
]


class TierFile(Strict):
    size: Bytes
    bandwidth: Bandwidth
    attained: Attained | None = None


class DeviceFile(Strict):
    memory: dict[str, TierFile]
    peak: Peaks = {}
    rates: Rates
    launch: Seconds


class LinkFile(Strict):
    between: Annotated[tuple[int, int], BeforeValidator(_endpoints)]
    bandwidth: Bandwidth
    bandwidth_back: Bandwidth | None = None
    latency: Seconds | None = None
    attained: Attained | None = None
    level: LevelText | None = None
    one_way: Flag = False


class LevelFile(Strict):
    level: LevelText
    name: Text = ""
    count: Whole
    link: LinkText
    peak: Bandwidth | None = None
    bandwidth: Bandwidth | None = None
    receive_bandwidth: Bandwidth | None = None
    oversubscription: Annotated[float, BeforeValidator(_ratio)] | None = None
    ports: Whole = 1
    latency: Seconds | None = None
    attained: Attained | None = None
    carries_outer: Flag | None = None
    links: tuple[LinkFile, ...] = ()
    forwarding: Flag = False
    collectives: Collectives = {}


class ClusterFile(Strict):
    name: Text
    about: Text = ""
    sources: Annotated[dict[str, str], BeforeValidator(partial(_table, check=_text))] = {}
    devices: dict[str, DeviceFile]
    placement: Annotated[tuple[tuple[str, int], ...], BeforeValidator(_runs)] | None = None
    world_size: Whole | None = None
    levels: tuple[LevelFile, ...]
