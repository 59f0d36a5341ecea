"""Checks that every configuration dataclass makes of itself."""

from __future__ import annotations

import math
from dataclasses import fields
from typing import Any, Literal, get_args, get_origin, get_type_hints


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


def choices(group: Any, prefix: str) -> None:
    """Each field annotated with a Literal holds one of its values."""
    hints = get_type_hints(type(group))
    for field in fields(group):
        if get_origin(hints[field.name]) is Literal:
            allowed = get_args(hints[field.name])
            value = getattr(group, field.name)
            require(value in allowed, f"{prefix}{field.name}", f"one of {', '.join(allowed)}", value)
