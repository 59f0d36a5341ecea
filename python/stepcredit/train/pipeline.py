"""Trajectories through the memory pipeline: who acts on what, and what each agent earns."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from statistics import fmean
from typing import TYPE_CHECKING

from stepcredit.data.conversations import MemoryQuestion
from stepcredit.environments.memory import (
    AGENTS,
    AgentTask,
    extraction_task,
    profile_task,
    read_memory,
    retrieval_task,
)
from stepcredit.evaluate import summarize
from stepcredit.retrieval import Passage
from stepcredit.rewards import chosen_option, closed_answer, coverage, exact_match
from stepcredit.rollout import Rollout
from stepcredit.train.judges import Judge, judged

if TYPE_CHECKING:
    from stepcredit.train.config import MemoryConfig

#: An agent at work: its name, N tasks, and how many rollouts of each; gives them task by task.
Act = Callable[[str, Sequence[AgentTask], int], Sequence[Rollout]]

#: Something about an agent's prompt: the agent's name and its task.
Check = Callable[[str, AgentTask], bool]


@dataclass(slots=True)
class Trajectory:
    """One way through the pipeline.

    Attributes:
        question: what was asked in the end.
        rollouts: what each agent did, by its name.
        memory: the fine memory, one entry for each message kept.
        profile: the coarse memory.
    """

    question: MemoryQuestion
    rollouts: dict[str, Rollout] = field(default_factory=dict)
    memory: list[Passage] = field(default_factory=list)
    profile: str = ""


def run_pipeline(
    act: Act,
    questions: Sequence[MemoryQuestion],
    *,
    group_size: int = 1,
    fits: Check = lambda name, task: True,
    special: Check = lambda name, task: False,
) -> list[Trajectory]:
    """`group_size` trajectories of every question, question by question; the agents act one after the other.

    An agent that wrote nothing in its tags leaves an empty memory or profile, and the next acts on that. Entries and
    lines that hold the text of a special token are left out of the next agent's prompt (counted as "special_entries"
    and "special_lines"). Where it then does not fit, the oldest entries of the memory, or the last lines of the
    profile, are left out of it one by one (counted as "dropped_entries" and "dropped_lines"). All entries can still be
    searched. Each rollout gets its agent's name and its question's number as `group`. The answer of a question with
    options becomes the text of the option that it chooses; one that chooses none is counted as "unreadable_answers".

    Args:
        act: what the agents are: engines, or scripts.
        questions: Q questions.
        group_size: trajectories of each.
        fits: whether a task's prompt leaves room for what its agent writes.
        special: whether a task's prompt would feed what it shows as a special token of its agent's tokenizer.
    """
    trajectories = [Trajectory(question) for question in questions for _ in range(group_size)]

    def step(name: str, tasks: Sequence[AgentTask], each: int) -> None:
        rollouts = act(name, tasks, each)
        for number, (trajectory, rollout) in enumerate(zip(trajectories, rollouts, strict=True)):
            rollout.agent, rollout.group = name, number // group_size
            trajectory.rollouts[name] = rollout

    step("extraction", [extraction_task(question) for question in questions], group_size)
    for t in trajectories:
        rollout = t.rollouts["extraction"]
        t.memory, counts = read_memory(rollout.answer, t.question.conversation)
        rollout.counts = dict(Counter(rollout.counts) + Counter(counts))

    tasks, dropped = [], []
    for t in trajectories:
        entries = [entry for entry in t.memory if not special("profile", profile_task(t.question, [entry]))]
        shown = list(entries)
        while not fits("profile", task := profile_task(t.question, shown)) and shown:
            shown.pop(0)
        tasks.append(task)
        dropped.append({"special_entries": len(t.memory) - len(entries), "dropped_entries": len(entries) - len(shown)})
    step("profile", tasks, 1)
    _count(trajectories, "profile", dropped)

    tasks, dropped = [], []
    for t in trajectories:
        t.profile = t.rollouts["profile"].answer or ""
        written = t.profile.splitlines()
        plain = [line for line in written if not special("retrieval", retrieval_task(t.question, (), line))]
        lines = list(plain)
        while not fits("retrieval", task := retrieval_task(t.question, t.memory, "\n".join(lines))) and lines:
            lines.pop()
        tasks.append(task)
        dropped.append({"special_lines": len(written) - len(plain), "dropped_lines": len(plain) - len(lines)})
    step("retrieval", tasks, 1)
    _count(trajectories, "retrieval", dropped)
    unreadable = []
    for t in trajectories:
        rollout, options = t.rollouts["retrieval"], t.question.options
        chosen = chosen_option(rollout.answer, options)
        if chosen is not None:
            rollout.answer = options[chosen]
        unreadable.append({"unreadable_answers": int(bool(options and rollout.answer) and chosen is None)})
    _count(trajectories, "retrieval", unreadable)
    return trajectories


def assign_pipeline_rewards(trajectories: Sequence[Trajectory], settings: MemoryConfig, judge: Judge) -> None:
    """Fill the rewards of all rollouts: "local", the agent's own; of the extraction agent "coverage", the share of the
    evidence that it kept; and "total", the pipeline's, which all agents of a trajectory share.

    * extraction: `coverage` of the evidence by the messages kept;
    * profile: the judge's score;
    * retrieval: `coverage` of the evidence by the entries that its searches showed;
    * total: 1 if the answer is right (exact match with a gold answer), else 0.

    Source: CoMAM (arXiv 2603.12631).
    """
    scores = judged(judge, [t.profile for t in trajectories], [t.question.conversation for t in trajectories])
    for t, score in zip(trajectories, scores, strict=True):
        evidence = t.question.supporting
        kept = [entry.id for entry in t.memory]
        shown = [name for search in t.rollouts["retrieval"].searches for name in search.passage_ids]
        parts: dict[str, dict[str, float]] = {
            "extraction": {
                "local": coverage(kept, evidence, settings.extraction_alpha),
                "coverage": coverage(kept, evidence, 1.0),
            },
            "profile": {"local": score},
            "retrieval": {"local": settings.retrieval_scale * coverage(shown, evidence, settings.retrieval_alpha)},
        }
        right = exact_match(t.rollouts["retrieval"].answer, t.question.answers)
        for name, rollout in t.rollouts.items():
            rollout.rewards = {**parts[name], "total": right}


def pipeline_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """What became of trajectories, by the names of `train.metrics.GLOSSARY`: `summarize` of the retrieval agent's
    rollouts, with the counts of all agents; `local_<agent>` of each agent, and `finished_<agent>` of the other two; and
    `coverage` and `entries` of the fine memory."""
    by_agent = {name: [t.rollouts[name] for t in trajectories] for name in AGENTS}
    metrics = summarize(by_agent["retrieval"])
    for name in ("extraction", "profile"):
        metrics[f"finished_{name}"] = fmean(map(closed_answer, by_agent[name]))
        for rollout in by_agent[name]:
            for what, number in rollout.counts.items():
                metrics[f"count_{what}"] = metrics.get(f"count_{what}", 0.0) + number
    for name, rollouts in by_agent.items():
        metrics[f"local_{name}"] = fmean(rollout.rewards["local"] for rollout in rollouts)
    metrics["coverage"] = fmean(rollout.rewards["coverage"] for rollout in by_agent["extraction"])
    metrics["entries"] = fmean(len(t.memory) for t in trajectories)
    return metrics


def sampled_metrics(trajectories: Sequence[Trajectory]) -> dict[str, float]:
    """Means over the rollouts of all agents: `policy_tokens`, `length` and `entropy`; and of the pipeline's reward."""
    rollouts = [rollout for t in trajectories for rollout in t.rollouts.values()]
    rewards = [t.rollouts["retrieval"].reward for t in trajectories]
    drawn = [lp for rollout in rollouts for lp in rollout.logprobs if not math.isnan(lp)]
    return {
        "reward": fmean(rewards),
        "groups": float(len({t.rollouts["retrieval"].group for t in trajectories})),
        "policy_tokens": fmean(sum(s.stop - s.start for s in r.spans if s.by_policy) for r in rollouts),
        "length": fmean(len(r.tokens) for r in rollouts),
        "entropy": -fmean(drawn),
    }


def _count(trajectories: Sequence[Trajectory], name: str, counts: Sequence[Mapping[str, int]]) -> None:
    for t, count in zip(trajectories, counts, strict=True):
        rollout = t.rollouts[name]
        rollout.counts = dict(Counter(rollout.counts) + Counter(count))
