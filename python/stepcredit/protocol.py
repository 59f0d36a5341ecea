"""Tag grammars: which tags a method speaks, how a turn is parsed, what the environment writes.

Four grammars (the tags are the contract of Search-R1, arXiv 2503.09516, AutoRefine, arXiv 2505.11277, and MultiSearch,
arXiv 2605.13534; the wording, and the tags of the last, are ours):

* `search_r1`: the policy writes `<think> <search> <answer>`, the environment `<information>`.
* `refine`: the policy writes `<think> <search> <refine> <answer>`, the environment `<documents>`.
* `multi_search`: the policy writes `<think> <search> <merge> <answer>`, the environment `<information>`. A search holds
  several queries, one a line or separated by `;` (ours; the paper leaves the delimiter open).
* `clarify`: the policy writes `<think> <ask> <answer>`, the environment `<reply>`: who is asked is not a retriever but
  the user.

A *turn* is the policy's text since the environment last spoke (`stepcredit.turn`). Only what the environment wrote is
ever trusted as environment text: its tags typed by the policy stay policy text and are counted as forged.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING, Literal

from transformers import PreTrainedTokenizerBase

from stepcredit._names import nearest
from stepcredit.rollout import Question, SpanKind
from stepcredit.tokens import encode, leading_bos, special_text
from stepcredit.turn import Tag, Turn, cut_turn

if TYPE_CHECKING:
    from stepcredit.retrieval import Passage

PromptStyle = Literal["plain", "chat"]


@dataclass(frozen=True, slots=True)
class Protocol:
    """A tag grammar.

    Attributes:
        name: "search_r1", "refine", "multi_search" or "clarify".
        documents_tag: the tag in which the environment wraps passages, or a user's reply.
        refine_tag: the tag in which the policy restates the passages, None when the grammar has none.
        instruction: what the chat prompt says before the question.
        answer_probe: what precedes a gold answer when its log-prob is scored after a step.
        merge_tag: the tag in which the policy merges what the queries of a search found, None where a search is one
            query.
        max_queries: queries executed per search, where a search holds several (`several_queries`).
        inquiry: the tag, and the action, by which the policy finds out: "search", or "ask".
    """

    name: str
    documents_tag: str
    refine_tag: str | None
    instruction: str
    answer_probe: str = "\n<answer>"
    merge_tag: str | None = None
    max_queries: int = 1
    inquiry: Literal["search", "ask"] = "search"

    @property
    def several_queries(self) -> bool:
        """Whether a search holds several queries."""
        return self.merge_tag is not None

    @property
    def restating(self) -> dict[str, SpanKind]:
        """The tags in which the policy restates passages, and the kind of the text inside."""
        tags = {self.refine_tag: SpanKind.REFINE, self.merge_tag: SpanKind.MERGE}
        return {tag: kind for tag, kind in tags.items() if tag is not None}

    @property
    def answer_tag(self) -> str:
        """The tag around what ends a rollout."""
        return "answer"

    @property
    def answer_opener(self) -> str:
        """What the environment writes to force an answer; the next turn is then answer text."""
        return f"<{self.answer_tag}>"

    @property
    def invalid_notice(self) -> str:
        """Reply to a turn without a well-formed action."""
        return f"\nThat was not a valid action: write one {self._noun} or one answer inside its tags.\n"

    @property
    def empty_query_notice(self) -> str:
        """Reply to a search whose query is blank, or to a blank question."""
        return f"\nThe {'question' if self.inquiry == 'ask' else 'search query'} was empty.\n"

    @property
    def failed_notice(self) -> str:
        """Reply to a search that the retriever could not serve."""
        return "\nThe search failed and returned nothing.\n"

    @property
    def nothing_found(self) -> str:
        """What stands in the documents of a search that found no passage."""
        return "(no passages found)"

    @property
    def exhausted_notice(self) -> str:
        """Reply to a search, or a question, beyond the allowed number."""
        return f"\nNo {'questions' if self.inquiry == 'ask' else 'searches'} are left.\n"

    @property
    def _noun(self) -> str:
        return "question" if self.inquiry == "ask" else "search"

    @property
    def reflection_notice(self) -> str:
        """Reply to an answer after which another episode follows (the wording is ours)."""
        return (
            "\nLook back at this answer: what supports it, and what is still unknown or in doubt? Search further for "
            "that, then answer again, and better.\n"
        )

    def shown_question(self, question: Question) -> str:
        """What the prompt shows of a question."""
        return f"Question: {question.text.strip()}\n"

    def prompt(self, question: Question, tokenizer: PreTrainedTokenizerBase, style: PromptStyle = "plain") -> list[int]:
        """Token ids of the prompt.

        Args:
            question: its text is shown, its answers are not.
            tokenizer: a leading BOS is added where this tokenizer adds one.
            style: "plain" writes `Question: ...` and a newline (plain completion, for warm-started policies);
                "chat" puts the instruction and the question into the tokenizer's chat template.

        Raises:
            ValueError: unknown style; "chat" with a tokenizer that has no chat template, or with a question that holds
                the text of a special token (a template is encoded as one text, so that it would become that token;
                "plain" keeps it text). The message names the question and the token.
        """
        text = self.shown_question(question)
        if style == "chat":
            if tokenizer.chat_template is None:
                raise ValueError("style='chat' needs a tokenizer with a chat template; this one has none, use 'plain'")
            if found := special_text(tokenizer, text):
                raise ValueError(
                    f"question {question.id!r} holds {found!r}, a special token of the tokenizer, which "
                    "style='chat' would feed as a control token: leave the question out, or use 'plain'"
                )
            messages = [{"role": "user", "content": f"{self.instruction}\n{text}"}]
            return list(tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False))
        if style != "plain":
            raise ValueError(f"style must be 'plain' or 'chat', got {style!r}")
        # Only a leading BOS: tokenizers of encoders would also close the prompt with a separator.
        return [*leading_bos(tokenizer), *encode(tokenizer, text)]

    def parse_turn(self, text: str, forced_answer: bool = False) -> Turn:
        """Parse the policy's text since the environment last spoke.

        The first well-formed action wins: a closing `</search>` (`</ask>`) or `</answer>` whose nearest opener is of
        the same name. What lies strictly between its tags is QUERY (ASK) or ANSWER, tags are TAG, text inside
        `<refine>` or `<merge>` (up to its closing tag, an action's opener, or the end) is REFINE or MERGE, and
        everything else is THINK. The whitespace of an empty action is THINK.

        Several queries of one search are one QUERY piece, with what stands between them: a search is one step. The
        piece ends where the last query to execute does, so that what is dropped for being too much is THINK. A search
        whose lines are all empty is an empty one.

        Args:
            text: the decoded turn.
            forced_answer: the environment opened the answer, so that the text is ANSWER up to `</answer>` (or up to
                the end, in which case the turn is invalid); search tags are then ordinary answer text.
        """
        environment_tags, policy_tags = tag_patterns(self)
        return cut_turn(
            text,
            [Tag(m.start(), m.end(), bool(m[1]), m[2]) for m in policy_tags.finditer(text)],
            inquiry=self.inquiry,
            restating=self.restating,
            max_queries=self.max_queries if self.several_queries else None,
            forged_tags=len(environment_tags.findall(text)),
            forced_answer=forced_answer,
        )

    def closes(self, text: str, forced_answer: bool = False) -> bool:
        """Whether the text holds a closing tag that ends a turn: `</search>` (`</ask>`) or `</answer>` (after a forced
        opener only the latter)."""
        return (_ANSWER_CLOSER if forced_answer else _CLOSERS[self.inquiry]).search(text) is not None

    def documents(self, passages: Sequence[Passage]) -> str:
        """The environment's reply to a search: one `Title: text` line per passage inside the documents tag.

        Passages are untrusted: the `<` of any protocol tag inside them becomes `&lt;`, so that a passage can neither
        close the block nor look like an action.
        """
        lines = "\n".join(f"{p.title}: {p.text}" for p in passages) or self.nothing_found
        return f"\n<{self.documents_tag}>\n{escape_tags(lines)}\n</{self.documents_tag}>\n"

    def reply(self, text: str) -> str:
        """The environment's reply to a question, on one line. What a user says is data: tags in it are escaped."""
        return f"\n<{self.documents_tag}> {escape_tags(' '.join(text.split()))} </{self.documents_tag}>\n"

    def shows_documents(self, message: str) -> bool:
        """Whether a message of the environment shows passages, or that none were found; if not it is a notice."""
        return tag_patterns(self)[0].search(message) is not None

    def shown(self, message: str) -> str:
        """What such a message shows: its text but for the tags."""
        return tag_patterns(self)[0].sub("", message).strip()

    @property
    def tagged(self) -> bool:
        """Whether queries and passages are text between tags and nothing else, so that they can be cut out of a
        rollout, or found in a log of its text."""
        return self.inquiry == "search"


# Whitespace inside a tag is tolerated: WordPiece decoders insert it. No two `\s*` can meet, so that a search is linear
# in the length of the text, which strangers wrote.
_CLOSERS = {name: re.compile(rf"<\s*/\s*(?:{name}|answer)\s*>") for name in ("search", "ask")}
_ANSWER_CLOSER = re.compile(r"<\s*/\s*answer\s*>")
_ANY_TAG = re.compile(
    r"<\s*(?:/\s*)?(?:think|search|ask|answer|question|refine|merge|information|documents|reply|memory|profile)\s*>",
    re.IGNORECASE,
)


def escape_tags(text: str) -> str:
    """Text in which the `<` of every protocol tag is `&lt;`."""
    return _ANY_TAG.sub(lambda m: "&lt;" + m[0][1:], text)


@lru_cache(maxsize=64)
def tag_patterns(protocol: Protocol) -> tuple[re.Pattern[str], re.Pattern[str]]:
    """What finds the environment's tags, and the policy's: of the latter group 1 is the slash of a closing tag, group 2
    the name."""
    names = ["think", protocol.inquiry, "answer", *protocol.restating]
    return (
        re.compile(rf"<\s*(?:/\s*)?{re.escape(protocol.documents_tag)}\s*>"),
        re.compile(rf"<\s*(?:(/)\s*)?({'|'.join(map(re.escape, names))})\s*>"),
    )


_SEARCH_R1 = """\
Answer the question below. Whenever you learn something new, reason about it between <think> and </think>. If a fact \
is missing, write <search> your query </search>; what was found comes back between <information> and </information>. \
You may search several times. Once you know the answer, write it, and only it, between <answer> and </answer>: a name, \
a date or a few words, for example <answer> Lake Geneva </answer>."""

_REFINE = """\
Answer the question below. Reason between <think> and </think> before you act. If a fact is missing, write \
<search> your query </search>; what was found comes back between <documents> and </documents>. After each search keep \
what matters for the question, in your own words, between <refine> and </refine>, then search again or answer. Write \
the answer, and only it, between <answer> and </answer>: a name, a date or a few words, for example \
<answer> Lake Geneva </answer>."""

_MULTI_SEARCH = """\
Answer the question below. Reason between <think> and </think> before you act. If a fact is missing, write several \
queries at once between <search> and </search>, three as a rule and one a line: put the question in other words, \
widen it, or take it apart. What all of them found comes back between <information> and </information>. After each \
search keep the facts that matter, each once, between <merge> and </merge>, then search again or answer. Write the \
answer, and only it, between <answer> and </answer>: a name, a date or a few words, for example \
<answer> Lake Geneva </answer>."""

_CLARIFY = """\
A user means one region of the scene below, and what is said of it may fit several. Reason between <think> and \
</think> before you act. If you cannot tell which region is meant, do not guess: write <ask> your question </ask>, \
about its colour, shape, size or place; the user's reply comes back between <reply> and </reply>. You may ask several \
times. Once you know, describe that region, and only it, between <answer> and </answer>: its features, a box \
[x1, y1, x2, y2] in pixels, or both, for example <answer> small red circle, top left </answer>."""

#: The known grammars by name. A step of `search_r1` and of `clarify` ends with the environment's newline,
#: so that its probe needs none.
PROTOCOLS: dict[str, Protocol] = {
    "search_r1": Protocol("search_r1", "information", None, _SEARCH_R1, answer_probe="<answer>"),
    "refine": Protocol("refine", "documents", "refine", _REFINE),
    # The paper writes three queries a search; a limit it does not give, five is ours.
    "multi_search": Protocol("multi_search", "information", None, _MULTI_SEARCH, merge_tag="merge", max_queries=5),
    "clarify": Protocol("clarify", "reply", None, _CLARIFY, answer_probe="<answer>", inquiry="ask"),
}


def get_protocol(name: str) -> Protocol:
    """The grammar of this name; ValueError naming the nearest one when there is none."""
    if name not in PROTOCOLS:
        raise ValueError(f"unknown protocol {name!r}, known: {', '.join(PROTOCOLS)}{nearest(name, PROTOCOLS)}")
    return PROTOCOLS[name]
