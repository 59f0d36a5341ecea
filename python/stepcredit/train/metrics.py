"""What a run logs: names and meanings, outcome metrics of rollouts, timing, and the metrics file."""

from __future__ import annotations

import json
import math
import time
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import fmean

from stepcredit.data import Dataset
from stepcredit.evaluate import summarize
from stepcredit.rollout import Rollout

#: Phases whose lines are GRPO steps.
STEP_PHASES = ("grpo", "examiner", "skipped")

#: Every name in `metrics.jsonl` and what it means; `<name>` stands for one of several.
GLOSSARY: dict[str, str] = {
    "phase": 'what the line is about: "data" (once, first), "warm_start", "evaluation" or "grpo"; in self-play also '
    '"examiner", a GRPO step of the examiner, and "skipped", one of the student for which there was no question',
    "data_passages": "passages of the corpus",
    "data_train, data_dev, data_test": "questions of each split",
    "data_without_plan": "training questions without a plan, which a warm start that needs plans leaves out",
    "data_<name>": "what the loader left out or changed: other_dataset, dev_moved_to_test; or counted: conversations",
    "step": "step of that phase, from 1; for an evaluation the GRPO steps done",
    "when": 'of an evaluation: "before" or "after" the GRPO steps',
    "greedy_<name>, sampled_<name>": "of an evaluation: <name>, below, over greedy or sampled rollouts",
    "rollouts": "rollouts the means of this line are over",
    "reward": "mean total reward",
    "reward_<part>": "mean of one part of the reward, before its weight",
    "reward_std": "mean over groups of the standard deviation of the total reward within a group",
    "groups": "groups of rollouts of one question",
    "em": "share of rollouts whose answer matches a gold answer exactly (0 without an answer)",
    "f1": "mean token F1 of the answer against the best gold answer",
    "hit": "mean share of a question's supporting passages that were shown",
    "any_hit": "share of rollouts that were shown at least one supporting passage",
    "em_<kind>, f1_<kind>, hit_<kind>": "the same over questions of one kind",
    "em_episode_<n>": "em of the answers that rollouts of several episodes had after n of them",
    "without_supporting": "rollouts without known supporting passages, left out of hit and any_hit",
    "finished": "share of rollouts that closed their answer",
    "finish_<reason>": "rollouts that ended answered, unclosed (no closed answer) or at the end of the context",
    "searches": "executed searches per rollout",
    "count_<name>": "events over all rollouts: invalid_turns, empty_queries, empty_answers, forged_tags (environment "
    "tags typed by the policy), failed_retrievals, empty_results, excess_searches, forced_answers, cut_passages "
    "(passages that lost words), skipped_passages (left out as the rollout had been shown them), repeated_queries and "
    "dropped_queries (of a search's several, the same again and beyond the limit), duplicate_passages (found by "
    "several of them); in scenes empty_questions, excess_questions, unclear_questions, refused_questions and "
    "foreign_questions (not understood, for the region itself, about nothing in the scene), unreadable_answers; of a "
    "memory pipeline malformed_entries, unknown_messages and repeated_messages (lines of the extraction agent that are "
    "no entry, name no message or one again), special_entries and special_lines (left out of a prompt because they "
    "hold the text of a special token), dropped_entries and dropped_lines (left out of one that would not fit), "
    "unreadable_answers (that choose none of the options), and in its warm start long_scripts (rollouts in which a "
    "script wrote more than its agent may in a turn)",
    "policy_tokens": "tokens the policy wrote, per rollout",
    "length": "tokens per rollout, prompt and environment included",
    "entropy": "mean negative log-prob of the sampled tokens, nats: an estimate of the policy's entropy",
    "loss": "policy loss (GRPO, without a distillation) or negative log-likelihood per policy token (warm start), nats",
    "kl": "estimated KL to the reference policy, nats per token; 0 where none is kept",
    "clip_fraction": "share of policy tokens whose gradient the clipped surrogate removed",
    "grad_norm": "global norm of the gradient before clipping",
    "logprob_gap": "mean absolute difference of a token's log-prob in training and in sampling, nats",
    "old_logprob_gap": "the same between training and the pass over old log-probs, where there is one",
    "skipped_zero_advantage": "rollouts not run in the update because none of their tokens has an advantage or a "
    "teacher",
    "optimizer_steps": "optimizer steps of this update; 0 when no token had an advantage or a teacher",
    "learning_rate": "of this step",
    "advantage/zero_variance_groups": "share of groups whose rollouts all have the same reward: no outcome signal",
    "advantage/outcome_abs_mean": "mean absolute outcome advantage of policy tokens",
    "advantage/bonus_abs_mean": "mean absolute step credit beside the outcome's: of the query tokens of scored steps "
    "(ig_search), of the tokens on which it is placed (tips, step_search, clarify), or of all policy tokens (igpo, "
    "gigpo)",
    "ig/gain_mean, ig/gain_std": "information gain of the scored search steps, before centring, nats per answer token",
    "ig/positive_share": "share of the scored steps whose gain is above 0",
    "ig/real_mean, ig/baseline_mean": "mean score of the gold answer under the real and the counterfactual passages",
    "igpo/turns, gigpo/turns": "turns of the policy: all it wrote between two messages of the environment",
    "gigpo/states": "anchor states: turns of a group that saw the same or a similar observation share one",
    "gigpo/shared, gigpo/shared_later": "share of the turns that share their state, and of those after the first",
    "tips/potential": "mean potential after the scored searches: log-sum-exp over gold answers of the teacher's score",
    "tips/shaping, tips/positive_share": "mean change of the potential at a search, nats, and share of those above 0",
    "step_search/gain, step_search/redundancy": "mean share of the gold passages that a search showed first, and of "
    "its passages that were shown before",
    "step_search/steps, step_search/scored": "search steps, and those with a value",
    "step_search/unscored_<reason>": "search steps without one: no_supporting (gold passages unknown), no_record (of "
    "what was shown), failed_retrieval",
    "ig/steps, ig/scored": "search steps, and those whose gain was measured",
    "ig/unscored_<reason>": "search steps whose gain was not measured, by reason",
    "ig/truncated": "search steps whose contexts were cut on their left to fit",
    "ig/empty_answers": "gold answers of search steps that were left out because they have no tokens",
    "ig/no_query": "passages of searches whose query has no tokens: no steps, neither scored nor drawn",
    "ig/audit_difference": "first step of a run that scores a search: largest difference of a packed score to a "
    "separate forward, nats",
    "ig/pool_<name>": "counterfactual passages: size of the pool, steps that fell back to the whole batch or repeated",
    "ig/tokens_<part>": "tokens forwarded for the gain: trunk, real leaves, counterfactual leaves",
    "ig/seconds": "seconds of the counterfactual scoring",
    "sd/weight": "sd_search: coefficient of the distillation loss; 0 in the warm-up, when no teacher is run",
    "sd/loss": "mean over rollouts of the mean divergence of a rollout's query tokens from the teacher's, nats",
    "sd/teacher_entropy, sd/student_entropy": "mean entropy at the distilled tokens of the teacher, who has hindsight, "
    "and of the policy in the update, nats",
    "sd/tail": "mean probability that the teacher gives to tokens beyond its likeliest credit.top_k",
    "sd/tokens_distilled": "query tokens with a teacher",
    "sd/groups_without_contrast": "share of groups whose rollouts are all correct or all incorrect",
    "sd/rollouts_without_block, sd/too_long": "rollouts with queries but without a teacher: their hindsight block is "
    "empty, or does not fit into the context with them",
    "sd/tokens_teacher, sd/seconds": "tokens run through the teacher, and seconds of that",
    "mr_search/episodes": "mean number of episodes of a rollout",
    "mr_search/reward_<n>": "mean reward of the n-th episode, of the rollouts that have one",
    "mr_search/improved, mr_search/worsened": "share of rollouts of several episodes whose last reward is above, or "
    "below, that of their first",
    "mr_search/ended_early": "rollouts that have fewer episodes than another of the batch",
    "mr_search/alone": "episodes without another of their number and group to be compared with",
    "pi_play/weight": "pi_play: coefficient of the distillation loss",
    "pi_play/loss": "mean over rollouts of the mean reverse KL of a rollout's policy tokens to the teacher, who knows "
    "how the question was written, nats (credit.divergence may be another)",
    "pi_play/teacher_entropy, pi_play/student_entropy, pi_play/tail": "as for sd_search",
    "pi_play/tokens_distilled": "policy tokens with a teacher",
    "pi_play/without_path, pi_play/too_long": "rollouts without a teacher: their question has no construction path, or "
    "they do not fit into the context with it",
    "pi_play/tokens_teacher, pi_play/seconds": "tokens run through the teacher, and seconds of that",
    "pi_play/ema_distance": "L2 distance of the policy's weights to the teacher's average after a student step, over "
    "the norm of the policy's",
    "pi_play/iteration": "iteration of self-play, from 1",
    "pi_play/questions": "questions that the student has in this iteration so far",
    "pi_play/accepted": "of an examiner step: walks whose question was accepted",
    "pi_play/rejected_<reason>": "walks whose question was rejected: format, no_search (none showed a passage), "
    "unsupported (the answer stands in no passage that was shown), leaks (it stands in the question), duplicate",
    "pi_play/success": "mean share of the student's attempts at an accepted question that are right",
    "pi_play/success_<k>_of_<n>": "accepted questions at which k of n attempts of the student are right",
    "multi_search/queries": "mean number of queries of a search",
    "multi_search/several_share": "share of rollouts whose searches hold more than two queries on average",
    "multi_search/merged_share": "share of searches whose passages the policy merged",
    "multi_search/constant_<reward>": "share of groups in which that reward tells no rollout from another",
    "multi_search/missing_rewards": "rewards that a rollout does not have, left out of its group's statistics",
    "clarify/iou, clarify/iou_<kind>": "in scenes: mean mask IoU of the region named and the one meant, 0 without an "
    "answer; of questions of one kind",
    "clarify/right, clarify/right_asked, clarify/right_guessed": "share of rollouts whose IoU is at least 0.5; of "
    "those that asked a question, of those that did not",
    "clarify/questions": "questions per rollout that the user replied to",
    "clarify/bits, clarify/idle": "mean bits of a question, log2 of the candidates before over those after the reply; "
    "share of the questions that told nothing",
    "clarify/share": "how much of an advantage the teacher decides; 0 when none is run",
    "clarify/turn_value": "mean value of a question: the share of the ambiguity that it resolved, less credit.cost",
    "clarify/teacher_gap": "mean of a token's log-prob under the teacher, who is told what is meant, less the policy's",
    "clarify/weight, clarify/clipped": "mean weight of an advantage, and share of the tokens whose ratio is clipped",
    "clarify/too_long": "rollouts that the teacher did not weigh: they do not fit the context with what it is told",
    "clarify/tokens_teacher, clarify/seconds": "tokens run through teacher and policy for it, and seconds of that",
    "comam/reward_<agent>": "comam: mean local reward of an agent: local_<agent> of the step",
    "comam/ndcg_<agent>": "mean NDCG of ranking an input's trajectories by that reward against the pipeline's reward",
    "comam/weight_<agent>": "mean weight of the pipeline's reward in the agent's; the agents' sum to 1",
    "comam/advantage_<agent>": "mean absolute advantage of the agent's tokens",
    "comam/all_wrong": "share of inputs of which no trajectory is right: there every NDCG is 1, and weights are equal",
    "local_<agent>, finished_<agent>": "of a memory pipeline: mean local reward of an agent, and share of its rollouts "
    "that closed their text; finished is the retrieval agent's",
    "coverage, entries": "mean share of the evidence that the extraction agent kept, and messages it kept a trajectory",
    "loss_<agent>, grad_norm_<agent>": "of a memory pipeline: those of one agent; without a name their means",
    "tokens_rollout, tokens_credit, tokens_update": "tokens_forwarded of a GRPO step by part",
    "tokens_forwarded": "real (not padding) tokens run forward through the model, without an audit's separate forwards",
    "seconds": "wall-clock seconds of this line's step",
    "seconds_rollout": "of which sampling rollouts, retrieval included",
    "seconds_retrieval": "of which waiting for the retriever",
    "seconds_credit": "of which computing credit: for ig_search the counterfactual scoring, and its first audit",
    "ig_seconds_share": "share of the step's time spent on counterfactual scoring, with the old log-probs it gives",
    "seconds_update": "of which forward, backward and optimizer",
}


class Clock:
    """Adds up wall-clock seconds by name: `with clock("update"): ...`."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = defaultdict(float)
        self._start = time.perf_counter()

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[name] += time.perf_counter() - start

    @property
    def total(self) -> float:
        """Seconds since the clock was made."""
        return time.perf_counter() - self._start


class MetricsLog:
    """Appends one JSON object per line to a file, flushed line by line."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def write(self, metrics: Mapping[str, float | str]) -> None:
        """Append a line. What is not a finite number (nothing was measured) becomes null."""
        line = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in metrics.items()}
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")

    def read(self) -> list[dict[str, float | str]]:
        return [json.loads(line) for line in self.path.read_text(encoding="utf-8").splitlines()]

    def drop_after(self, step: int) -> None:
        """Drop what was logged after GRPO step `step`: a resumed run logs those steps again."""
        late = [m for m in self.read() if m["phase"] in STEP_PHASES and int(m["step"]) > step]
        kept = [m for m in self.read() if m not in late and m.get("when") != "after"]
        self.path.write_text("".join(json.dumps(m) + "\n" for m in kept), encoding="utf-8")


def data_metrics(dataset: Dataset) -> dict[str, float]:
    """The size of a data set, and what its loader counted."""
    sizes = {name: len(getattr(dataset, name)) for name in ("passages", "train", "dev", "test")}
    unplanned = sum(not question.plan for question in dataset.train)
    return {f"data_{name}": float(n) for name, n in (sizes | {"without_plan": unplanned} | dataset.counts).items()}


def outcome_metrics(rollouts: Sequence[Rollout]) -> dict[str, float]:
    """Rewards, answer quality, searches and counts of one step's rollouts, by the names of `GLOSSARY`."""
    groups: dict[int, list[float]] = defaultdict(list)
    for rollout in rollouts:
        groups[rollout.group].append(rollout.reward)
    parts = [name for name in rollouts[0].rewards if name != "total"]
    policy = [sum(s.stop - s.start for s in r.spans if s.by_policy) for r in rollouts]
    sampled = [lp for r in rollouts for lp in r.logprobs if lp == lp]
    return {
        "reward": fmean(r.reward for r in rollouts),
        "reward_std": fmean(_std(group) for group in groups.values()),
        **{f"reward_{name}": fmean(r.rewards[name] for r in rollouts) for name in parts},
        "groups": float(len(groups)),
        **summarize(rollouts),
        "policy_tokens": fmean(policy),
        "length": fmean(len(r.tokens) for r in rollouts),
        "entropy": -fmean(sampled),
    }


def _std(values: Sequence[float]) -> float:
    mean = fmean(values)
    return fmean((v - mean) ** 2 for v in values) ** 0.5


def documented(name: str, known: Mapping[str, str] = GLOSSARY) -> bool:
    """Whether a logged name is in the glossary, directly or by a pattern such as "finish_<reason>"."""
    patterns = [part.strip() for key in known for part in key.split(",")]
    stems = [pattern.partition("<")[0] for pattern in patterns if "<" in pattern]
    return name in patterns or any(name.startswith(stem) for stem in stems)
