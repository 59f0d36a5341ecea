"""IG-Search inside TRL's `GRPOTrainer`: its advantages, plus each search's information gain on the tokens of its query.

`IGSearchTrainer` takes the place of `GRPOTrainer`; `IGSearchMixin` goes in front of a `GRPOTrainer` of one's own;
`SearchTool` is an environment for TRL's `environment_factory`. TRL has no hook for per-token advantages, but its loss
takes them as (B, T): `_generate_and_score_completions` is overridden, and what it returns is added to.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from stepcredit.batch import RolloutBatch
from stepcredit.counterfactual import check_contexts
from stepcredit.credit import IGSearch
from stepcredit.environments.search import SearchEnvironment
from stepcredit.integrations._rows import prompt_name
from stepcredit.integrations._versions import require
from stepcredit.padded import pack_padded, spread
from stepcredit.protocol import Protocol, get_protocol
from stepcredit.retrieval import Retriever
from stepcredit.rollout import Question, Search
from stepcredit.scorer import PolicyScorer
from stepcredit.tokens import decode
from stepcredit.tool_calls import ToolCalls
from stepcredit.turn import Turn

require("trl", "1.16", "2")

from accelerate.utils import gather_object, is_peft_model  # noqa: E402
from trl import GRPOTrainer  # noqa: E402

if TYPE_CHECKING:
    from trl import GRPOTrainer as _Trainer
else:
    _Trainer = object

#: What `SearchTool` counts, and what is counted in rollouts; logged as `count_<name>`, zeros included.
TOOL_COUNTS = (
    "failed_retrievals",
    "empty_results",
    "empty_queries",
    "excess_searches",
    "cut_passages",
    "skipped_passages",
)
ROLLOUT_COUNTS = ("searches", "failed_searches", "unanswered_searches", "unasked_documents", "forged_tags")


class IGSearchMixin(_Trainer):
    """Adds the gains of searches to the advantages of a `GRPOTrainer`: `class Mine(IGSearchMixin, MyGRPOTrainer)`.

    In training, after TRL has rolled out and scored a batch, each search's gain about the gold answer is measured under
    the trainer's own policy (never vLLM's copy), and `alpha * stabilised gain / query length` is added on the tokens of
    its query. All other advantages stay bit for bit TRL's, and so do all with `alpha=0`, which only measures. The first
    gains are checked against separate forward passes. Evaluation is TRL's.

    Logged with TRL's own metrics: those of the gains, as `IGSearch` names them, and counts of a batch, `count_<name>`:
    searches, failed_searches (answered by a notice), unanswered_searches (TRL drops what is too long),
    unasked_documents (messages that no search asked for), forged_tags, masked_rollouts (of
    `mask_truncated_completions`: no gains), and those of `SearchTool`. They are means over processes. Counterfactual
    passages are drawn from the batch of the process.

    Args:
        credit: constants of the gains; `eps`, `ddof`, `scale` and `singleton`, which are the outcome's, are not read.
        protocol: how the policy writes searches: `ToolCalls()`, TRL's own tool calling (the default), or a tag grammar
            ("search_r1", "refine"), for a `rollout_func`, which must return "env_mask".
        answers: column of the gold answers, a str or a list of them; None: "answer" or "answers".
        question_id: column of the questions' ids; None: a hash of the prompt.

    Raises:
        TypeError: as a class statement, when a `GRPOTrainer` comes before the mix-in.
        ValueError: the data set lacks a column, the policy cannot be scored, or another argument rules it out; before
            training. In training: an answer is empty, or TRL does not say who wrote which token.
        RuntimeError: a function of the protocol, or the retriever of a `SearchTool`, failed; names the rollout.
    """

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if GRPOTrainer in order and order.index(GRPOTrainer) < order.index(IGSearchMixin):
            raise TypeError(f"{cls.__name__}: IGSearchMixin must come before the GRPOTrainer, or it changes nothing")

    def __init__(
        self,
        *args: Any,
        credit: IGSearch | None = None,
        protocol: Protocol | str | None = None,
        answers: str | None = None,
        question_id: str | None = None,
        **kwargs: Any,
    ) -> None:
        if not isinstance(self, GRPOTrainer):
            raise TypeError(f"{type(self).__name__} is no GRPOTrainer: IGSearchMixin knows only its advantages")
        if not hasattr(GRPOTrainer, "_generate_and_score_completions"):
            raise RuntimeError("this trl has no GRPOTrainer._generate_and_score_completions, where gains are added")
        super().__init__(*args, **kwargs)
        self.credit = IGSearch() if credit is None else credit
        self.protocol = get_protocol(protocol) if isinstance(protocol, str) else protocol or ToolCalls()
        self._answers = self._column(answers)
        self._question_id = None if question_id is None else self._column(question_id)
        self._audited = False
        if self.args.remove_unused_columns:
            raise ValueError(f"remove_unused_columns=True would drop the column {self._answers!r}, the gold answers")
        check_contexts(self.protocol, self.credit.trunk, self.credit.baseline)
        if not isinstance(self.processing_class, PreTrainedTokenizerBase):
            raise ValueError(f"processing_class must be a tokenizer, got a {type(self.processing_class).__name__}")
        if isinstance(self.protocol, ToolCalls) and self.tools:
            self.protocol.check_template(self.processing_class, self.chat_template)
        if (reason := self._unscorable()) is not None:
            raise ValueError(f"the gains of searches cannot be scored: {reason}")
        self._scorer()

    def _generate_and_score_completions(self, inputs: list[dict[str, Any]]) -> dict[str, Any]:
        training = self.model.training
        output = super()._generate_and_score_completions(inputs)
        for i, environment in enumerate(
            self.environments or ()
        ):  # TRL tells the policy what a tool raises, and goes on
            if isinstance(environment, SearchTool) and environment.error is not None:
                raise RuntimeError(f"rollout {i}: the retriever failed: {environment.error!r}") from environment.error
        if training:
            output["advantages"] = self._with_gains(inputs, output)
        return output

    def _with_gains(self, inputs: Sequence[Mapping[str, Any]], output: Mapping[str, Any]) -> torch.Tensor:
        """TRL's advantages ([B], or [B, T] of another subclass) with the gains: [B, T]."""
        if "tool_mask" not in output:
            raise ValueError(
                "TRL does not say which tokens the environment wrote: give the trainer tools= or environment_factory=, "
                "or let rollout_func return 'env_mask'"
            )
        attention = output["completion_mask"]
        prompts = [
            ids[mask.bool()].tolist() for ids, mask in zip(output["prompt_ids"], output["prompt_mask"], strict=True)
        ]
        questions = [self._question(row, prompt) for row, prompt in zip(inputs, prompts, strict=True)]
        groups = {question.id: group for group, question in enumerate(questions)}
        batch = pack_padded(
            questions,
            prompts,
            output["completion_ids"],
            attention,
            attention * output["tool_mask"],
            self.processing_class,
            self.protocol,
            groups=[groups[question.id] for question in questions],
        )
        with self.accelerator.autocast():  # as in the loss
            credit = self.credit.bonus(batch, self._scorer(), step=self.state.global_step, verify=not self._audited)
        self._log_gains(batch, credit.metrics)
        bonus = spread(batch, credit.advantages, attention)
        advantages = output["advantages"]
        if advantages.dim() == 1:
            advantages = advantages[:, None]
        return torch.where(bonus == 0, advantages, advantages + bonus)

    def _question(self, row: Mapping[str, Any], prompt: Sequence[int]) -> Question:
        for column in filter(None, (self._answers, self._question_id)):  # a stream does not tell its columns before
            if column not in row:
                raise ValueError(f"a row of train_dataset has no column {column!r}, it has {sorted(row)}")
        if self._question_id is None:
            name = prompt_name(prompt)
        else:
            name = str(row[self._question_id])
        gold = row[self._answers]
        golds = (gold,) if isinstance(gold, str) else tuple(gold) if isinstance(gold, Sequence) else ()
        if not golds or not all(isinstance(answer, str) for answer in golds):
            raise ValueError(
                f"question {name!r}: column {self._answers!r} must hold a str or a list of them, got {gold!r}"
            )
        return Question(name, decode(self.processing_class, prompt), golds)

    def _column(self, name: str | None) -> str:
        """The name of a column of the training data; None: that of the gold answers."""
        known = getattr(self.train_dataset, "column_names", None)
        wanted = ("answer", "answers") if name is None else (name,)
        found = [column for column in wanted if known is None or column in known]
        if len(found) == 1:
            return found[0]
        raise ValueError(
            f"train_dataset must have {'one of the columns' if name is None else 'the column'} "
            f"{' and '.join(map(repr, wanted))}, it has {known}; name the gold answers' with answers="
        )

    def _unscorable(self) -> str | None:
        state = self.accelerator.state
        if (plugin := getattr(state, "deepspeed_plugin", None)) is not None and plugin.zero_stage == 3:
            return (
                "DeepSpeed ZeRO-3 shards the policy, and its ranks run different numbers of forward passes; use FSDP2"
            )
        if (plugin := getattr(state, "fsdp_plugin", None)) is not None:
            if plugin.fsdp_version == 1:
                return "FSDP1 shards the policy, and its ranks run different numbers of forward passes; use FSDP2"
            if is_peft_model(self.model):
                return "FSDP gathers what is outside of the layers for the whole of a PEFT model only; use DDP"
        adapters = self.model.peft_config if is_peft_model(self.model) else {}
        if virtual := [name for name, one in adapters.items() if one.is_prompt_learning]:
            return f"the adapter {virtual[0]!r} adds virtual tokens to the prompt"
        return None

    def _scorer(self) -> PolicyScorer:
        """Of the policy without what wraps it for training; a PEFT model's adapters are in the layers of its base."""
        model = self.accelerator.unwrap_model(self.model_wrapped, keep_torch_compile=False)
        base: PreTrainedModel = model.get_base_model() if is_peft_model(model) else model
        return PolicyScorer(base, self.processing_class, self.protocol)

    def _log_gains(self, batch: RolloutBatch, metrics: Mapping[str, float]) -> None:
        counts = Counter(dict.fromkeys((*ROLLOUT_COUNTS, *TOOL_COUNTS, "masked_rollouts"), 0))
        for rollout in batch.rollouts:
            counts["searches"] += len(rollout.searches)
            counts["failed_searches"] += sum(search.failed for search in rollout.searches)
            counts["masked_rollouts"] += len(rollout.tokens) == rollout.prompt_length
            counts.update({name: n for name, n in rollout.counts.items() if name != "unknown_logprobs"})
        for environment in self.environments or ():
            if isinstance(environment, SearchTool):
                counts.update(environment.counts)
        mine = {**metrics, **{f"count_{name}": float(count) for name, count in counts.items()}}
        everyone = gather_object([mine])
        # Together, since every rank takes part in the passes of an audit.
        self._audited |= any("ig/audit_difference" in one for one in everyone)
        for name in dict.fromkeys(name for one in everyone for name in one):
            values = [one[name] for one in everyone if name in one]
            self._metrics["train"][name].append(sum(values) / len(values))


class IGSearchTrainer(IGSearchMixin, GRPOTrainer):
    """`GRPOTrainer` with the gains of searches, as `IGSearchMixin` says; all other arguments are those of
    `GRPOTrainer`."""


class SearchTool:
    """What TRL's `environment_factory=lambda: SearchTool(retriever)` makes for each rollout: a search tool.

    A retrieval that fails is answered with a notice and counted, a search beyond the limit too.

    Args:
        retriever: searched with one query a call, as TRL calls tools one by one.
        top_k: passages per query.
        max_searches: executed searches per rollout.
        passage_words: cut titles and texts of passages to this many words each; None leaves them whole.
        skip_shown: leave out passages that the rollout was shown before, and show the next best.
        protocol: that of the trainer.

    Attributes:
        counts: what happened since the last `reset`, by name: `TOOL_COUNTS`.
        error: what the retriever raised since then, other than a RetrievalError.
    """

    def __init__(
        self,
        retriever: Retriever,
        *,
        top_k: int = 3,
        max_searches: int = 4,
        passage_words: int | None = None,
        skip_shown: bool = False,
        protocol: Protocol | None = None,
    ) -> None:
        self._environment = SearchEnvironment(
            retriever,
            ToolCalls() if protocol is None else protocol,
            top_k=top_k,
            max_searches=max_searches,
            passage_words=passage_words,
            force_answer=False,  # a tool cannot open the policy's next turn
            max_invalid=sys.maxsize,
            skip_shown=skip_shown,
        )
        self.reset()

    def reset(self, **row: Any) -> None:
        """A new rollout begins; TRL passes the row of the data set, which is not looked at."""
        self._searches: list[Search] = []
        self.counts: Counter[str] = Counter()
        self.error: Exception | None = None

    def search(self, query: str) -> str:
        """Searches the corpus for passages.

        Args:
            query: What to look for, in a few words.

        Returns:
            The passages that were found, one a line.
        """
        if not isinstance(query, str):
            raise TypeError(f"query must be a string, got {query!r}")
        turn = Turn("search", query.strip(), ())
        try:
            (response,) = self._environment.respond([turn], [self._searches], [0], [False])
        except Exception as error:  # not a RetrievalError: the trainer raises it
            self.error = error
            raise
        if response.search is not None:
            self._searches.append(response.search)
        self.counts.update(response.counts)
        return response.text
