"""The token trees of a batch: one for each question, in which its rollouts share every prefix they have in common."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from stepcredit.branches.contexts import Branches, Trunk, attach
from stepcredit.branches.draws import StepId
from stepcredit.branches.packing import TokenTree
from stepcredit.rollout import Rollout

#: Of one rollout (index in the batch) the steps to score and the runs of its own tokens to read.
Part = tuple[int, tuple[int, ...], tuple[tuple[int, int], ...]]


@dataclass(slots=True)
class Forest:
    """Trees, and where in the scorer's output the log-probs lie that were asked for, as (start, stop).

    Attributes:
        trees: in the order in which the scorer is to be given them.
        steps: for each scored step its contexts, the real one first; for each context a place per gold answer.
        policy: for each rollout (index in the batch) a place per run of its tokens that was asked for.
        tokens: stored tokens: of "trunk", "real" leaves and "counterfactual" leaves.
    """

    trees: list[TokenTree] = field(default_factory=list)
    steps: dict[StepId, list[list[tuple[int, int]]]] = field(default_factory=dict)
    policy: dict[int, list[tuple[int, int]]] = field(default_factory=dict)
    tokens: Counter[str] = field(default_factory=lambda: Counter(trunk=0, real=0, counterfactual=0))


def plant(
    rollouts: Sequence[Rollout],
    trunks: Sequence[Trunk],
    branches: Mapping[StepId, Branches],
    *,
    runs: Mapping[int, Sequence[tuple[int, int]]],
    temperature: float,
    max_tokens: int,
) -> Forest:
    """The trees of a batch.

    Args:
        rollouts: of the batch.
        trunks: theirs.
        branches: the contexts of every step to score.
        runs: for rollouts (index in the batch) whose own tokens are read too, their (start, stop).
        temperature: at which these are read.
        max_tokens: a question whose tree is larger gets several, down to one for each step.
    """
    questions: dict[str, list[Part]] = defaultdict(list)
    for b, rollout in enumerate(rollouts):
        part = (b, tuple(t for t in sorted(trunks[b].steps) if (b, t) in branches), tuple(runs.get(b, ())))
        if part[1] or part[2]:
            questions[rollout.question.id].append(part)

    forest, at = Forest(), 0
    # Sorted by tokens, rollouts that share most stay together when a tree must be split.
    waiting = [sorted(parts, key=lambda part: trunks[part[0]].tokens) for parts in questions.values()][::-1]
    while waiting:
        parts = waiting.pop()
        tree, steps, policy, tokens = _grow(rollouts, trunks, branches, parts, temperature)
        if tree.num_tokens > max_tokens and (halves := _halve(parts)):
            waiting += halves[::-1]
            continue
        places = []
        for read in tree.reads:
            places.append((at, at + len(read.targets)))
            at += len(read.targets)
        forest.trees.append(tree)
        forest.steps |= {key: [[places[read] for read in context] for context in steps[key]] for key in steps}
        for b, reads in policy.items():
            forest.policy[b] = [places[read] for read in reads]
        forest.tokens.update(tokens)
    return forest


def _halve(parts: Sequence[Part]) -> list[list[Part]]:
    """Two halves of the rollouts; of one rollout, of its steps; nothing when there is one step."""
    half = len(parts) // 2
    if half:
        return [list(parts[:half]), list(parts[half:])]
    b, steps, runs = parts[0]
    half = len(steps) // 2 if len(steps) > 1 else len(steps) if runs else 0
    return [[(b, steps[:half], ())], [(b, steps[half:], runs)]] if half else []


def _grow(
    rollouts: Sequence[Rollout],
    trunks: Sequence[Trunk],
    branches: Mapping[StepId, Branches],
    parts: Sequence[Part],
    temperature: float,
) -> tuple[TokenTree, dict[StepId, list[list[int]]], dict[int, list[int]], dict[str, int]]:
    """One tree of some rollouts of a question, and its reads."""
    tree = TokenTree(f"question {rollouts[parts[0][0]].question.id!r}")
    keys = [(b, t) for b, steps, _ in parts for t in steps]
    policy: dict[int, list[int]] = {}
    for b, _, runs in parts:
        if runs:
            tokens = rollouts[b].tokens
            tip = tree.add_trunk(tokens[: runs[-1][1] - 1])
            policy[b] = [tree.read(tip, start, tokens[start:stop], temperature) for start, stop in runs]
    # The last step of a rollout first: it needs the longest trunk, which so is one segment.
    tips = {(b, t): tree.add_trunk(branches[b, t].trunk(trunks[b].tokens)) for b, t in reversed(keys)}
    trunk = tree.num_tokens
    steps = {key: [attach(tree, tips[key], branches[key].real, branches[key].answers)] for key in keys}
    real = tree.num_tokens
    for key in keys:
        steps[key] += [attach(tree, tips[key], fork, branches[key].answers) for fork in branches[key].others]
    stored = {"trunk": trunk, "real": real - trunk, "counterfactual": tree.num_tokens - real}
    return tree, steps, policy, stored
