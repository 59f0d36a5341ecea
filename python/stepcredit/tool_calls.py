"""The grammar of chat templates that write tool calls as JSON between `<tool_call>` tags.

Hermes, Qwen2.5 and Qwen3 speak it: `{"name": ..., "arguments": {...}}`. Trainers with tool calling of their own (TRL)
sample such rollouts: the template writes what a tool returned between `<tool_response>` tags, and the turns of the
conversation around it. A call is data: it is parsed as JSON and never executed here.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any

from transformers import PreTrainedTokenizerBase

from stepcredit.protocol import PromptStyle, Protocol, tag_patterns
from stepcredit.rollout import Question, SpanKind
from stepcredit.turn import Action, Piece, Turn

if TYPE_CHECKING:
    from stepcredit.retrieval import Passage


@dataclass(frozen=True, slots=True)
class ToolCalls(Protocol):
    """Searches are calls of a tool; a turn without a call is the answer.

    * A turn's searches are all its calls of `tool` whose `argument` is a string; their passages come in one message, so
      that together they are one step.
    * A turn with a call that is not JSON, or not of the form above, is invalid, and so is one that only calls other
      tools. What is reasoned between `<think>` tags is no call.
    * The answer is what stands between the last `<answer>` tags, or without any the whole turn but its reasoning.

    Attributes:
        tool: name of the search tool.
        argument: its argument that holds the query.
        answer_probe: what precedes a gold answer when it is scored where the policy's next turn begins. "<answer>" is
            for policies that answer between tags, as Search-R1's do; "The answer is" suits others (both ours).
    """

    name: str = field(default="tool_calls", init=False)
    documents_tag: str = field(default="tool_response", init=False)
    refine_tag: str | None = field(default=None, init=False)
    instruction: str = field(default="", init=False)
    answer_probe: str = "<answer>"
    tool: str = "search"
    argument: str = "query"

    @property
    def tagged(self) -> bool:
        """False: a message also holds the turns of the conversation, as the chat template writes them."""
        return False

    def prompt(self, question: Question, tokenizer: PreTrainedTokenizerBase, style: PromptStyle = "plain") -> list[int]:
        """ValueError: prompts with tools, and messages in special tokens, are written by the trainer that samples."""
        raise ValueError(f"question {question.id!r}: rollouts with tool calls are sampled by a trainer that has tools")

    def parse_turn(self, text: str, forced_answer: bool = False) -> Turn:
        """As in `Protocol`. The query's span is the string's characters as they stand in the JSON, escapes included;
        the rest of a call is TAG. After a forced opener the turn is that of the tag grammars."""
        if forced_answer:
            return Protocol.parse_turn(self, text, True)
        forged = len(tag_patterns(self)[0].findall(text))
        reply, calls = _calls(text)
        if not calls:
            return _answer(text, reply, forged)
        try:
            found = [query for call in calls for query in self._queries(text, *call.span(1))]
        except (ValueError, RecursionError):  # not JSON, or nested without end
            return Turn("invalid", "", _tile(text, []), forged)
        found = [(start, stop, query.strip()) for start, stop, query in found]
        spans = [(SpanKind.TAG, *call.span()) for call in calls]
        spans += [(SpanKind.QUERY, start, stop) for start, stop, query in found if query]
        action: Action = "search" if found else "invalid"
        return Turn(action, "\n".join(query for *_, query in found if query), _tile(text, spans), forged)

    def closes(self, text: str, forced_answer: bool = False) -> bool:
        """Whether the text holds `</tool_call>` or `</answer>` (after a forced opener only the latter)."""
        return "</answer>" in text or (not forced_answer and "</tool_call>" in text)

    def documents(self, passages: Sequence[Passage]) -> str:
        """What the tool returns, one `Title: text` line per passage; the template writes the tags around it.

        Passages are untrusted, and a template is encoded as one text: the `<` of anything in them that could be a tag
        or a control token becomes `&lt;`.
        """
        lines = "\n".join(f"{p.title}: {p.text}" for p in passages) or self.nothing_found
        return _MARKUP.sub("&lt;", lines)

    def shows_documents(self, message: str) -> bool:
        """Whether a response in the message is more than one of our notices, or an error as TRL reports it."""
        return any(True for _ in self._responses(message))

    def shown(self, message: str) -> str:
        """The text of these responses."""
        return "\n".join(self._responses(message))

    def check_template(self, tokenizer: PreTrainedTokenizerBase, chat_template: str | None = None) -> None:
        """ValueError when a chat template (default: the tokenizer's) writes calls or responses in another form, or
        none."""
        call = {"type": "function", "function": {"name": self.tool, "arguments": {self.argument: "a query"}}}
        messages: list[Any] = [
            {"role": "user", "content": "?"},
            {"role": "assistant", "content": "", "tool_calls": [call]},
            {"role": "tool", "name": self.tool, "content": "a passage"},
        ]
        try:
            text = str(tokenizer.apply_chat_template(messages, tokenize=False, chat_template=chat_template))
        except Exception as error:  # whatever a template does
            raise ValueError(f"the chat template cannot write a tool call: {error!r}") from error
        if self.parse_turn(text).content != "a query" or self.shown(text) != "a passage":
            raise ValueError(
                "the chat template does not write tool calls as <tool_call> JSON </tool_call> and what tools return "
                f"between <{self.documents_tag}> tags, which is all that ToolCalls reads; it writes {text!r}"
            )

    def _queries(self, text: str, start: int, stop: int) -> Iterator[tuple[int, int, str]]:
        """(start, stop, query) of the call whose JSON is `text[start:stop]`; nothing for a call of another tool.

        Raises:
            ValueError, RecursionError: it is not JSON, or not a call.
        """
        call = json.loads(text[start:stop])
        if not isinstance(call, dict) or not isinstance(call.get("name"), str):
            raise ValueError("a call is an object with a name")
        arguments = call.get("arguments")
        if call["name"] != self.tool or not isinstance(arguments, dict):
            return
        query = arguments.get(self.argument)
        if isinstance(query, str):
            at, _ = _member(text, _after_space(text, start), "arguments")
            first, last = _member(text, at, self.argument)
            yield first + 1, last - 1, query

    def _responses(self, message: str) -> Iterator[str]:
        notices = {self.failed_notice.strip(), self.empty_query_notice.strip(), self.exhausted_notice.strip()}
        for response in _RESPONSE.findall(message):
            content = response.strip()
            if content not in notices and not content.startswith(_ERROR):
                yield content


_RESPONSE = re.compile(r"<tool_response>(.*?)</tool_response>", re.DOTALL)
# How TRL shows the policy that a tool raised: str({"error": ...}).
_ERROR = "{'error':"
_REASONING_OR_CALL = re.compile(r"<think>.*?(?:</think>|\Z)|<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)
_ANSWER = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)
# The control tokens that end a turn; a few, so that the search is linear.
_END = re.compile(r"(?:<\|\w+\|>\s*){1,4}\Z")
_MARKUP = re.compile(r"<(?=/?[A-Za-z]|[|｜])")
_DECODER = json.JSONDecoder()
_SPACE = re.compile(r"[ \t\n\r]*")


def _calls(text: str) -> tuple[int, list[re.Match[str]]]:
    """Where the reply begins, after all reasoning, and the calls outside of it. A call that nothing closes runs to the
    end, as TRL reads it."""
    # A template may open the reasoning at the end of the prompt.
    opening, closing = text.find("<think>"), text.find("</think>")
    reply = closing + len("</think>") if closing >= 0 and not 0 <= opening < closing else 0
    calls = []
    for match in _REASONING_OR_CALL.finditer(text, reply):
        if match[1] is None:
            reply = match.end()
        else:
            calls.append(match)
    return reply, calls


def _answer(text: str, reply: int, forged: int) -> Turn:
    """A turn without a call; `reply` is where its reasoning ended."""
    tagged = list(_ANSWER.finditer(text, reply))
    if tagged:
        start, stop = tagged[-1].span(1)
        spans = [(SpanKind.TAG, *tagged[-1].span())]
    else:
        end = _END.search(text, reply)
        start, stop = reply, len(text) if end is None else end.start()
        spans = []
    content = text[start:stop].strip()
    if content:
        spans.append((SpanKind.ANSWER, start, stop))
    return Turn("answer" if content or tagged else "invalid", content, _tile(text, spans), forged)


def _tile(text: str, spans: Sequence[tuple[SpanKind, int, int]]) -> tuple[Piece, ...]:
    """Pieces that tile the text: of the span that starts last where several hold a character, else THINK."""
    edges = sorted({0, len(text), *(edge for _, start, stop in spans for edge in (start, stop))})
    pieces = []
    for start, stop in pairwise(edges):
        inside = [span for span in spans if span[1] <= start and stop <= span[2]]
        kind = max(inside, key=lambda span: span[1])[0] if inside else SpanKind.THINK
        pieces.append(Piece(kind, start, stop))
    return tuple(pieces)


def _after_space(text: str, at: int) -> int:
    match = _SPACE.match(text, at)
    return at if match is None else match.end()


def _member(text: str, at: int, name: str) -> tuple[int, int]:
    """Where the value of this member lies, of the JSON object that opens at `at` and has one; of several the last,
    which is the one that counts."""
    found = (-1, -1)
    at = _after_space(text, at + 1)
    while text[at] != "}":
        key, at = _DECODER.raw_decode(text, at)
        start = _after_space(text, _after_space(text, at) + 1)
        _, stop = _DECODER.raw_decode(text, start)
        if key == name:
            found = (start, stop)
        at = _after_space(text, stop)
        if text[at] == ",":
            at = _after_space(text, at + 1)
    return found
