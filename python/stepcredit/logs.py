"""Rollouts of other trainers, logged as text, as `Rollout`s.

Text does not say who wrote it: a block of the documents tag that a policy forged reads like one that an environment
wrote. Whoever has token ids and knows their authors should use `padded` instead.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from hashlib import blake2b

from transformers import PreTrainedTokenizerBase

from stepcredit.environments import Response
from stepcredit.protocol import Protocol, get_protocol, tag_patterns
from stepcredit.rollout import Question, Rollout, Search, SpanKind
from stepcredit.tokens import decode, leading_bos
from stepcredit.train.engine.transcript import Transcript
from stepcredit.turn import Turn


def rollout_from_text(
    question: Question,
    prompt: str,
    response: str,
    tokenizer: PreTrainedTokenizerBase,
    protocol: Protocol | str,
    *,
    group: int = 0,
) -> Rollout:
    """A rollout from its text.

    What lies in blocks of the protocol's documents tag, and the whitespace around them, is the environment's; all else
    in `response` is the policy's, other messages of the environment included, since nothing marks them. The policy's
    text is cut into turns, each ending with a search or an answer that is opened and closed.

    * A block answers the last search before it, if no answer and no other block came since. Any other block ("unasked":
      before any search, or after an empty query) is the environment's and belongs to no step.
    * Blocks with nothing but whitespace between them are one message.
    * A search without a block keeps its number and has no passages ("unanswered"), as when retrieval fails.
    * A block ends at the first closing tag; tags of the policy inside it count for nothing. One that is not closed
      before the next block opens ends before the next tag of the policy, at that block, or with the text ("unclosed":
      trainers cut long messages on the right). A closing tag too many is the policy's, counted in "forged_tags".
    * The last answer is the rollout's; text after it is kept.

    Every turn and every message is encoded on its own, so that the tokens are not always those that were sampled.
    Special tokens are read in the prompt and in the policy's text, never in documents; the prompt starts with BOS where
    the tokenizer adds one.

    Args:
        question: what was asked, with its gold answers.
        prompt: all text before the policy's first token, chat template included.
        response: all that follows.
        tokenizer: the scoring model's.
        protocol: tag grammar of the response, or its name.
        group: index of the group of rollouts that share the question.

    Returns:
        A rollout that ended "answered" or "unclosed". What a log does not tell is marked: `rewards["total"]` is NaN,
        which every credit method refuses, and the policy's `logprobs` are 0.0 (not known), their number being
        `counts["unknown_logprobs"]`. Each block counts as one passage, whose id is a hash of its text. `counts` also
        has "unanswered_searches", "unasked_documents" and "unclosed_documents" where there are any.

    Raises:
        ValueError: unknown protocol, or one whose messages do not stand between tags, or a prompt without tokens; names
            it, or the question.
    """
    grammar = get_protocol(protocol) if isinstance(protocol, str) else protocol
    if not grammar.tagged:
        raise ValueError(f"a log of texts cannot be read as {grammar.name!r}: its messages do not stand between tags")
    transcript = Transcript(question, _prompt_ids(prompt, tokenizer), tokenizer, grammar)
    reader = _Reader(transcript)
    blocks, unclosed = _blocks(response, grammar)
    at = 0
    for start, stop in blocks:
        reader.policy(response[at:start])
        reader.documents(response[start:stop])
        at = stop
    reader.policy(response[at:])
    reader.give_up()
    rollout = transcript.finish("unclosed" if reader.answer is None else "answered", reader.answer, group)
    rollout.rewards["total"] = float("nan")
    counts = {
        "unknown_logprobs": sum(span.stop - span.start for span in rollout.spans if span.by_policy),
        "unclosed_documents": unclosed,
    }
    rollout.counts.update({name: count for name, count in counts.items() if count})
    return rollout


def split_text(text: str, tokenizer: PreTrainedTokenizerBase, protocol: Protocol) -> tuple[str, str] | None:
    """Prompt and response of a rollout logged as one text; None when it does not show where the response begins.

    It begins after the first header with which the tokenizer's chat template opens a reply ("assistant", as a rule).
    Where there is no such header it begins with the first tag of the policy: an instruction that itself holds tags then
    splits in the wrong place, and what the policy wrote before its first tag counts as prompt.
    """
    header = _reply_header(tokenizer)
    if header and header in text:
        at = text.index(header) + len(header)
    else:
        tag = tag_patterns(protocol)[1].search(text)
        if tag is None:
            return None
        at = tag.start()
    return text[:at], text[at:]


def prompt_name(prompt: str) -> str:
    """What to call the question of a prompt where a log has no name for it: a hash, so that draws, which are seeded by
    the name, do not depend on the order of the log."""
    return f"prompt-{blake2b(prompt.encode(), digest_size=8).hexdigest()}"


def message_passages(message: str, protocol: Protocol) -> tuple[str, ...]:
    """What a message shows, as one passage whose id is a hash of the text between its tags; () when that is nothing."""
    inner = protocol.shown(message)
    if inner in ("", protocol.nothing_found):
        return ()
    return (f"text-{blake2b(inner.encode(), digest_size=8).hexdigest()}",)


class _Reader:
    """Feeds a transcript with text in order, and knows which search waits for its passages."""

    def __init__(self, transcript: Transcript) -> None:
        self.transcript = transcript
        self.asked: Turn | None = None
        self.answer: str | None = None

    def policy(self, text: str) -> None:
        tokenizer, protocol = self.transcript.tokenizer, self.transcript.protocol
        for turn_text in _turns(text, protocol):
            ids = tokenizer.encode(turn_text, add_special_tokens=False)
            # Before the turn is added, so that its query gets the next number.
            if protocol.parse_turn(decode(tokenizer, ids)).action != "invalid":
                self.give_up()
            turn = self.transcript.add_policy(ids, [0.0] * len(ids))
            if turn.action == "search":
                self.asked = turn if turn.content else None
            elif turn.action == "answer":
                self.answer = turn.content

    def documents(self, text: str) -> None:
        if self.asked is None:
            self.transcript.add_environment(text, SpanKind.DOCUMENTS)
            self.transcript.counts["unasked_documents"] += 1
            return
        passages = message_passages(text, self.transcript.protocol)
        self._respond(Response(text, SpanKind.DOCUMENTS, self._search(passages)))

    def give_up(self) -> None:
        """Nothing will answer the search that waits."""
        if self.asked is not None:
            self._respond(Response(search=self._search((), failed=True)))
            self.transcript.counts["unanswered_searches"] += 1

    def _search(self, passages: tuple[str, ...], failed: bool = False) -> Search:
        query, queries = (self.asked.query, self.asked.queries) if self.asked else ("", ())
        return Search(len(self.transcript.searches), query, passages, failed, queries)

    def _respond(self, response: Response) -> None:
        self.transcript.add_response(response, room=sys.maxsize)  # a log has no limit: all of it was there
        self.asked = None


def _prompt_ids(prompt: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    ids = list(tokenizer.encode(prompt, add_special_tokens=False))
    bos = leading_bos(tokenizer)
    # Logs hold the text of BOS or leave it out, depending on who decoded them.
    return [*bos, *ids] if ids and ids[:1] != bos else ids


def _reply_header(tokenizer: PreTrainedTokenizerBase) -> str:
    """What the chat template writes before a reply; "" when it has none."""
    if tokenizer.chat_template is None:
        return ""
    asked = [{"role": "user", "content": "?"}]
    plain = str(tokenizer.apply_chat_template(asked, tokenize=False))
    opened = str(tokenizer.apply_chat_template(asked, tokenize=False, add_generation_prompt=True))
    return opened[len(plain) :] if opened.startswith(plain) else ""


def _turns(text: str, protocol: Protocol) -> Iterator[str]:
    """The text cut after every closed search and answer, as `Protocol.parse_turn` finds them; no piece is empty."""
    at, opener = 0, None
    for tag in tag_patterns(protocol)[1].finditer(text):
        closing, name = tag.groups()
        if name not in ("search", "answer"):
            continue
        if closing and opener == name:
            yield text[at : tag.end()]
            at = tag.end()
        opener = None if closing else name
    if at < len(text):
        yield text[at:]


def _blocks(text: str, protocol: Protocol) -> tuple[list[tuple[int, int]], int]:
    """Where the environment's messages lie, as (start, stop), whitespace around them included, and how many blocks are
    not closed."""
    environment_tags, policy_tags = tag_patterns(protocol)
    tags = list(environment_tags.finditer(text))
    blocks: list[tuple[int, int]] = []
    unclosed = 0
    for i, tag in enumerate(tags):
        if "/" in tag[0]:
            continue
        following = tags[i + 1] if i + 1 < len(tags) else None
        if following is not None and "/" in following[0]:
            stop = following.end()
        else:
            limit = len(text) if following is None else following.start()
            cut = policy_tags.search(text, tag.end(), limit)
            stop = limit if cut is None else cut.start()
            unclosed += 1
        last = blocks[-1][1] if blocks else 0
        start = last + len(text[last : tag.start()].rstrip())
        stop = next((i for i in range(stop, len(text)) if not text[i].isspace()), len(text))
        if blocks and start == last:
            start = blocks.pop()[0]
        blocks.append((start, stop))
    return blocks, unclosed
