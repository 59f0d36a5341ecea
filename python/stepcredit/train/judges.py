"""Judges of profiles: how well a text says what holds of a user."""

from __future__ import annotations

import importlib
import math
from collections.abc import Callable, Sequence
from typing import Any

from stepcredit.data.conversations import Conversation, MemoryQuestion
from stepcredit.rewards import facts_stated

#: Called with N profiles, "" where an agent wrote none, and their N conversations; gives N scores in [0, 1].
Judge = Callable[[Sequence[str], Sequence[Conversation]], Sequence[float]]


def facts(profiles: Sequence[str], conversations: Sequence[Conversation]) -> list[float]:
    """The default, deterministic: share of the conversation's facts that the profile states
    (`stepcredit.rewards.facts_stated`). Ours; the paper asks a frozen language model with a rubric."""
    return [facts_stated(text, c.facts) for text, c in zip(profiles, conversations, strict=True)]


def load_judge(name: str) -> Judge:
    """The judge of this name: "facts", or "module:function" of the user's own.

    The module is imported: its code runs with your rights, also when `--resume DIR` reads the name from that
    directory's `config.json`; name only modules you trust.

    Raises:
        ValueError: not such a name, or the module has no such function.
        ImportError: there is no such module.
    """
    if name == "facts":
        return facts
    module, colon, function = name.partition(":")
    if not (module and colon and function):
        raise ValueError(f"memory.judge must be 'facts' or 'module:function', got {name!r}")
    judge = getattr(importlib.import_module(module), function, None)
    if not callable(judge):
        raise ValueError(f"memory.judge: module {module!r} has no function {function!r}")
    found: Judge = judge
    return found


def check_facts(judge: Judge, questions: Sequence[MemoryQuestion]) -> None:
    """ValueError if the default judge would have nothing to go by; the message names the conversation."""
    bare = next((q.conversation for q in questions if not q.conversation.facts), None)
    if judge is facts and bare is not None:
        raise ValueError(
            f"memory.judge=facts needs facts, which conversation {bare.id!r} does not have: give them, or a judge of "
            "your own as memory.judge=module:function"
        )


def judged(judge: Judge, profiles: Sequence[str], conversations: Sequence[Conversation]) -> list[float]:
    """The judge's scores; ValueError when they are no list of numbers or not as many as the profiles, or one is not in
    [0, 1]."""
    given: Any = judge(profiles, conversations)
    try:
        if isinstance(given, str | dict):  # whose items might pass for numbers
            raise TypeError
        scores = [float(score) for score in given]
    except (TypeError, ValueError):
        raise ValueError(f"memory.judge gave {given!r:.80}, not a list of scores") from None
    if len(scores) != len(profiles):
        raise ValueError(f"the judge gave {len(scores)} scores for {len(profiles)} profiles")
    for score, conversation in zip(scores, conversations, strict=True):
        if not (math.isfinite(score) and 0 <= score <= 1):
            raise ValueError(f"the judge's score of conversation {conversation.id!r} must be in [0, 1], got {score}")
    return scores
