"""Cluster files, read with the line of every mistake."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from counterpoint.cluster.build import Mistake, build
from counterpoint.cluster.cluster import Cluster
from counterpoint.cluster.schema import ClusterFile

Place = tuple[str | int, ...]


class ClusterFileError(ValueError):
    """A mistake in a cluster file: one line with the file, the line number, the keys, and what to change."""


def load_cluster(path: str | Path) -> Cluster:
    """The cluster that a YAML file describes (format: docs/cluster.md).

    Raises:
        ClusterFileError: the file cannot be read, or the first mistake in it with its line and keys.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        reason = error.strerror if isinstance(error, OSError) else "it is not UTF-8 text"
        raise ClusterFileError(f"cannot read the cluster file {path}: {reason}") from None
    return parse_cluster(text, str(path))


def parse_cluster(text: str, where: str = "cluster") -> Cluster:
    """The cluster that YAML text describes; `where` names the text in errors.

    Raises:
        ClusterFileError: the first mistake with its line and keys.
    """
    data, lines = _read_yaml(text, where)
    try:
        return build(ClusterFile.model_validate(data))
    except ValidationError as error:
        found = [_explain(problem) for problem in error.errors()]
        place, message = min(found, key=lambda item: _line(item[0], lines))
    except Mistake as error:
        place, message = error.place, str(error)
    keys = _dotted(place)
    raise ClusterFileError(f"{where}:{_line(place, lines)}: {keys}{': ' if keys else ''}{message}")


def _explain(problem: Any) -> tuple[Place, str]:
    """Where (keys) and what, from one of pydantic's errors."""
    place = tuple(problem["loc"])
    if problem["type"] == "cluster":
        return (*place, *problem["ctx"]["keys"]), str(problem["ctx"]["message"])
    if problem["type"] == "missing":
        return place[:-1], f"missing key '{place[-1]}'"
    kinds = {"dict_type": "a mapping is needed here", "tuple_type": "a list is needed here"}
    return place, kinds.get(problem["type"]) or str(problem["msg"])


def _line(place: Place, lines: dict[Place, int]) -> int:
    while place not in lines:
        place = place[:-1]
    return lines[place]


def _dotted(place: Place) -> str:
    text = ""
    for key in place:
        text += f"[{key}]" if isinstance(key, int) and text else f".{key}" if text else str(key)
    return text


def _read_yaml(text: str, where: str) -> tuple[Any, dict[Place, int]]:
    """The plain values, and the line (from 1) of every key and list entry."""
    lines: dict[Place, int] = {(): 1}
    try:
        loader = yaml.SafeLoader(text)
        node = loader.get_single_node()
        if node is None:
            raise ClusterFileError(f"{where}:1: the file is empty; docs/cluster.md shows an example")
        return _construct(loader, node, (), lines, where), lines
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        line = mark.line + 1 if mark else 1
        raise ClusterFileError(f"{where}:{line}: not valid YAML: {error.problem or error.context}") from None
    except RecursionError:
        raise ClusterFileError(f"{where}:1: the file refers to itself or is nested too deeply") from None
    except yaml.YAMLError as error:
        raise ClusterFileError(f"{where}:1: not valid YAML: {' '.join(str(error).split())}") from None


def _construct(
    loader: yaml.SafeLoader, node: yaml.Node, place: Place, lines: dict[Place, int], where: str
) -> Any:
    lines.setdefault(place, node.start_mark.line + 1)
    if isinstance(node, yaml.SequenceNode):
        return [_construct(loader, entry, (*place, i), lines, where) for i, entry in enumerate(node.value)]
    if not isinstance(node, yaml.MappingNode):
        return _scalar(loader, node, place, where)
    _refuse_twice(node, place, where)
    values: dict[Any, Any] = {}
    loader.flatten_mapping(node)
    for key_node, value_node in node.value:
        key = _scalar(loader, key_node, place, where)
        line = key_node.start_mark.line + 1
        if not isinstance(key, str | int | float):
            raise ClusterFileError(f"{where}:{line}: {_dotted(place)}: a key must be text or a number")
        lines[*place, key] = line  # type: ignore[index]
        values[key] = _construct(loader, value_node, (*place, key), lines, where)  # type: ignore[arg-type]
    return values


def _scalar(loader: yaml.SafeLoader, node: yaml.Node, place: Place, where: str) -> Any:
    try:
        return loader.construct_object(node, deep=True)
    except (ValueError, KeyError, TypeError):  # such as 2026-13-45, which YAML takes for a date
        line, value = node.start_mark.line + 1, getattr(node, "value", "")
        raise ClusterFileError(
            f"{where}:{line}: {_dotted(place)}: cannot read '{value}'; put text in quotes"
        ) from None


def _refuse_twice(node: yaml.MappingNode, place: Place, where: str) -> None:
    """YAML lets the last of two equal keys win; here that is a mistake. Merged keys (<<) may be replaced."""
    seen = set()
    for key_node, _ in node.value:
        text = (key_node.tag, str(key_node.value))
        if text in seen:
            line = key_node.start_mark.line + 1
            keys = _dotted((*place, str(key_node.value)))
            raise ClusterFileError(f"{where}:{line}: {keys}: the key is given twice")
        seen.add(text)
