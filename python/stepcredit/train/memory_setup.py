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
    writing_environment,
)
from stepcredit.environments.search import SearchEnvironment
from stepcredit.train.agents import Agent, build_agents
from stepcredit.train.config import TrainConfig
from stepcredit.train.judges import Judge, check_facts, load_judge
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.policy import resolve_device, resolve_dtype
from stepcredit.train.progress import Reporter


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
    require(config.loss.kl_coef == 0, "loss.kl_coef", "0 with memory.conversations", config.loss.kl_coef)
    episodes = config.environment.episodes
    require(episodes == 1, "environment.episodes", "1 with memory.conversations", episodes)
    played = config.self_play.examiner_steps
    require(played == 0, "self_play.examiner_steps", "0 with memory.conversations", played)
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    if settings.conversations == "personas":
        dataset = build_conversations(settings.personas)
    else:
        dataset = load_conversations(settings.conversations)
    used = [*dataset.train, *getattr(dataset, config.evaluation.split)]
    for split in ("train", config.evaluation.split):
        if not getattr(dataset, split):
            raise ValueError(f"memory.conversations={settings.conversations!r} has no {split} questions")
    judge = load_judge(settings.judge)
    check_facts(judge, cast(list[MemoryQuestion], used))
    parts = MemoryParts(
        agents=build_agents(config, _texts(dataset), device=device, dtype=dtype),
        dataset=dataset,
        environments={
            "extraction": writing_environment(GRAMMARS["extraction"]),
            "profile": writing_environment(GRAMMARS["profile"]),
            "retrieval": MemoryEnvironment(
                GRAMMARS["retrieval"],
                top_k=config.environment.top_k,
                max_searches=config.environment.max_searches,
                passage_words=config.environment.passage_words,
                force_answer=config.environment.force_answer,
                max_invalid=config.environment.max_invalid,
                skip_shown=config.environment.skip_shown,
            ),
        },
        judge=judge,
        reporter=reporter,
        seconds=time.perf_counter() - started,
    )
    for question in {q.conversation.id: q for q in cast(list[MemoryQuestion], used)}.values():
        if not fits(config, parts, "extraction", extraction_task(question)):
            raise ValueError(
                f"conversation {question.conversation.id!r} does not fit the context of the extraction agent's model, "
                f"{parts.agents['extraction'].engine.max_context} tokens, with memory.extraction_tokens="
                f"{settings.extraction_tokens}: split it, or leave it out"
            )
    return parts


def turn_tokens(config: TrainConfig, name: str) -> int:
    written = {"extraction": config.memory.extraction_tokens, "profile": config.memory.profile_tokens}
    return written.get(name, config.sampling.max_turn_tokens)


def fits(config: TrainConfig, parts: MemoryParts, name: str, task: AgentTask) -> bool:
    """Whether a prompt leaves room for a turn of its agent."""
    agent = parts.agents[name]
    prompt = GRAMMARS[name].prompt(task, agent.tokenizer, config.environment.prompt)
    return len(prompt) + turn_tokens(config, name) <= agent.engine.max_context


def _texts(dataset: Dataset) -> Iterator[str]:
    """What the agents read and write, for training a tokenizer; their tags become tokens of their own."""
    questions = cast(list[MemoryQuestion], dataset.train)
    yield from {q.conversation.id: conversation_text(q.conversation) for q in questions}.values()
    for q in questions:
        yield f"Profile:\nNotes:\n[1] {' '.join(q.plan)}: {q.answers[0]}\nQuestion: {q.text}\nOptions: (a)\n"
    tags = ("memory", "profile", "search", "answer", "information")
    yield from [f"<{tag}> </{tag}>" for tag in tags] * 500
