"""The configuration of a run: frozen dataclasses, validated when they are built.

Those of the update, of self-play and of a memory pipeline are in `update_config.py`, `self_play_config.py` and
`memory_config.py`; rewards, demonstrations and credit methods have theirs beside what they configure. Every field is
documented once, in the "Attributes:" section of its class; `--help` prints from there.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Literal

from stepcredit._validate import at_least, choices, require
from stepcredit.credit import CreditMethod, IGSearch
from stepcredit.data.demonstrations import DemonstrationMix
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.train.engine import Sampling
from stepcredit.train.memory_config import MemoryConfig
from stepcredit.train.rewards import RewardWeights
from stepcredit.train.self_play_config import SelfPlayConfig
from stepcredit.train.update_config import LossConfig, OptimizerConfig


@dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """The policy.

    Attributes:
        name: "smollm2" (packaged weights), "tiny" (a random small Llama), a local directory, or a Hub name.
        dtype: what it computes in; "auto" is bfloat16 where the device multiplies it natively, else float32. Weights
            are kept and updated in float32 either way.
        device: "auto" (the GPU where there is one), or a torch device such as "cpu" or "cuda:1".
    """

    name: str = "smollm2"
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    device: str = "auto"

    def __post_init__(self) -> None:
        choices(self, "model.")
        require(bool(self.name.strip()), "model.name", "a model", self.name)


@dataclass(frozen=True, kw_only=True, slots=True)
class DataConfig:
    """Questions, passages, and how passages are found.

    Attributes:
        questions: "atlas" or "scenes" (built at run time), a JSON Lines file of questions, or hub:OWNER/NAME.
        corpus: the passages that go with the questions: a JSON Lines file, hub:OWNER/NAME, or an index directory that
            `python -m stepcredit.retrieval build` wrote, which is searched as it is, without encoding anything again.
        datasets: of a file of questions, use only these data sets (comma-separated); empty uses all.
        seed: of the atlas: which countries are held out and how questions are put; of the scenes: all of them.
        retriever: "bm25", "dense" (an encoder and an exact index) or "hybrid" (the ranks of both, fused); an index
            directory must have been built with it.
        encoder: the model of the dense retriever: "minilm" (packaged weights), a local directory, or a Hub name; none
            is the one that an index directory names, and minilm otherwise.
        convention: how that encoder was trained (prefixes, pooling): "minilm", "e5", "bge" or "gte". An index directory
            says so itself, and for minilm it may be none.
    """

    questions: str = "atlas"
    corpus: str = ""
    datasets: tuple[str, ...] = ()
    seed: int = 0
    retriever: Literal["bm25", "dense", "hybrid"] = "bm25"
    encoder: str | None = None
    convention: Literal["minilm", "e5", "bge", "gte"] | None = None

    def __post_init__(self) -> None:
        choices(self, "data.")
        # Empty: a recipe leaves it to the user, and building the run refuses it.
        if self.questions in ("", "atlas", "scenes"):
            require(
                not self.corpus, "data.corpus", f"empty with data.questions={self.questions or 'nothing'}", self.corpus
            )
        else:
            rule = f"a file or an index directory that goes with {self.questions!r}"
            require(bool(self.corpus), "data.corpus", rule, self.corpus)


@dataclass(frozen=True, kw_only=True, slots=True)
class EnvironmentConfig:
    """What answers the policy.

    Attributes:
        protocol: the tag grammar, "search_r1", "refine" or "multi_search", and "clarify" with data.questions=scenes.
        prompt: "plain" (just the question, for warm-started policies) or "chat" (instruction and chat template).
        top_k: passages per search.
        max_searches: executed searches per episode, of which a rollout has one as a rule; with scenes questions that
            the user answers.
        passage_words: passages are cut to this many words; none leaves them whole.
        force_answer: open the answer for the policy when its searches are used up; otherwise the rollout ends there.
        max_invalid: invalid turns answered with a notice before the answer is forced.
        skip_shown: a search shows the best passages that its rollout was not shown before.
        max_queries: queries executed per search, of a grammar with several; none is the grammar's own limit.
        episodes: answers per rollout (MR-Search: 3); after each but the last the policy is asked to reflect on it and
            to search further.
    """

    protocol: str = "search_r1"
    prompt: Literal["plain", "chat"] = "plain"
    top_k: int = 3
    max_searches: int = 4
    passage_words: int | None = None
    force_answer: bool = True
    max_invalid: int = 1
    skip_shown: bool = False
    max_queries: int | None = None
    episodes: int = 1

    def __post_init__(self) -> None:
        choices(self, "environment.")
        at_least(self, "environment.", top_k=1, max_searches=0, max_invalid=0, passage_words=1, max_queries=1)
        at_least(self, "environment.", episodes=1)
        several = get_protocol(self.protocol).several_queries
        require(
            several or self.max_queries in (None, 1),
            "environment.max_queries",
            f"none, as a search of {self.protocol!r} is one query",
            self.max_queries,
        )

    @property
    def search_options(self) -> dict[str, Any]:
        """Options of a `SearchEnvironment`, but for its number of episodes."""
        names = ("top_k", "max_searches", "passage_words", "force_answer", "max_invalid", "skip_shown")
        return {name: getattr(self, name) for name in names}

    @property
    def grammar(self) -> Protocol:
        """The protocol with this limit of queries."""
        protocol = get_protocol(self.protocol)
        return protocol if self.max_queries is None else replace(protocol, max_queries=self.max_queries)


@dataclass(frozen=True, kw_only=True, slots=True)
class SamplingConfig:
    """How rollouts are sampled in training. Evaluation is greedy, and sampled at temperature 1.

    Attributes:
        temperature: divides the logits; log-probs are those of the tempered distribution.
        top_p: sample from the smallest set of tokens whose probability reaches this.
        max_turn_tokens: tokens the policy may spend on a turn.
        max_answer_tokens: tokens it may spend on an answer that was opened for it.
        max_batch: rollouts decoded at once.
    """

    temperature: float = 1.0
    top_p: float = 1.0
    max_turn_tokens: int = 128
    max_answer_tokens: int = 32
    max_batch: int = 64

    def __post_init__(self) -> None:
        at_least(self, "sampling.", max_batch=1)
        try:
            self.build(seed=0)
        except ValueError as error:
            raise ValueError(f"sampling.{error}") from None

    def build(self, seed: int) -> Sampling:
        """The engine's sampling settings."""
        return Sampling(
            temperature=self.temperature,
            top_p=self.top_p,
            max_turn_tokens=self.max_turn_tokens,
            max_answer_tokens=self.max_answer_tokens,
            seed=seed,
        )


@dataclass(frozen=True, kw_only=True, slots=True)
class WarmStartConfig:
    """Supervised steps on scripted demonstrations before the reinforcement learning.

    Attributes:
        steps: optimizer steps; 0 leaves the warm start out.
        batch: demonstrations per step.
        learning_rate: of AdamW; its other settings are the optimizer's.
        several: share of the demonstrations that search with three queries at a time, and not with one, where the
            grammar has several queries a search.
        merged: share of the demonstrations that merge what a search found, where the grammar has a merge.
        mix: shares of good and bad demonstrations.
    """

    steps: int = 0
    batch: int = 12
    learning_rate: float = 1e-4
    several: float = 0.5
    merged: float = 0.5
    mix: DemonstrationMix = field(default_factory=DemonstrationMix)

    def __post_init__(self) -> None:
        at_least(self, "warm_start.", steps=0, batch=1, learning_rate=0.0)
        for name in ("several", "merged"):
            require(0 <= getattr(self, name) <= 1, f"warm_start.{name}", "in [0, 1]", getattr(self, name))


@dataclass(frozen=True, kw_only=True, slots=True)
class EvaluationConfig:
    """Evaluation on held-out questions, before and after the reinforcement learning.

    Attributes:
        split: "test", or "dev" for choosing settings.
        questions: how many, the same ones whatever the seed of the run.
        samples: sampled rollouts per question beside the greedy one; 0 leaves them out.
    """

    split: Literal["dev", "test"] = "test"
    questions: int = 80
    samples: int = 1

    def __post_init__(self) -> None:
        choices(self, "evaluation.")
        at_least(self, "evaluation.", questions=1, samples=0)


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """A run.

    Attributes:
        recipe: the recipe this configuration started from; part of the output directory's name.
        seed: of everything random in the run: questions, demonstrations, sampling, counterfactual draws.
        steps: GRPO steps; in self-play those of both roles.
        questions_per_step: questions per GRPO step.
        group_size: rollouts per question.
        output_dir: where the run writes; empty is runs/<recipe>-<time>.
        checkpoint_every: write a checkpoint that --resume can continue every so many steps (for a small model 12
            bytes per parameter); 0 keeps the final weights only.
        credit: the credit method; its own fields follow it as credit.<field>.
    """

    recipe: str = "custom"
    seed: int = 0
    steps: int = 10
    questions_per_step: int = 6
    group_size: int = 8
    output_dir: str = ""
    checkpoint_every: int = 0
    model: ModelConfig = field(default_factory=ModelConfig)
    data: DataConfig = field(default_factory=DataConfig)
    memory: MemoryConfig = field(default_factory=MemoryConfig)
    environment: EnvironmentConfig = field(default_factory=EnvironmentConfig)
    sampling: SamplingConfig = field(default_factory=SamplingConfig)
    rewards: RewardWeights = field(default_factory=RewardWeights)
    credit: CreditMethod = field(default_factory=IGSearch)
    loss: LossConfig = field(default_factory=LossConfig)
    optimizer: OptimizerConfig = field(default_factory=OptimizerConfig)
    warm_start: WarmStartConfig = field(default_factory=WarmStartConfig)
    evaluation: EvaluationConfig = field(default_factory=EvaluationConfig)
    self_play: SelfPlayConfig = field(default_factory=SelfPlayConfig)

    def __post_init__(self) -> None:
        at_least(self, "", seed=0, steps=0, questions_per_step=1, group_size=1, checkpoint_every=0)
        require(
            self.loss.minibatches <= self.questions_per_step * self.group_size,
            "loss.minibatches",
            f"at most the {self.questions_per_step * self.group_size} rollouts of a step",
            self.loss.minibatches,
        )
        scenes = self.data.questions == "scenes"
        require(
            (self.environment.grammar.inquiry == "ask") == scenes,
            "environment.protocol",
            f"{'clarify' if scenes else 'one that searches'} with data.questions={self.data.questions}",
            self.environment.protocol,
        )
        episodes = self.environment.episodes
        require(not scenes or episodes == 1, "environment.episodes", "1 with data.questions=scenes", episodes)
        require(scenes or not self.rewards.iou, "rewards.iou", "0 without data.questions=scenes", self.rewards.iou)
        idle = self.warm_start.mix.idle
        require(scenes or not idle, "warm_start.mix.idle", "0 without data.questions=scenes", idle)
