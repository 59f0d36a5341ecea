"""A hint for names that are nearly right."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


def nearest(name: str, known: Iterable[str]) -> str:
    """ "; did you mean 'x'?", where a name of the same last part ("alpha": "credit.alpha") is nearest; else ""."""
    leaves = {str(k): str(k).rpartition(".")[2] for k in known}
    leaf = name.rpartition(".")[2]
    near = [k for k, last in leaves.items() if last == leaf]
    near = near or difflib.get_close_matches(name, leaves, n=1)
    near = near or [k for k, last in leaves.items() if last in difflib.get_close_matches(leaf, leaves.values(), n=1)]
    return f"; did you mean {near[0]!r}?" if near else ""
