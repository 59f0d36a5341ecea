"""Builds what a run of a memory pipeline consists of from its configuration."""

from __future__ import annotations

import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import cast

from stepcredit._validate import require
from stepcredit.credit import CoMAM
from stepcredit.data import Dataset
from stepcredit.data.conversations import MemoryQuestion, load_conversations
from stepcredit.data.personas import build_conversations
from stepcredit.environments.memory import (
    GRAMMARS,
    AgentTask,
    MemoryEnvironment,
    conversation_text,
    extraction_task,
    profile_task,
    retrieval_task,
    writing_environment,
)
from stepcredit.environments.search import SearchEnvironment
from stepcredit.tokens import special_text
from stepcredit.train.agents import Agent, build_agents
from stepcredit.train.config import TrainConfig
from stepcredit.train.judges import Judge, check_facts, load_judge
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.overrides import as_text, flatten
from stepcredit.train.policy import resolve_device, resolve_dtype
from stepcredit.train.progress import Reporter

#: The setting that says how many tokens an agent may write in a turn.
_TURN_TOKENS = {
    "extraction": "memory.extraction_tokens",
    "profile": "memory.profile_tokens",
    "retrieval": "sampling.max_turn_tokens",
}

#: Settings that no memory pipeline reads: a field, or with a dot at its end a group.
_UNREAD = (
    "data.",
    "rewards.",
    "self_play.",
    "loss.kl_coef",
    "environment.protocol",
    "environment.max_queries",
    "environment.episodes",
    "warm_start.mix.",
    "warm_start.several",
    "warm_start.merged",
)


@dataclass(frozen=True, slots=True)
class MemoryParts:
    """The parts of a run: built once, used by every phase; `seconds` is what building them took."""

    agents: dict[str, Agent]
    dataset: Dataset
    environments: dict[str, SearchEnvironment]
    judge: Judge
    reporter: Reporter
    seconds: float

    @property
    def optimizers(self) -> dict[str, MasterAdamW]:
        """The agents' optimizers by name."""
        return {name: agent.optimizer for name, agent in self.agents.items()}

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that the agents' engines have run through their models."""
        return sum(agent.engine.tokens_forwarded for agent in self.agents.values())


def build_memory(config: TrainConfig, reporter: Reporter) -> MemoryParts:
    """Conversations, judge, agents and environments of a run with `memory.conversations`.

    Raises:
        ValueError, OSError, ImportError: something the user named is wrong or not there; the message says what.
    """
    started = time.perf_counter()
    settings = config.memory
    require(isinstance(config.credit, CoMAM), "credit", "comam with memory.conversations", type(config.credit).__name__)
    require(not config.data.questions, "data.questions", "empty with memory.conversations", config.data.questions)
    _check_unread(config)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    if settings.conversations == "personas":
        dataset = build_conversations(settings.personas)
    else:
        dataset = load_conversations(settings.conversations)
    used = cast(list[MemoryQuestion], [*dataset.train, *getattr(dataset, config.evaluation.split)])
    for split in ("train", config.evaluation.split):
        if not getattr(dataset, split):
            raise ValueError(f"memory.conversations={settings.conversations!r} has no {split} questions")
    judge = load_judge(settings.judge)
    check_facts(judge, used)
    parts = MemoryParts(
        agents=build_agents(config, _texts(dataset), device=device, dtype=dtype),
        dataset=dataset,
        environments={
            "extraction": writing_environment(GRAMMARS["extraction"]),
            "profile": writing_environment(GRAMMARS["profile"]),
            "retrieval": MemoryEnvironment(GRAMMARS["retrieval"], **config.environment.search_options),
        },
        judge=judge,
        reporter=reporter,
        seconds=time.perf_counter() - started,
    )
    for question in {q.conversation.id: q for q in used}.values():
        what = f"conversation {question.conversation.id!r}"
        _check_prompt(config, parts, "extraction", extraction_task(question), what)
    for question in used:
        what = f"question {question.id!r}"
        _check_prompt(config, parts, "profile", profile_task(question, ()), what)
        _check_prompt(config, parts, "retrieval", retrieval_task(question, (), ""), what)
    return parts


def turn_tokens(config: TrainConfig, name: str) -> int:
    """Tokens that an agent may write in a turn."""
    group, _, field = _TURN_TOKENS[name].partition(".")
    return int(getattr(getattr(config, group), field))


def fits(config: TrainConfig, parts: MemoryParts, name: str, task: AgentTask) -> bool:
    """Whether a prompt leaves room for a turn of its agent."""
    agent = parts.agents[name]
    prompt = GRAMMARS[name].prompt(task, agent.tokenizer, config.environment.prompt)
    return len(prompt) + turn_tokens(config, name) <= agent.engine.max_context


def special(config: TrainConfig, parts: MemoryParts, name: str, task: AgentTask) -> str | None:
    """What a prompt would feed as a special token though it is only shown; None where there is nothing. A chat template
    is encoded as one text, and "plain" keeps it text."""
    chat = config.environment.prompt == "chat"
    return special_text(parts.agents[name].tokenizer, task.shown) if chat else None


def _check_unread(config: TrainConfig) -> None:
    """ValueError for the settings that the run would not read and that are not their default. A run may have been
    started before they were refused, so that they are in its `config.json`."""
    settings = config.memory
    unread = dict.fromkeys(_UNREAD, "memory.conversations")
    if settings.conversations != "personas":
        unread["memory.personas."] = "a file as memory.conversations"
    if settings.agents == "models":
        unread |= dict.fromkeys(("memory.rank", "memory.lora_alpha"), "memory.agents=models")
    if settings.models:
        unread["model.name"] = "memory.models"
    defaults = flatten(TrainConfig()) | {"data.questions": ""}
    refused = {}
    for name, given in flatten(config).items():
        for stem, reason in unread.items():
            covered = name == stem or (stem.endswith(".") and name.startswith(stem))
            if covered and given != defaults[name]:
                default = as_text(defaults[name]) or "empty"
                refused[f"{name}={as_text(given)}"] = (
                    f"{name} must be its default, {default}, with {reason}, which does not read it, got {given!r}"
                )
    if refused:
        raise ValueError(
            f"{'; '.join(refused.values())}. Leave out {', '.join(refused)}; where a run is resumed, delete them from "
            "its config.json"
        )


def _check_prompt(config: TrainConfig, parts: MemoryParts, name: str, task: AgentTask, what: str) -> None:
    """ValueError if an agent's prompt cannot be fed, however little the agents before it wrote."""
    if found := special(config, parts, name, task):
        raise ValueError(
            f"{what} holds {found!r}, a special token of the {name} agent's tokenizer, which environment.prompt=chat "
            "would feed as a control token: leave it out, or use plain"
        )
    if not fits(config, parts, name, task):
        raise ValueError(
            f"{what} does not fit the context of the {name} agent's model, {parts.agents[name].engine.max_context} "
            f"tokens, with {_TURN_TOKENS[name]}={turn_tokens(config, name)}: shorten it, or leave it out"
        )


def _texts(dataset: Dataset) -> Iterator[str]:
    """What the agents read and write, for training a tokenizer; their tags become tokens of their own."""
    questions = cast(list[MemoryQuestion], dataset.train)
    yield from {q.conversation.id: conversation_text(q.conversation) for q in questions}.values()
    for q in questions:
        yield f"Profile:\nNotes:\n[1] {' '.join(q.plan)}: {q.answers[0]}\nQuestion: {q.text}\nOptions: (a)\n"
    tags = ("memory", "profile", "search", "answer", "information")
    yield from [f"<{tag}> </{tag}>" for tag in tags] * 500  # more frequent than any word
