"""Credit methods: a batch of rollouts in, per-token credit out. One file per method, found by name in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable

from stepcredit._names import nearest
from stepcredit.credit.base import Credit, CreditMethod
from stepcredit.credit.clarify import Clarify
from stepcredit.credit.comam import CoMAM
from stepcredit.credit.distillation import Distillation
from stepcredit.credit.gigpo import GiGPO
from stepcredit.credit.ig_search import IGSearch
from stepcredit.credit.igpo import IGPO
from stepcredit.credit.mr_search import MRSearch
from stepcredit.credit.multi_search import MultiSearch
from stepcredit.credit.pi_play import PiPlay
from stepcredit.credit.sd_search import SDSearch
from stepcredit.credit.search_r1 import SearchR1
from stepcredit.credit.step_search import StepSearch
from stepcredit.credit.tips import TIPS

#: Each makes a method with its default constants.
METHODS: dict[str, Callable[[], CreditMethod]] = {
    "search_r1": SearchR1,
    "ig_search": IGSearch,
    "multi_search": MultiSearch,
    "ig_search_paper": IGSearch.paper,
    "ig_search_code": IGSearch.code,
    "sd_search": SDSearch,
    "pi_play": PiPlay,
    "igpo": IGPO,
    "gigpo": GiGPO,
    "tips": TIPS,
    "step_search": StepSearch,
    "clarify": Clarify,
    "mr_search": MRSearch,
    "comam": CoMAM,
}


def get_method(name: str) -> CreditMethod:
    """The method of this name with its defaults; ValueError with the nearest name when there is none."""
    if name not in METHODS:
        raise ValueError(f"unknown credit method {name!r}, known: {', '.join(METHODS)}{nearest(name, METHODS)}")
    return METHODS[name]()


__all__ = [
    "IGPO",
    "METHODS",
    "TIPS",
    "CoMAM",
    "Clarify",
    "Credit",
    "CreditMethod",
    "Distillation",
    "GiGPO",
    "IGSearch",
    "MRSearch",
    "MultiSearch",
    "PiPlay",
    "SDSearch",
    "SearchR1",
    "StepSearch",
    "get_method",
]
