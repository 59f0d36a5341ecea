"""`field=value` overrides, and the other ways a configuration is written: JSON, and the help's documentation."""

from __future__ import annotations

import inspect
import math
import re
import types
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass, replace
from typing import Any, Literal, Union, cast, get_args, get_origin, get_type_hints

from stepcredit._names import nearest
from stepcredit.credit import METHODS, get_method
from stepcredit.train.config import TrainConfig


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """Every field by its dotted name, e.g. {"steps": 10, "credit": "ig_search", "credit.alpha": 0.3, ...}."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value, name = getattr(config, f.name), prefix + f.name
        if not is_dataclass(value):
            flat[name] = value
            continue
        if f.name == "credit":
            flat[name] = method_name(value)
        flat.update(flatten(value, name + "."))
    return flat


def method_name(method: Any) -> str:
    """The name under which a credit method is known, or that of its class when it is not."""
    return next((name for name, make in METHODS.items() if type(make()) is type(method)), type(method).__name__)


def to_json(config: TrainConfig) -> dict[str, Any]:
    """`flatten`, with what JSON lacks (infinity, tuples) as the text of an override."""
    return {
        name: as_text(value) if isinstance(value, tuple) or value == math.inf else value
        for name, value in flatten(config).items()
    }


def from_json(values: Mapping[str, Any]) -> TrainConfig:
    """The configuration that `to_json` wrote."""
    return apply_overrides(TrainConfig(), [f"{name}={as_text(value)}" for name, value in values.items()])


def apply_overrides(config: TrainConfig, overrides: Sequence[str]) -> TrainConfig:
    """A copy of `config` with "field=value" and "group.field=value" overrides applied, in any order, last one wins.

    Values are parsed by the field's type: numbers (1e-5), true / false, none where a field may be empty, and the
    allowed words of a choice. "credit=NAME" starts from that method's defaults, unless the configuration has that
    method already.

    Raises:
        ValueError: not of the form field=value, unknown field (with the nearest match), or a value that does not
            parse or is not allowed; the message names the field and the value.
    """
    changes: dict[str, str] = {}
    for override in overrides:
        name, equals, text = override.partition("=")
        if not equals:
            raise ValueError(f"expected field=value, got {override!r}")
        changes[name.strip()] = text  # white space may matter, as in an answer probe
    if "credit" in changes:
        name = changes.pop("credit")
        if name != method_name(config.credit):  # the method a recipe has already keeps the recipe's constants
            config = replace(config, credit=get_method(name))
    known = flatten(config)
    for name in changes:
        if name not in known:
            raise ValueError(f"unknown field {name!r}{nearest(name, known)}")
    return cast(TrainConfig, _replace(config, changes, ""))


def _replace(group: Any, changes: Mapping[str, str], prefix: str) -> Any:
    hints = get_type_hints(type(group))
    new: dict[str, Any] = {}
    for f in fields(group):
        name, value = prefix + f.name, getattr(group, f.name)
        if is_dataclass(value):
            inner = {n: text for n, text in changes.items() if n.startswith(name + ".")}
            if inner:
                new[f.name] = _replace(value, inner, name + ".")
        elif name in changes:
            new[f.name] = parse_value(name, changes[name], hints[f.name])
    return replace(group, **new)


def parse_value(name: str, text: str, hint: Any) -> Any:
    """`text` as a value of type `hint`; ValueError naming the field and the text when it is none."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if text.lower() == "none" and type(None) in get_args(hint):
            return None
        hint = next(a for a in get_args(hint) if a is not type(None))
        origin = get_origin(hint)
    if origin is Literal:
        return _choice(name, text, get_args(hint))
    if hint is str:
        return text
    if origin is tuple:
        return tuple(part.strip() for part in text.split(",") if part.strip())
    if hint is bool:
        return _choice(name, text.lower(), ("true", "false")) == "true"
    try:
        return hint(text)
    except ValueError:
        raise ValueError(f"{name} must be {'an integer' if hint is int else 'a number'}, got {text!r}") from None


def _choice(name: str, text: str, choices: Iterable[str]) -> str:
    if text not in set(choices):
        raise ValueError(f"{name} must be one of {', '.join(map(str, choices))}, got {text!r}{nearest(text, choices)}")
    return text


def as_text(value: Any) -> str:
    """A value as an override would write it: "none", "true", "2wiki,musique", "0.3"."""
    if isinstance(value, tuple):
        return ",".join(value)
    return str(value).lower() if value is None or isinstance(value, bool) else str(value)


def describe_type(hint: Any) -> str:
    """A field's type for the help: "int", "float or none", "token | sequence"."""
    if get_origin(hint) is Literal:
        return " | ".join(map(str, get_args(hint)))
    if get_origin(hint) in (Union, types.UnionType):
        return " or ".join("none" if a is type(None) else describe_type(a) for a in get_args(hint))
    return "a,b,..." if get_origin(hint) is tuple else str(hint.__name__)


def field_docs(cls: type) -> dict[str, str]:
    """What the "Attributes:" section of a class's docstring says about each field, each on one line."""
    docs: dict[str, str] = {}
    names: list[str] = []
    _, _, section = inspect.cleandoc(cls.__doc__ or "").partition("\nAttributes:\n")
    for line in section.splitlines():
        if line and not line.startswith("    "):
            break
        if head := re.match(r" {4}(\w[\w, ]*): (.*)", line):
            names = [n.strip() for n in head[1].split(",")]
            docs.update(dict.fromkeys(names, head[2].strip()))
        else:
            docs.update({n: f"{docs[n]} {line.strip()}".strip() for n in names})
    return docs
