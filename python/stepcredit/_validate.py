"""Checks that configurations make of themselves, and environments of what they are called with."""

from __future__ import annotations

import math
import types
from collections.abc import Sequence
from dataclasses import fields
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints


def require(good: bool, name: str, rule: str, value: object) -> None:
    """ValueError "<name> must be <rule>, got <value>" unless `good`."""
    if not good:
        raise ValueError(f"{name} must be {rule}, got {value!r}")


def at_least(group: object, prefix: str, **least: float) -> None:
    """Each named field is finite and not below its bound; None passes."""
    for name, bound in least.items():
        value = getattr(group, name)
        if value is not None:
            require(math.isfinite(value) and value >= bound, f"{prefix}{name}", f"at least {bound}", value)


def one_length(**lists: Sequence[object]) -> None:
    """ValueError "<a>, <b> and <c> must have one length, got <lengths>" unless the named arguments do."""
    lengths = [len(values) for values in lists.values()]
    if len(set(lengths)) > 1:
        *names, last = lists
        raise ValueError(f"{', '.join(names)} and {last} must have one length, got {', '.join(map(str, lengths))}")


def choices(group: Any, prefix: str) -> None:
    """Each field annotated with a Literal, perhaps of a union with None, holds one of its values."""
    hints = get_type_hints(type(group))
    for field in fields(group):
        hint, value = hints[field.name], getattr(group, field.name)
        if get_origin(hint) in (Union, types.UnionType) and value is not None:
            hint = next(kind for kind in get_args(hint) if kind is not type(None))
        if get_origin(hint) is Literal:
            allowed = get_args(hint)
            require(value in allowed, f"{prefix}{field.name}", f"one of {', '.join(allowed)}", value)
