"""Quantities with units: "25 GB/s" to 25e9 and back. Plain numbers are base units."""

from __future__ import annotations

import re
from decimal import Decimal
from typing import Literal

Dimension = Literal["bytes", "bytes_per_second", "seconds", "flops", "flops_per_second"]

_DECIMAL = {"": 1.0, "k": 1e3, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15, "E": 1e18}
_BINARY = {"Ki": 2.0**10, "Mi": 2.0**20, "Gi": 2.0**30, "Ti": 2.0**40}
_SECONDS = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "μs": 1e-6, "ms": 1e-3, "s": 1.0}
_EXAMPLE: dict[Dimension, str] = {
    "bytes": "'141 GiB'",
    "bytes_per_second": "'25 GB/s' or '200 Gb/s'",
    "seconds": "'3 us'",
    "flops": "'10 GFLOP'",
    "flops_per_second": "'312 TFLOP/s'",
}
_WHAT: dict[Dimension, str] = {
    "bytes": "a size",
    "bytes_per_second": "a bandwidth",
    "seconds": "a time",
    "flops": "a number of operations",
    "flops_per_second": "a compute rate",
}
_QUANTITY = re.compile(r"([-+]?(?:\d[\d_]*\.?\d*|\.\d+)(?:[eE][-+]?\d+)?)\s*([^\d\s].*)?")


def _unit_table() -> dict[str, tuple[Dimension, float]]:
    table: dict[str, tuple[Dimension, float]] = {name: ("seconds", f) for name, f in _SECONDS.items()}
    for prefix, factor in {**_DECIMAL, **_BINARY}.items():
        table[f"{prefix}B"] = ("bytes", factor)
        table[f"{prefix}B/s"] = ("bytes_per_second", factor)
        for bit in ("b", "bit"):
            table[f"{prefix}{bit}/s"] = ("bytes_per_second", factor / 8)
    for prefix, factor in _DECIMAL.items():
        for operation in ("FLOP", "OP"):
            table[f"{prefix}{operation}"] = ("flops", factor)
            table[f"{prefix}{operation}/s"] = ("flops_per_second", factor)
            table[f"{prefix}{operation}S"] = ("flops_per_second", factor)
    return table


_UNITS = _unit_table()


def parse_quantity(value: object, dimension: Dimension) -> float:
    """The value in base units (bytes, bytes/s, seconds, floating-point operations, or those per second).

    Args:
        value: a number in base units, or text such as "25 GB/s" (decimal), "141 GiB" (binary),
            "100 Gb/s" (bits), "3 us", "312 TFLOP/s".
        dimension: what the number must measure.

    Raises:
        ValueError: not a number, an unknown unit, or a unit of another dimension.
    """
    example = f"give {_WHAT[dimension]} such as {_EXAMPLE[dimension]}"
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        raise ValueError(f"{_shown(value)} is not a quantity; {example}")
    if not isinstance(value, str):
        return float(value)
    match = _QUANTITY.fullmatch(value.strip())
    if not match:
        raise ValueError(f"'{value}' is not a quantity; {example}")
    unit = (match[2] or "").strip()
    if not unit:
        return float(match[1].replace("_", ""))
    if unit not in _UNITS:
        raise ValueError(f"'{value}' has an unknown unit '{unit}'; {example}")
    found, factor = _UNITS[unit]
    if found != dimension:
        raise ValueError(f"'{value}' is {_WHAT[found]}, not {_WHAT[dimension]}; {example}")
    # in decimal, because 10 * 1e-6 in floats is not the float nearest to 10 us
    try:
        return float(Decimal(match[1].replace("_", "")) * Decimal(str(factor)))
    except ArithmeticError:
        raise ValueError(f"'{value}' is out of range; {example}") from None


def format_quantity(value: float, dimension: Dimension) -> str:
    """The value for a reader, three significant digits: 25e9 bytes_per_second is "25 GB/s"."""
    if dimension == "seconds":
        for name in ("s", "ms", "us", "ns"):
            if value >= _SECONDS[name] or name == "ns":
                return f"{value / _SECONDS[name]:.3g} {name}"
    suffix = {"bytes": "B", "bytes_per_second": "B/s", "flops": "FLOP", "flops_per_second": "FLOP/s"}[
        dimension
    ]
    for prefix in ("E", "P", "T", "G", "M", "k", ""):
        if abs(value) >= 0.9995 * _DECIMAL[prefix] or not prefix:
            return f"{_three_digits(value / _DECIMAL[prefix])} {prefix}{suffix}"
    raise AssertionError("the empty prefix ends the loop")


def _three_digits(number: float) -> str:
    return f"{number:.0f}" if abs(number) >= 100 else f"{number:.3g}"


def _shown(value: object) -> str:
    if value is None:
        return "nothing"
    return {True: "true", False: "false"}[value] if isinstance(value, bool) else f"a {type(value).__name__}"
