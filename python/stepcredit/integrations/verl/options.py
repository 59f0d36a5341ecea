"""What a run of verl tells StepCredit: the fields under `stepcredit` of its configuration."""

from __future__ import annotations

import importlib
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, TypeVar

from omegaconf import DictConfig, OmegaConf

from stepcredit._names import nearest
from stepcredit._validate import require
from stepcredit.credit import IGSearch
from stepcredit.environments.search import SearchEnvironment
from stepcredit.protocol import get_protocol
from stepcredit.retrieval import Retriever
from stepcredit.train.rewards import RewardWeights

T = TypeVar("T")


@dataclass(frozen=True, kw_only=True, slots=True)
class Options:
    """The fields under `stepcredit`, set on verl's command line as `+stepcredit.credit.alpha=0.3`.

    Attributes:
        protocol: tag grammar, "search_r1" or "refine".
        retriever: "package.module:function", called without arguments once in each process that searches; it returns a
            `Retriever`. Only the agent loop needs it.
        environment: options of `SearchEnvironment`: top_k, max_searches, passage_words, force_answer, max_invalid,
            skip_shown.
        credit: fields of `IGSearch`. Those of the outcome advantage (eps, ddof, scale, singleton) are not read: verl
            computes that one.
        rewards: fields of `RewardWeights`, for the reward manager.
    """

    protocol: str = "search_r1"
    retriever: str = ""
    environment: tuple[tuple[str, Any], ...] = ()
    credit: IGSearch = field(default_factory=IGSearch)
    rewards: RewardWeights = field(default_factory=RewardWeights)

    def __post_init__(self) -> None:
        get_protocol(self.protocol)
        episodes = dict(self.environment).get("episodes", 1)
        require(episodes == 1, "stepcredit.environment.episodes", "1, as the agent loop plays one", episodes)

    def make_environment(self) -> SearchEnvironment:
        """The environment, with this process's retriever.

        Raises:
            ValueError: `retriever` does not say where to find one.
            TypeError: what it returned is no retriever.
        """
        return SearchEnvironment(_retriever(self.retriever), get_protocol(self.protocol), **dict(self.environment))


def read_options(config: DictConfig) -> Options:
    """The options of a run's whole configuration.

    Raises:
        ValueError: an unknown field (with the nearest one), or a value out of range.
    """
    section = config.get("stepcredit")
    given = {} if section is None else OmegaConf.to_container(section, resolve=True)
    if not isinstance(given, dict):
        raise ValueError(f"stepcredit must hold fields, got {given!r}")
    values: dict[str, Any] = {str(name): value for name, value in given.items()}
    _check_names(Options, "stepcredit.", values)
    environment = values.get("environment", {})
    _check_names(SearchEnvironment, "stepcredit.environment.", environment)
    values["environment"] = tuple(sorted(environment.items()))
    for name, make in (("credit", IGSearch), ("rewards", RewardWeights)):
        values[name] = _build(make, f"stepcredit.{name}.", values.get(name, {}))
    return Options(**values)


@cache
def _retriever(path: str) -> Retriever:
    module, _, name = path.partition(":")
    if not module or not name:
        raise ValueError(f"stepcredit.retriever must be 'package.module:function', got {path!r}")
    made = getattr(importlib.import_module(module), name)()
    if not isinstance(made, Retriever):
        raise TypeError(
            f"stepcredit.retriever={path!r} returned {type(made).__name__}, which has no search(queries, k)"
        )
    return made


def _build(make: Callable[..., T], prefix: str, values: Mapping[str, Any]) -> T:
    _check_names(make, prefix, values)
    return make(**values)


def _check_names(make: Callable[..., Any], prefix: str, values: Any) -> None:
    """Every name is that of a keyword of `make`."""
    if not isinstance(values, Mapping):
        raise ValueError(f"{prefix.rstrip('.')} must hold fields, got {values!r}")
    parameters = inspect.signature(make).parameters.values()
    known = [p.name for p in parameters if p.kind is inspect.Parameter.KEYWORD_ONLY]
    for name in values:
        if name not in known:
            raise ValueError(f"unknown field {prefix}{name}{nearest(name, known)}")
