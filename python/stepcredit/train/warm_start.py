"""The warm start: scripted demonstrations, played through the real environment, and supervised steps on them.

Demonstrations are rollouts like any other: the scripted policy's turns and the environment's replies go through the
same environment and `Transcript` as sampled ones, so that spans, tokens and limits are the same.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from transformers import PreTrainedTokenizerBase

from stepcredit.data.demonstrations import Demonstration
from stepcredit.environments import Environment
from stepcredit.protocol import PromptStyle
from stepcredit.rollout import Rollout
from stepcredit.train.engine import Transcript
from stepcredit.turn import Turn


def play(
    demonstrations: Sequence[Demonstration],
    environment: Environment,
    tokenizer: PreTrainedTokenizerBase,
    *,
    prompt_style: PromptStyle = "plain",
    max_context: int = sys.maxsize,
) -> list[Rollout]:
    """Play scripted policies to their end, all of them side by side, with one retriever call per turn.

    A demonstration searches for its queries in turn and then answers, each time after its merge of the last search, if
    it merges; when the environment forces the answer earlier, the remaining queries are left out. An episode after the
    first plays the next script of `later`, the last one again when there are no more. Scripted tokens have the log-prob
    0.

    Args:
        demonstrations: what each scripted policy searches for and answers.
        environment: answers the turns.
        tokenizer: of the model that will learn from them.
        prompt_style: see `Protocol.prompt`.
        max_context: tokens the model can attend to; a turn or a reply that does not fit ends the rollout as "context".

    Returns:
        One rollout per demonstration, in order, each its own group.
    """
    protocol = environment.protocol
    scripts = [
        _Script(d, Transcript(d.question, protocol.prompt(d.question, tokenizer, prompt_style), tokenizer, protocol))
        for d in demonstrations
    ]
    running = list(scripts)
    while running:
        turns = []
        for script in list(running):
            turn = script.play_turn(max_context)
            if turn is None:
                running.remove(script)
            else:
                turns.append(turn)
        responses = environment.respond(
            turns,
            [s.transcript.searches for s in running],
            [s.faults for s in running],
            [s.forced for s in running],
            episodes=[s.transcript.episodes for s in running],
            questions=[s.demonstration.question for s in running],
        )
        for script, turn, response in zip(running, turns, responses, strict=True):
            room = max_context - len(script.transcript.tokens)
            fits = script.transcript.add_response(response, room) is not None
            script.forced = response.forced_answer
            script.faults += response.fault
            if response.answer is not None:
                script.begin_episode()
            if response.done:
                answered = turn.action == "answer"
                script.end = ("answered", turn.content) if answered else ("unclosed", None)
            elif not fits:
                script.end = ("context", None)
        running = [s for s in running if s.end is None]
    return [s.transcript.finish(*s.end, group) for group, s in enumerate(scripts) if s.end is not None]


@dataclass(slots=True)
class _Script:
    """A scripted policy under way; `current` is its episode's script, `end` is (finish, answer) once it is over."""

    demonstration: Demonstration
    transcript: Transcript
    current: Demonstration = field(init=False)
    searched: int = 0
    faults: int = 0
    forced: bool = False
    end: tuple[str, str | None] | None = None

    def __post_init__(self) -> None:
        self.current = self.demonstration

    def begin_episode(self) -> None:
        episodes = (self.demonstration, *self.demonstration.later)
        self.current = episodes[min(len(self.transcript.episodes), len(episodes) - 1)]
        self.searched = self.faults = 0

    def play_turn(self, max_context: int) -> Turn | None:
        """The script's next turn; None when it does not fit the context, which ends the rollout."""
        queries, answer = self.current.queries, self.current.answer
        grammar = self.transcript.protocol
        asks = f" {self.current.asks} </question>\n<answer>" if self.current.asks else ""
        merges = self.current.merges[self.searched - 1 : self.searched] if self.searched else ()
        merged = "".join(f"<merge> {merge} </merge>\n" for merge in merges)
        if self.forced:
            text = f"{asks} {answer} </{grammar.answer_tag}>"
        elif self.searched == len(queries):
            text = f"{merged}{grammar.answer_opener}{asks} {answer} </{grammar.answer_tag}>"
        else:
            inquiry = self.transcript.protocol.inquiry
            text = f"{merged}<{inquiry}> {queries[self.searched]} </{inquiry}>"
            self.searched += 1
        ids = self.transcript.tokenizer.encode(text, add_special_tokens=False)
        if len(self.transcript.tokens) + len(ids) > max_context:
            self.end = ("context", None)
            return None
        return self.transcript.add_policy(ids, [0.0] * len(ids), self.forced)
