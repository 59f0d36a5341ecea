"""The public door to counterfactual scoring: information gain of rollouts, or of texts that another trainer logged."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepcredit.batch import RolloutBatch
from stepcredit.branches.contexts import TrunkMode
from stepcredit.branches.draws import Pool, StepId
from stepcredit.counterfactual import Baseline, StepGains, score_steps
from stepcredit.logs import prompt_name, rollout_from_text, split_text
from stepcredit.protocol import Protocol
from stepcredit.rollout import Question, Rollout
from stepcredit.scorer import PolicyScorer

OP = "score_information_gain"


def score_information_gain(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    rollouts: Sequence[Rollout] | Sequence[str] | Sequence[tuple[str, str]],
    golds: Sequence[str | Sequence[str]] | None = None,
    *,
    protocol: Protocol | str = "refine",
    num_random: int = 3,
    trunk: TrunkMode = "rollout",
    baseline: Baseline = "random",
    pool: Pool = "other_questions",
    head_tokens: int = 0,
    head_weight: float = 1.0,
    max_variants: int = 1,
    question_ids: Sequence[str] | None = None,
    seed: int = 0,
    step: int = 0,
    max_tokens: int = 16384,
    max_context: int | None = None,
    draws: Sequence[Sequence[StepId]] | None = None,
    verify: bool = False,
) -> StepGains:
    """What each search of these rollouts did for the gold answer, as IG-Search measures it.

    For each search, the mean log-prob of the gold answer's tokens after the passages that were found, minus its mean
    over `num_random` contexts that show passages of other questions instead. One call scores a batch: the other
    questions are those of `rollouts`.

    Args:
        model: a Hugging Face causal language model with full or sliding-window attention, on any device and in any
            floating dtype. It is run in evaluation mode without gradients, and left as it was found.
        tokenizer: the model's.
        rollouts: B of one type. `Rollout`: as sampled, token by token; rewards are not looked at. (prompt, response):
            the texts of a log, read as `logs.rollout_from_text` says. str: prompt and response in one, split where the
            tokenizer's chat template opens the reply, else before the first tag of the policy, which is wrong for an
            instruction that holds tags: give pairs then (`logs.split_text`).
        golds: B entries, each a gold answer or several of one meaning, of which the first `max_variants` are scored.
            Texts need them; for `Rollout`s they replace the answers of their questions.
        protocol: tag grammar of the rollouts, or its name ("refine", "search_r1").
        num_random, trunk, baseline, pool, head_tokens, head_weight, max_variants, seed, step, max_tokens, max_context,
            draws, verify: see `counterfactual.score_steps`.
        question_ids: B names; rollouts of one name answer the same question, whose passages are not drawn for each
            other. For `Rollout`s they replace the ids of their questions; texts with equal prompts are one question by
            default.

    Returns:
        StepGains on the CPU, with a row for every search that has query tokens, in order. `gains.rollout` are indices
        into `rollouts`; `draws=gains.draws` replays what was drawn. For texts `counts` also sums the counts of
        `logs.rollout_from_text`.

    Raises:
        TypeError: `rollouts`, `golds` or `question_ids` are of the wrong type, or `rollouts` of several.
        ValueError: nothing to score, wrong lengths, an empty gold answer, an empty prompt, a text that does not show
            where its response begins, an unknown protocol, an option out of range, or a model that cannot be served.
        FloatingPointError: the model's hidden states are not finite; names the question.
        RuntimeError: with `verify`, a score differs from a separate forward pass by more than rounding.

    Source: IG-Search (arXiv 2604.15148), equation 2.
    """
    _check_rollouts(rollouts)
    answers = None if golds is None else _answers(golds, len(rollouts))
    if question_ids is not None:
        _check_column("question_ids", question_ids, len(rollouts))
        for i, name in enumerate(question_ids):
            if not isinstance(name, str):
                raise TypeError(f"{OP}: question_ids[{i}] must be a str, got {name!r}")
    policy = PolicyScorer(model, tokenizer, protocol)
    given = [rollout for rollout in rollouts if isinstance(rollout, Rollout)]
    read: list[Rollout] = []
    if not given:
        if answers is None:
            raise ValueError(f"{OP}: golds is None; texts do not hold their gold answers")
        pairs = _pairs([text for text in rollouts if not isinstance(text, Rollout)], policy)
        read = _read(pairs, answers, question_ids, policy)
    batch = RolloutBatch.pack(read or _override(given, answers, question_ids))
    gains = score_steps(
        batch,
        policy,
        num_random=num_random,
        trunk=trunk,
        baseline=baseline,
        pool=pool,
        head_tokens=head_tokens,
        head_weight=head_weight,
        max_variants=max_variants,
        seed=seed,
        step=step,
        max_tokens=max_tokens,
        max_context=max_context,
        draws=draws,
        verify=verify,
    )
    counts = Counter(gains.counts)
    for rollout in read:
        counts.update(rollout.counts)
    return replace(gains, counts=dict(counts))


def _check_rollouts(rollouts: object) -> None:
    if isinstance(rollouts, str) or not isinstance(rollouts, Sequence):
        raise TypeError(f"{OP}: rollouts must be a sequence of rollouts or texts, got one {type(rollouts).__name__}")
    if not rollouts:
        raise ValueError(f"{OP}: rollouts is empty: nothing to score")
    kinds = [_kind(i, rollout) for i, rollout in enumerate(rollouts)]
    if (other := next((i for i, kind in enumerate(kinds) if kind != kinds[0]), None)) is not None:
        raise TypeError(
            f"{OP}: rollouts must be of one type, but rollouts[0] is a {kinds[0]} and [{other}] a {kinds[other]}"
        )


def _kind(i: int, rollout: object) -> str:
    if isinstance(rollout, Rollout):
        return "Rollout"
    if isinstance(rollout, str):
        return "str"
    if isinstance(rollout, Sequence) and len(rollout) == 2 and all(isinstance(part, str) for part in rollout):
        return "pair of str"
    raise TypeError(f"{OP}: rollouts[{i}] must be a Rollout, a str or a pair (prompt, response), got {rollout!r:.200}")


def _check_column(name: str, column: object, count: int) -> None:
    if isinstance(column, str) or not isinstance(column, Sequence):
        raise TypeError(f"{OP}: {name} must be a sequence, one entry a rollout, got {column!r:.200}")
    if len(column) != count:
        raise ValueError(f"{OP}: {name} has {len(column)} entries for {count} rollouts")


def _answers(golds: Sequence[str | Sequence[str]], count: int) -> list[tuple[str, ...]]:
    _check_column("golds", golds, count)
    answers = []
    for i, gold in enumerate(golds):
        if not isinstance(gold, Sequence) or any(not isinstance(answer, str) for answer in gold):
            raise TypeError(f"{OP}: golds[{i}] must be a str or a sequence of str, got {gold!r}")
        several = (gold,) if isinstance(gold, str) else tuple(gold)
        if not several or any(not answer.strip() for answer in several):
            raise ValueError(f"{OP}: golds[{i}] must hold at least one gold answer and no empty one, got {gold!r}")
        answers.append(several)
    return answers


def _pairs(texts: Sequence[str | tuple[str, str]], policy: PolicyScorer) -> list[tuple[str, str]]:
    """(prompt, response) of every text."""
    pairs = []
    for i, text in enumerate(texts):
        pair = split_text(text, policy.tokenizer, policy.protocol) if isinstance(text, str) else text
        if pair is None:
            raise ValueError(f"{OP}: rollouts[{i}] has no tag of the policy, nor an opened reply: {text!r:.200}")
        if not pair[0].strip():
            raise ValueError(f"{OP}: the prompt of rollouts[{i}] is empty: {text!r:.200}")
        pairs.append((pair[0], pair[1]))
    return pairs


def _read(
    pairs: Sequence[tuple[str, str]],
    answers: Sequence[tuple[str, ...]],
    question_ids: Sequence[str] | None,
    policy: PolicyScorer,
) -> list[Rollout]:
    """The rollouts of these texts."""
    names = question_ids or [prompt_name(prompt) for prompt, _ in pairs]
    groups = {name: group for group, name in enumerate(dict.fromkeys(names))}
    return [
        rollout_from_text(
            Question(name, prompt, gold), prompt, response, policy.tokenizer, policy.protocol, group=groups[name]
        )
        for (prompt, response), gold, name in zip(pairs, answers, names, strict=True)
    ]


def _override(
    rollouts: Sequence[Rollout], answers: Sequence[tuple[str, ...]] | None, question_ids: Sequence[str] | None
) -> list[Rollout]:
    """Copies of the rollouts with these gold answers and question ids, where given, and with a reward: a batch needs
    one, and scoring does not read it."""
    out = []
    for i, rollout in enumerate(rollouts):
        question = rollout.question
        if answers is not None:
            question = replace(question, answers=answers[i])
        if question_ids is not None:
            question = replace(question, id=question_ids[i])
        out.append(replace(rollout, question=question, rewards={"total": float("nan"), **rollout.rewards}))
    return out
