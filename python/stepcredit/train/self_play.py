"""Self-play (pi-Play, arXiv 2604.14054): the policy writes questions as an examiner and answers them as a student.

What an examiner step does: walks, verdicts, attempts of the student at what was accepted, rewards, update. A student
step is a GRPO step on the accepted questions. The loop around both is `train.loop.train`.
"""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace
from statistics import fmean
from typing import Any

import torch

from stepcredit.credit import SearchR1
from stepcredit.credit.base import taught_by_average
from stepcredit.data.walks import scripted_walks
from stepcredit.environments.examiner import EXAMINER, REASONS, ExaminerEnvironment, Verdict, seed_question
from stepcredit.rewards import difficulty_reward, exact_match
from stepcredit.rollout import Question, Rollout
from stepcredit.scorer import PolicyScorer
from stepcredit.train.average import AveragePolicy
from stepcredit.train.checkpoint import State
from stepcredit.train.config import TrainConfig
from stepcredit.train.draws import derive_seed, questions_of_step
from stepcredit.train.engine import HFEngine
from stepcredit.train.loop import learn, train_step, warm_start
from stepcredit.train.metrics import Clock, MetricsLog, outcome_metrics
from stepcredit.train.setup import Parts
from stepcredit.train.warm_start import play


class SelfPlay:
    """The roles of self-play around one policy.

    Args:
        config: of the run.
        parts: of the run; `parts.engine` and `parts.environment` are the student's.

    Attributes:
        engine, environment: the examiner's.
        average: the teacher, where the credit method asks for one.
    """

    def __init__(self, config: TrainConfig, parts: Parts) -> None:
        assert parts.retriever is not None  # `build` refuses what has no passages
        self.config, self.parts, self.retriever = config, parts, parts.retriever
        self.engine = HFEngine(
            parts.model,
            parts.tokenizer,
            EXAMINER,
            prompt_style=config.environment.prompt,
            max_batch=config.sampling.max_batch,
        )
        self.environment = ExaminerEnvironment(
            self.retriever,
            EXAMINER,
            top_k=config.environment.top_k,
            max_searches=config.self_play.max_searches,
            passage_words=config.environment.passage_words,
            max_invalid=config.environment.max_invalid,
            skip_shown=True,  # a walk goes on
        )
        self.average: AveragePolicy | None = None
        if taught_by_average(config.credit):
            self.average = AveragePolicy(parts.scorer, parts.optimizer, config.credit.tau)

    def warm_start(self, state: State, log: MetricsLog) -> None:
        """Supervised steps on demonstrations of both roles, made from the corpus alone; then the average begins."""
        config, parts, settings = self.config, self.parts, self.config.warm_start
        walks = scripted_walks(
            parts.dataset.passages,
            self.retriever,
            settings.steps * settings.batch,
            top_k=config.environment.top_k,
            passage_words=config.environment.passage_words,
            seed=derive_seed(config.seed, "walks"),
        )

        def examiners(step: int) -> list[Rollout]:
            shown = walks[step * settings.batch : (step + 1) * settings.batch]
            rollouts = play(
                [walk.examiner for walk in shown],
                self.environment,
                parts.tokenizer,
                prompt_style=config.environment.prompt,
                max_context=parts.engine.max_context,
            )
            for rollout in rollouts:
                rollout.rewards["total"] = 0.0  # nothing is rewarded in a warm start
            return rollouts

        warm_start(config, parts, state, log, questions=[walk.question for walk in walks], also=examiners)
        if self.average is not None:
            self.average.restart()

    def step(self, state: State, step: int, reference: PolicyScorer | None, *, verify: bool = False) -> dict[str, Any]:
        """GRPO step `step` of the run, of the role whose turn it is; returns its metrics. Arguments as `train_step`."""
        settings = self.config.self_play
        iteration, number = settings.place(step)
        begins = {"pi_play/iteration": float(iteration + 1)}
        if number < settings.examiner_steps:
            return self._examiner_step(state, step, reference) | begins
        return self._student_step(state, step, reference, verify) | begins

    def _examiner_step(self, state: State, step: int, reference: PolicyScorer | None) -> dict[str, Any]:
        config, parts, settings = self.config, self.parts, self.config.self_play
        torch.manual_seed(derive_seed(config.seed, "step", step))
        clock = Clock()
        engines = (self.engine, parts.engine)
        forwarded, waited = sum(engine.tokens_forwarded for engine in engines), parts.seconds_retrieval
        rng = random.Random(derive_seed(config.seed, "seed passages", step))
        passages = parts.dataset.passages
        seeds = [
            seed_question(passages[at], config.environment.passage_words)
            for at in rng.sample(range(len(passages)), min(settings.seeds, len(passages)))
        ]
        sampling = replace(
            config.sampling.build(derive_seed(config.seed, "walks", step)),
            max_answer_tokens=config.sampling.max_turn_tokens,  # an opened question has its answer still to come
        )
        with clock("rollout"), parts.reporter.task("  walks", len(seeds) * settings.walks) as advance:
            walks = self.engine.rollout(
                seeds,
                self.environment,
                sampling,
                group_size=settings.walks,
                progress=advance,
            )
        asked = set(state.asked)
        verdicts = self.environment.verify(walks, parts.tokenizer, asked, f"pi_play:{step + 1}")
        accepted = [verdict.question for verdict in verdicts if verdict.question is not None]
        with clock("rollout"):
            successes = self._attempt(accepted, step)
        self._keep(state, accepted, asked, settings.place(step)[0])
        right = iter(successes)
        for walk, verdict in zip(walks, verdicts, strict=True):
            hard = 0.0
            if verdict.question is not None:
                hard = difficulty_reward(next(right), settings.attempts, settings.difficulty)
            good = float(verdict.question is not None)
            walk.rewards = {"format": good, "difficulty": hard, "total": settings.format * good + hard}
        learnt = learn(
            config,
            parts,
            state,
            step,
            walks,
            clock,
            method=SearchR1(),
            reference=reference,
            tokens_rollout=sum(engine.tokens_forwarded for engine in engines) - forwarded,
            seconds_retrieval=parts.seconds_retrieval - waited,
        )
        # The answers to compare with are those of a seed passage, which has none.
        outcomes = {k: v for k, v in outcome_metrics(walks).items() if k not in ("em", "f1", "without_supporting")}
        return {
            "phase": "examiner",
            "step": step + 1,
            **outcomes,
            **examiner_metrics(verdicts, successes, settings.attempts),
            "pi_play/questions": float(len(state.questions)),
            **learnt,
        }

    def _attempt(self, questions: list[Question], step: int) -> list[int]:
        """How many of the student's attempts at each question are right."""
        config, parts, attempts = self.config, self.parts, self.config.self_play.attempts
        if not questions:
            return []
        with parts.reporter.task("  attempts", len(questions) * attempts) as advance:
            rollouts = parts.engine.rollout(
                questions,
                parts.environment,
                config.sampling.build(derive_seed(config.seed, "attempts", step)),
                group_size=attempts,
                progress=advance,
            )
        right = [exact_match(rollout.answer, rollout.question.answers) for rollout in rollouts]
        return [int(sum(right[first : first + attempts])) for first in range(0, len(right), attempts)]

    @staticmethod
    def _keep(state: State, accepted: list[Question], asked: set[str], iteration: int) -> None:
        """Questions for the student: those of an iteration take the place of the last one's when there are any."""
        if accepted and state.iteration != iteration:
            state.iteration, state.questions = iteration, []
        state.questions += accepted
        state.asked = sorted(asked)

    def _student_step(self, state: State, step: int, reference: PolicyScorer | None, verify: bool) -> dict[str, Any]:
        config, settings = self.config, self.config.self_play
        asked = {"pi_play/questions": float(len(state.questions))}
        if not state.questions:
            return {"phase": "skipped", "step": step + 1, **asked, "tokens_forwarded": 0, "seconds": 0.0}
        iteration, number = settings.place(step)
        chosen = questions_of_step(
            state.questions,
            config.questions_per_step,
            derive_seed(config.seed, "written questions", iteration),
            number - settings.examiner_steps,
        )
        teacher = self.average.scorer if self.average is not None else None
        metrics = train_step(
            config, self.parts, state, step, reference, verify=verify, questions=chosen, average=teacher
        )
        if self.average is not None:
            self.average.update()
            metrics["pi_play/ema_distance"] = self.average.distance()
        return metrics | asked


def examiner_metrics(verdicts: list[Verdict], successes: list[int], attempts: int) -> dict[str, float]:
    """What an examiner step reports of its verdicts, and of the student's `successes` among `attempts` at each accepted
    question: their histogram, and their mean share where there is a question."""
    rejected, histogram = Counter(verdict.reason for verdict in verdicts), Counter(successes)
    return {
        "pi_play/accepted": float(len(successes)),
        **{f"pi_play/rejected_{reason}": float(rejected[reason]) for reason in REASONS},
        **{f"pi_play/success_{k}_of_{attempts}": float(histogram[k]) for k in range(attempts + 1)},
        **({"pi_play/success": fmean(successes) / attempts} if successes else {}),
    }
