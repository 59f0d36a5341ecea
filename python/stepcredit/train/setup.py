"""Builds what a run consists of from its configuration."""

from __future__ import annotations

import copy
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepcredit._validate import require
from stepcredit.credit import CoMAM
from stepcredit.credit.base import taught_by_reference
from stepcredit.data import Dataset
from stepcredit.data.referring import ReferringDataset, build_scenes
from stepcredit.environments import ClarifyEnvironment, Environment, SearchEnvironment
from stepcredit.retrieval import Hits, Retriever
from stepcredit.retrieval.store import PassageStore
from stepcredit.scorer import PolicyScorer
from stepcredit.train.config import DataConfig, TrainConfig
from stepcredit.train.engine import HFEngine
from stepcredit.train.optimizer import MasterAdamW
from stepcredit.train.policy import load_policy, resolve_device, resolve_dtype
from stepcredit.train.progress import Reporter


class TimedRetriever:
    """A retriever that adds up how long callers waited for it."""

    def __init__(self, retriever: Retriever) -> None:
        self.retriever = retriever
        self.seconds = 0.0

    def search(self, queries: Sequence[str], k: int) -> Hits:
        start = time.perf_counter()
        try:
            return self.retriever.search(queries, k)
        finally:
            self.seconds += time.perf_counter() - start


@dataclass(frozen=True, slots=True)
class Parts:
    """The parts of a run: built once, used by every phase; `seconds` is what building them took. There is a retriever
    where there are passages."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    dataset: Dataset
    retriever: TimedRetriever | None
    environment: Environment
    engine: HFEngine
    optimizer: MasterAdamW
    scorer: PolicyScorer
    reporter: Reporter
    seconds: float

    @property
    def seconds_retrieval(self) -> float:
        """How long was waited for the retriever so far."""
        return self.retriever.seconds if self.retriever is not None else 0.0

    @property
    def tokens_forwarded(self) -> int:
        """Tokens that the engine has run through the model so far."""
        return self.engine.tokens_forwarded


def build(config: TrainConfig, reporter: Reporter) -> Parts:
    """Load data, model and tokenizer, index the corpus, and put the parts together.

    Raises:
        ValueError, OSError, ImportError: something the user named is wrong or not there; the message says what.
    """
    started = time.perf_counter()
    given = config.memory.conversations
    require(not given, "memory.conversations", "empty for one policy (build_memory is for a pipeline)", given)
    rule = "a method for one policy without memory.conversations (comam is for the agents of the recipe comam)"
    require(not isinstance(config.credit, CoMAM), "credit", rule, "comam")
    device = resolve_device(config.model.device)
    dtype = resolve_dtype(config.model.dtype, device)
    dataset = load_data(config.data)
    if config.self_play.enabled:
        walkable, asked = not isinstance(dataset, ReferringDataset), config.self_play.examiner_steps
        require(walkable, "self_play.examiner_steps", "0 where there are no passages to walk", asked)
        episodes = config.environment.episodes
        require(episodes == 1, "environment.episodes", "1 with self_play.examiner_steps", episodes)
        dataset = replace(dataset, train=[])  # nothing may read them
    for split in (*(() if config.self_play.enabled else ("train",)), config.evaluation.split):
        if not getattr(dataset, split):
            raise ValueError(f"data.questions={config.data.questions!r} has no {split} questions")
    protocol = config.environment.grammar
    model, tokenizer = load_policy(
        config.model.name, device=device, dtype=dtype, texts=_texts(dataset, config), seed=config.seed
    )
    retriever: TimedRetriever | None = None
    environment: Environment
    if isinstance(dataset, ReferringDataset):
        environment = ClarifyEnvironment(
            dataset.referrals,
            protocol,
            max_questions=config.environment.max_searches,
            force_answer=config.environment.force_answer,
            max_invalid=config.environment.max_invalid,
        )
    else:
        retriever = TimedRetriever(build_retriever(config.data, dataset, device, dtype, reporter))
        environment = SearchEnvironment(
            retriever, protocol, **config.environment.search_options, episodes=config.environment.episodes
        )
    engine = HFEngine(
        model,
        tokenizer,
        protocol,
        prompt_style=config.environment.prompt,
        max_batch=config.sampling.max_batch,
    )
    return Parts(
        model=model,
        tokenizer=tokenizer,
        dataset=dataset,
        retriever=retriever,
        environment=environment,
        engine=engine,
        optimizer=MasterAdamW(model, **config.optimizer.adamw()),
        scorer=PolicyScorer(model, tokenizer, protocol),
        reporter=reporter,
        seconds=time.perf_counter() - started,
    )


def load_data(config: DataConfig) -> Dataset:
    """The data set of a configuration."""
    if not config.questions:
        raise ValueError(
            "data.questions is empty: name questions and their passages, each a JSON Lines file or hub:OWNER/NAME, "
            "with data.questions=... data.corpus=..."
        )
    if config.questions == "atlas":
        from stepcredit.data.atlas import build_atlas

        return build_atlas(config.seed)
    if config.questions == "scenes":
        return build_scenes(config.seed)
    from stepcredit.data.jsonl import load_jsonl

    _check_retriever(config)
    return load_jsonl(config.questions, config.corpus, datasets=config.datasets)


def _check_retriever(config: DataConfig) -> None:
    """ValueError for settings of the retriever that do not fit the corpus, before anything is read or encoded."""
    directory = Path(config.corpus)
    if directory.is_dir():
        from stepcredit.retrieval._manifest import read_manifest
        from stepcredit.retrieval.directory import choose_engine

        try:
            choose_engine(directory, read_manifest(directory), config.retriever)
        except ValueError as error:
            raise ValueError(f"data.retriever: {error}") from None
        rule = "none with an index directory, which says how its encoder is used"
        require(config.convention is None, "data.convention", rule, config.convention)
    elif config.retriever != "bm25" and config.encoder not in (None, "minilm"):
        rule = f"how data.encoder={config.encoder} was trained (minilm, e5, bge or gte)"
        require(config.convention is not None, "data.convention", rule, config.convention)


def build_retriever(
    config: DataConfig, dataset: Dataset, device: torch.device, dtype: torch.dtype, reporter: Reporter
) -> Retriever:
    """The retriever of a configuration over the data set's passages; what an index directory holds is opened."""
    if isinstance(dataset.passages, PassageStore):
        from stepcredit.retrieval.directory import open_index

        directory = dataset.passages.directory
        return open_index(directory, encoder=config.encoder, device=device, engine=config.retriever)
    engines: list[Retriever] = []
    if config.retriever != "bm25":
        from stepcredit.retrieval.dense import DenseRetriever
        from stepcredit.retrieval.encoder import CONVENTIONS, Encoder

        convention = CONVENTIONS[config.convention or "minilm"]
        encoder = Encoder.load(config.encoder or "minilm", device=device, dtype=dtype, **convention)
        with reporter.task("encoding passages", len(dataset.passages)) as advance:
            engines.append(DenseRetriever(dataset.passages, encoder, progress=advance))
    if config.retriever != "dense":
        from stepcredit.retrieval.bm25 import BM25Retriever

        engines.append(BM25Retriever(dataset.passages))
    if len(engines) == 1:
        return engines[0]
    from stepcredit.retrieval.hybrid import HybridRetriever

    return HybridRetriever(engines)


def reference_policy(config: TrainConfig, parts: Parts) -> PolicyScorer | None:
    """The policy as it is now, in a copy that is never trained, where the KL term or the credit method needs one."""
    if config.loss.kl_coef > 0 or taught_by_reference(config.credit):
        return PolicyScorer(frozen_copy(parts.model), parts.tokenizer, parts.scorer.protocol)
    return None


def frozen_copy(model: PreTrainedModel) -> PreTrainedModel:
    """A copy that is never trained."""
    return copy.deepcopy(model).requires_grad_(False)


def _texts(dataset: Dataset, config: TrainConfig) -> Iterator[str]:
    """What the policy reads and writes, for training a tokenizer; frequent tags become tokens of their own. Read only
    if there is one to train: the passages may be millions, on disk."""
    protocol = config.environment.grammar
    own = (protocol.merge_tag, "question" if config.self_play.enabled else None)
    tags = ("search", "answer", "information", "documents", *filter(None, own))
    if protocol.inquiry == "ask":
        tags = ("ask", "answer", "reply")
        yield from (f"<ask> {asks} </ask>" for q in dataset.train for asks in q.plan)
    yield from (f"Question: {q.text}\n" for q in dataset.train)
    yield from (f"{p.title}: {p.text}" for p in dataset.passages)
    yield from [f"<{tag}> </{tag}>" for tag in tags] * 500
