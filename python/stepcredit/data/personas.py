"""Synthetic conversations: people who tell an assistant, between small talk, what they like, and change their minds.

Deterministic from a seed, nothing is downloaded. Every persona likes one thing of some topics (a drink, a sport, ...).
Each is stated once; some are changed in a later session, and some mentioned once more after that. Around them stand
small talk, replies of the assistant, and what other people like, which is no fact about the user. Questions ask what is
liked now, or what was liked before a change; half of them have options.

A topic's word stands in every message about it, and in no other topic's values, so that a search for it finds them; at
most three messages of the user are about one topic. Personas are dealt to the splits whole.
"""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

from stepcredit._validate import at_least, require
from stepcredit.data import Dataset
from stepcredit.data.conversations import Conversation, Fact, MemoryQuestion, Message, as_dataset
from stepcredit.rollout import Question

TOPICS: dict[str, tuple[str, ...]] = {
    "drink": ("tea", "coffee", "cocoa", "lemonade", "cider", "kefir", "buttermilk", "tonic"),
    "sport": ("tennis", "rowing", "fencing", "judo", "cricket", "curling", "archery", "handball"),
    "instrument": ("the cello", "the flute", "the harp", "the banjo", "the organ", "the oboe", "the viola", "the drum"),
    "colour": ("green", "purple", "orange", "turquoise", "crimson", "ivory", "brown", "silver"),
    "animal": ("the otter", "the heron", "the badger", "the lynx", "the hare", "the seal", "the raven", "the goat"),
    "city": ("Lisbon", "Oslo", "Prague", "Dublin", "Athens", "Turin", "Riga", "Bruges"),
    "dish": ("lasagne", "goulash", "paella", "ramen", "risotto", "falafel", "pancakes", "dumplings"),
    "language": ("Danish", "Welsh", "Polish", "Greek", "Hindi", "Korean", "Finnish", "Catalan"),
    "flower": ("the tulip", "the poppy", "the iris", "the lily", "the dahlia", "the peony", "the aster", "the crocus"),
    "game": ("chess", "dominoes", "whist", "backgammon", "solitaire", "poker", "bingo", "bridge"),
}
_STATED = (
    "My favourite {topic} is {value}.",
    "Ask me for a {topic} and I will always say {value}.",
    "There is no {topic} that I like as much as {value}.",
)
_CHANGED = (
    "I have changed my mind: the {topic} I like best is {value} now.",
    "As for the {topic}, I have a new favourite: {value}.",
)
_MENTIONED = (
    "It is {value} again for me today, my kind of {topic}.",
    "A friend asked about the {topic} I like, and I told her: {value}.",
)
_OTHERS = (
    "My {person} says that the best {topic} is {value}.",
    "For my {person} there is only one {topic}, and that is {value}.",
)
_PEOPLE = ("sister", "neighbour", "boss", "cousin", "aunt", "flatmate")
_CHATTER = (
    "It has been raining all morning.",
    "I slept badly last night.",
    "The train was late again.",
    "Can you remind me to call the bank?",
    "Work was busy this week.",
    "I still have to water the plants.",
    "What a long day this was.",
    "I finally cleaned the kitchen.",
    "The new shelf arrived yesterday.",
    "My phone is nearly out of battery.",
    "I might go for a walk later.",
    "We had visitors at the weekend.",
)
_REPLIES = ("I see.", "Good to know.", "Thanks for telling me.", "Of course.", "That sounds fine.", "All right.")
_NOW = ("What is the user's favourite {topic} now?", "Which {topic} does the user like best?")
_BEFORE = ("Which {topic} did the user like best before the change?", "What was the user's earlier favourite {topic}?")
_OPTIONS = 4


@dataclass(frozen=True, kw_only=True, slots=True)
class PersonaSettings:
    """How large the synthetic data set and its conversations are.

    Attributes:
        seed: of personas, conversations and questions.
        train: personas to learn from.
        dev: held-out personas to choose settings on.
        test: held-out personas to report on.
        sessions: sittings of a conversation; three let a fact be stated, changed and mentioned again.
        topics: facts about a persona.
        chatter: messages of small talk per session.
    """

    seed: int = 0
    train: int = 200
    dev: int = 20
    test: int = 40
    sessions: int = 4
    topics: int = 4
    chatter: int = 2

    def __post_init__(self) -> None:
        at_least(self, "memory.personas.", seed=0, train=1, dev=0, test=0, sessions=1, topics=1, chatter=0)
        require(self.topics <= len(TOPICS), "memory.personas.topics", f"at most {len(TOPICS)}", self.topics)


@dataclass(slots=True)
class _Topic:
    """One topic of a persona: values it had, the last one holds; each with the numbers of its messages."""

    name: str
    values: list[str]
    messages: list[list[int]] = field(default_factory=list)


def build_conversations(settings: PersonaSettings | None = None) -> Dataset:
    """The data set, with questions of kind "stated" (never changed), "changed" (what holds after a change) and "before"
    (what held before it). Their `plan` is the topic, which finds what they need."""
    settings = settings or PersonaSettings()
    splits: dict[str, list[Question]] = {}
    conversations: list[Conversation] = []
    for split in ("train", "dev", "test"):
        splits[split] = []
        for number in range(getattr(settings, split)):
            rng = random.Random(f"{settings.seed}:{split}:{number}")
            conversation, topics = _conversation(f"persona-{split}-{number}", settings, rng)
            conversations.append(conversation)
            splits[split] += _questions(conversation, topics, rng)
        random.Random(f"{settings.seed}:{split}").shuffle(splits[split])
    return as_dataset("personas", conversations, splits)


def _conversation(name: str, settings: PersonaSettings, rng: random.Random) -> tuple[Conversation, list[_Topic]]:
    # What is said in each session: (speaker's text, topic, which of its values), the last two None for small talk.
    sessions: list[list[tuple[str, _Topic | None, int]]] = [[] for _ in range(settings.sessions)]
    topics = []
    for topic_name in rng.sample(list(TOPICS), settings.topics):
        changes = settings.sessions > 1 and rng.random() < 0.5
        topic = _Topic(topic_name, rng.sample(TOPICS[topic_name], 1 + changes))
        topics.append(topic)
        topic.messages = [[] for _ in topic.values]
        mentioned = settings.sessions > len(topic.values) and rng.random() < 0.4
        at = sorted(rng.sample(range(settings.sessions), len(topic.values) + mentioned))
        said = [(_STATED, 0), (_CHANGED, 1)][: len(topic.values)] + [(_MENTIONED, len(topic.values) - 1)] * mentioned
        for session, (templates, which) in zip(at, said, strict=True):
            text = rng.choice(templates).format(topic=topic.name, value=topic.values[which])
            sessions[session].append((text, topic, which))
        if rng.random() < 0.5:
            value = rng.choice([v for v in TOPICS[topic_name] if v not in topic.values])
            text = rng.choice(_OTHERS).format(person=rng.choice(_PEOPLE), topic=topic_name, value=value)
            sessions[rng.randrange(settings.sessions)].append((text, None, 0))
    messages: list[Message] = []

    def say(speaker: str, text: str) -> None:
        messages.append(Message(f"{name}/m{len(messages) + 1}", speaker, text))

    for said_then in sessions:
        lines = said_then + [(text, None, 0) for text in rng.sample(_CHATTER * settings.chatter, settings.chatter)]
        rng.shuffle(lines)
        for text, about, which in lines:
            if about is not None:
                about.messages[which].append(len(messages))
            say("user", text)
            if rng.random() < 0.4:
                say("assistant", rng.choice(_REPLIES))
    facts = []
    for topic in topics:
        *outdated, value = topic.values
        evidence = tuple(messages[i].id for numbers in topic.messages for i in numbers)
        facts.append(Fact(topic.name, value, tuple(outdated), evidence))
    return Conversation(name, tuple(messages), tuple(facts)), topics


def _questions(conversation: Conversation, topics: list[_Topic], rng: random.Random) -> Iterator[Question]:
    for topic in topics:
        changed = len(topic.values) > 1
        yield _question(conversation, topic, len(topic.values) - 1, "changed" if changed else "stated", rng)
        if changed:
            yield _question(conversation, topic, 0, "before", rng)


def _question(conversation: Conversation, topic: _Topic, which: int, kind: str, rng: random.Random) -> Question:
    value = topic.values[which]
    options: list[str] = []
    if rng.random() < 0.5:
        others = [v for v in TOPICS[topic.name] if v not in topic.values]
        options = [*topic.values, *rng.sample(others, _OPTIONS - len(topic.values))]
        rng.shuffle(options)
    # What was liked before is known by the first statement and by the change that ended it.
    numbers = topic.messages[which] + (topic.messages[1][:1] if kind == "before" else [])
    return MemoryQuestion(
        id=f"{conversation.id}:{topic.name}:{kind}",
        text=rng.choice(_BEFORE if kind == "before" else _NOW).format(topic=topic.name),
        answers=(value,),
        supporting=tuple(conversation.messages[i].id for i in numbers),
        plan=(topic.name,),
        kind=kind,
        conversation=conversation,
        options=tuple(options),
    )
