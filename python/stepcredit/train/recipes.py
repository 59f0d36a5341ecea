"""Recipes: named configurations to start from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from stepcredit._names import nearest
from stepcredit.credit import Clarify, CoMAM, IGSearch, MRSearch, MultiSearch, PiPlay
from stepcredit.data.demonstrations import DemonstrationMix
from stepcredit.train.config import (
    DataConfig,
    EnvironmentConfig,
    EvaluationConfig,
    ModelConfig,
    SamplingConfig,
    TrainConfig,
    WarmStartConfig,
)
from stepcredit.train.memory_config import MemoryConfig
from stepcredit.train.rewards import RewardWeights
from stepcredit.train.self_play_config import SelfPlayConfig
from stepcredit.train.update_config import OptimizerConfig


def quickstart() -> TrainConfig:
    """SmolLM2-135M learns to search the atlas (countries and cities, one and two hops): minutes on two CPU cores."""
    return TrainConfig(
        recipe="quickstart",
        steps=10,
        questions_per_step=6,
        group_size=8,
        environment=EnvironmentConfig(top_k=1, max_searches=2, passage_words=40),
        sampling=SamplingConfig(max_turn_tokens=48, max_answer_tokens=24),
        # Centred gains must stay centred: scaling the negative half would pay for every extra search again.
        credit=IGSearch(center="batch", negative_scale=1.0),
        optimizer=OptimizerConfig(learning_rate=2e-5),
        warm_start=WarmStartConfig(
            steps=15,
            batch=12,
            learning_rate=1e-4,
            mix=DemonstrationMix(good=0.25, question=0.25, one_hop=0.25, repeat=0.25),
        ),
        evaluation=EvaluationConfig(questions=80),
    )


def smollm2() -> TrainConfig:
    """The same policy on real multi-hop questions and Wikipedia passages; needs data.questions and data.corpus."""
    return TrainConfig(
        recipe="smollm2",
        steps=10,
        questions_per_step=4,
        group_size=8,
        data=DataConfig(questions=""),
        # The next best passage for a query that is repeated: otherwise a second search seldom finds anything.
        environment=EnvironmentConfig(top_k=1, max_searches=2, passage_words=40, skip_shown=True),
        sampling=SamplingConfig(max_turn_tokens=48, max_answer_tokens=24),
        rewards=RewardWeights(f1=0.4, gold_hit=0.4, format=0.4),
        # At the usual alpha a step's bonus is a twentieth of the outcome's advantage here, and too little to see.
        credit=IGSearch(center="batch", negative_scale=1.0, alpha=3.0),
        optimizer=OptimizerConfig(learning_rate=4e-5),
        warm_start=WarmStartConfig(
            steps=15,
            batch=8,
            learning_rate=1e-4,
            # Always two searches, so that the policy keeps to two, and titles of gold passages are not given away:
            # what to search for is left to learn.
            mix=DemonstrationMix(good=0.0, question=0.0, one_hop=0.0, repeat=0.0, fragments=1.0),
        ),
        evaluation=EvaluationConfig(questions=80),
    )


def multi_search() -> TrainConfig:
    """SmolLM2-135M on the atlas with several queries a search and a merge after it, and MultiSearch's three rewards."""
    return replace(
        quickstart(),
        recipe="multi_search",
        # No forced answer: after the last search the policy has its passages still to merge.
        environment=EnvironmentConfig(
            protocol="multi_search", top_k=1, max_searches=2, passage_words=40, force_answer=False
        ),
        sampling=SamplingConfig(max_turn_tokens=96, max_answer_tokens=24),
        rewards=RewardWeights(f1=1.0, multi_query=1.0, merge=1.0),
        credit=MultiSearch(),
    )


def pi_play() -> TrainConfig:
    """SmolLM2-135M on the atlas without a question: as an examiner it writes them from the passages, as a student it
    answers them, taught by its average that knows how they were written; three iterations."""
    return replace(
        quickstart(),
        recipe="pi_play",
        steps=12,
        sampling=SamplingConfig(max_turn_tokens=80, max_answer_tokens=24),
        rewards=RewardWeights(f1=0.0, em=1.0),
        credit=PiPlay(),
        self_play=SelfPlayConfig(examiner_steps=1, student_steps=3),
    )


def clarify() -> TrainConfig:
    """SmolLM2-135M finds the region that a user means in scenes of coloured shapes, and asks back where it must."""
    return replace(
        quickstart(),
        recipe="clarify",
        data=DataConfig(questions="scenes"),
        environment=EnvironmentConfig(protocol="clarify", max_searches=2),
        sampling=SamplingConfig(max_turn_tokens=32, max_answer_tokens=24),
        rewards=RewardWeights(f1=0.0, iou=1.0),
        credit=Clarify(),
        warm_start=WarmStartConfig(
            steps=15,
            batch=12,
            learning_rate=1e-4,
            # What to answer once one knows is shown; whether to ask, and for what, is left to learn.
            mix=DemonstrationMix(good=0.3, question=0.0, one_hop=0.1, repeat=0.0, guess=0.3, idle=0.3),
        ),
        evaluation=EvaluationConfig(questions=150),
    )


def mr_search() -> TrainConfig:
    """SmolLM2-135M on the atlas with three episodes a rollout: it answers, reflects, searches on and answers again."""
    return replace(
        quickstart(),
        recipe="mr_search",
        environment=EnvironmentConfig(top_k=1, max_searches=2, passage_words=40, episodes=3),
        credit=MRSearch(),
    )


def comam() -> TrainConfig:
    """SmolLM2-135M as three LoRA agents that keep, sum up and search what people said, on synthetic conversations."""
    return TrainConfig(
        recipe="comam",
        steps=10,
        questions_per_step=4,
        group_size=8,
        data=DataConfig(questions=""),
        # The longest scripts of the warm start, tags included, are 103 and 30 tokens.
        memory=MemoryConfig(conversations="personas", extraction_tokens=112, profile_tokens=48),
        environment=EnvironmentConfig(top_k=3, max_searches=1, passage_words=40),
        sampling=SamplingConfig(max_turn_tokens=24, max_answer_tokens=16),
        credit=CoMAM(),
        optimizer=OptimizerConfig(learning_rate=2e-4),
        warm_start=WarmStartConfig(steps=15, batch=8, learning_rate=1e-3),
        evaluation=EvaluationConfig(questions=40),
    )


def tiny() -> TrainConfig:
    """A random small Llama on the atlas: seconds, no claim; for tests and for people who change code."""
    return TrainConfig(
        recipe="tiny",
        steps=2,
        questions_per_step=2,
        group_size=4,
        model=ModelConfig(name="tiny", dtype="float32", device="cpu"),
        environment=EnvironmentConfig(top_k=1, max_searches=2, passage_words=40),
        sampling=SamplingConfig(max_turn_tokens=16, max_answer_tokens=8),
        rewards=RewardWeights(f1=1.0, gold_hit=0.5, format=0.2),
        credit=IGSearch(center="batch", negative_scale=1.0),
        optimizer=OptimizerConfig(learning_rate=1e-3),
        warm_start=WarmStartConfig(steps=60, batch=8, learning_rate=1e-2),
        evaluation=EvaluationConfig(questions=8),
    )


RECIPES: dict[str, Callable[[], TrainConfig]] = {
    recipe.__name__: recipe for recipe in (quickstart, smollm2, multi_search, pi_play, clarify, mr_search, comam, tiny)
}


def get_recipe(name: str) -> TrainConfig:
    """The configuration of a recipe; ValueError with the nearest name when there is none."""
    if name not in RECIPES:
        raise ValueError(f"unknown recipe {name!r}, known: {', '.join(RECIPES)}{nearest(name, RECIPES)}")
    return RECIPES[name]()
