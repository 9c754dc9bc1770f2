"""One clear line for what is wrong with a configuration: the nearest known key, what a value may be."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, get_args

import yaml
from pydantic import BaseModel


def known_keys(section: type[BaseModel], prefix: str = "") -> dict[str, str]:
    """Every dotted key of the configuration, with its description."""
    known: dict[str, str] = {}
    for name, field in section.model_fields.items():
        inner = field.annotation
        if isinstance(inner, type) and issubclass(inner, BaseModel):
            known |= known_keys(inner, f"{prefix}{name}.")
        else:
            known[prefix + name] = field.description or ""
    return known


def nearest(name: str, known: Mapping[str, str]) -> str:
    """The known dotted key most like `name`: spelt alike, or described by its words (learning_rate: lr)."""
    match = difflib.get_close_matches(name, known, 1, 0.8)
    last = name.rpartition(".")[2]
    match = match or [
        key for key in known if difflib.get_close_matches(last, [key.rpartition(".")[2]], 1, 0.75)
    ]
    match = match or [key for key, text in known.items() if last.replace("_", " ") in text]
    return (match or difflib.get_close_matches(name, known, 1, 0.0))[0]


def explain(errors: Iterable[Any], root: type[BaseModel]) -> list[str]:
    """What pydantic's `errors` on a `root` configuration mean, a clause each, unknown keys first."""
    found: list[str] = []
    refused: dict[str, tuple[Any, list[str]]] = {}  # a union gives one error per branch: join them
    for error in errors:
        key = ".".join(str(part) for part in error["loc"] if _is_key(part))
        if error["type"] == "extra_forbidden":
            sections = {name: "" for name, f in root.model_fields.items() if isinstance(f.default, BaseModel)}
            known = sections if isinstance(error["input"], dict) and "." not in key else known_keys(root)
            found.append(f"unknown key {key}; the nearest known one is {nearest(key, known)}")
        elif error["type"] == "value_error":
            text = str(error["ctx"]["error"])
            found.append(text if text.startswith(key) or not key or "." not in key else f"{key}: {text}")
        else:
            if error["type"] == "too_short" and key in refused:
                continue  # pydantic counts the items left after dropping the wrong one
            allowed = refused.setdefault(key, (error["input"], []))[1]
            text = _allowed(key, root) if error["type"] in ("literal_error", "model_type") else None
            allowed.append(text or _PHRASES.get(error["type"]) or _plain(error["msg"]))
    for key, (given, allowed) in refused.items():
        choices = " or ".join(dict.fromkeys(allowed))
        found.append(f"{key} = {yaml_text(given)}: allowed is {choices}; change {key}")
    return found


def yaml_text(value: Any) -> str:
    """A value as one line of YAML."""
    text = yaml.safe_dump(value, default_flow_style=True, width=10**6)
    return text.strip().removesuffix("...").strip()


_PHRASES = {
    "int_parsing": "an integer",
    "int_type": "an integer",
    "int_from_float": "an integer",
    "float_parsing": "a number",
    "float_type": "a number",
    "bool_parsing": "true or false",
    "string_type": "a text",
    "dict_type": "a mapping of fields",
}


def _plain(message: str) -> str:
    for start in ("Input should be ", "Value should ", "Tuple should have ", "String should have "):
        message = message.removeprefix(start)
    return message.removesuffix(" after validation").partition(" after validation,")[0]


def _is_key(part: Any) -> bool:
    # pydantic adds the branch of a union ("int", "literal['auto']") to the location
    branches = ("int", "str", "bool")
    return (
        isinstance(part, str) and part not in branches and not part.startswith(("literal[", "dict[", "func"))
    )


def _allowed(key: str, section: Any) -> str | None:
    for part in key.split("."):
        fields = getattr(section, "model_fields", {})
        if part not in fields:
            return None
        section = fields[part].annotation
    if isinstance(section, type) and issubclass(section, BaseModel):
        return "a section with " + ", ".join(section.model_fields)
    choices = _choices(section)
    return ("one of " if len(choices) > 1 else "") + ", ".join(choices) if choices else None


def _choices(annotation: Any) -> list[str]:
    found: list[str] = []
    for arg in get_args(annotation):
        found += [arg] if isinstance(arg, str) else _choices(arg)
    return list(dict.fromkeys(found))
