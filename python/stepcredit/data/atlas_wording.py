"""How the atlas says what it knows: its passages, and how a question is put. All of it is ours."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

_CITY_TEMPLATES = (
    "{city} is a city in {country}. About {people} people live there.",
    "The city of {city} lies in {country}, at {place}. It has about {people} inhabitants.",
    "{city}, with about {people} inhabitants, is one of the large cities of {country}.",
    "Found at {place}, {city} is a city of {country}. Its population is about {people}.",
)
_COUNTRY_TEMPLATES = (
    "{country} is in {continent}. The capital of {country} is {capital}, its currency the {currency}.",
    "{capital} is the capital of {country}. {country} belongs to {continent}; people pay with the {currency}.",
    "{country}, whose capital is {capital}, lies in {continent}. The currency of {country} is the {currency}.",
)
_NUMBER_TEMPLATES = {"calling_code": "calling code is {}", "area": "area {} km2"}
_LANGUAGE_TEMPLATES = (" {languages} is spoken there.", " They speak {languages}.")
#: How each relation is asked of a country, or, for "country", of a city.
QUESTIONS = {
    "country": (
        "In which country is the city of {}?",
        "Which country is {} located in?",
        "{} is a city in which country?",
        "What country does the city of {} belong to?",
    ),
    "capital": ("What is the capital of {}?", "Which city is the capital of {}?", "Name the capital city of {}."),
    "currency": (
        "What currency is used in {}?",
        "What is the currency of {}?",
        "Which currency do people in {} pay with?",
    ),
    "language": ("Which language is spoken in {}?", "What language do people in {} speak?", "Name a language of {}."),
    "continent": ("On which continent is {}?", "Which continent does {} belong to?", "{} lies on which continent?"),
    "neighbour": (
        "Which country borders {}?",
        "Name a country that shares a border with {}.",
        "What is a neighbouring country of {}?",
    ),
    "calling_code": (
        "What is the telephone calling code of {}?",
        "Which calling code does one dial for {}?",
        "Name the calling code of {}.",
    ),
    "area": (
        "What is the area of {} in km2?",
        "How many km2 does {} cover?",
        "How large is {} in km2?",
    ),
}
#: How the second of two hops names the country to which the city of the first belongs.
COUNTRY_OF = ("the country where {} lies", "the country that {} is in", "the country to which the city of {} belongs")
_WITH_ARTICLE = (
    "Islands", "States", "Emirates", "Territory", "Territories", "Kingdom", "Republic", "Bahamas", "Comoros", "Gambia",
    "Maldives", "Netherlands", "Philippines", "Vatican",
)  # fmt: skip


def country_text(name: str, facts: dict[str, tuple[str, ...]], number: int, max_words: int) -> str:
    """The passage of country `number`: all its facts, but for neighbours beyond `max_words`, which are taken out of the
    facts."""
    currency, code = facts["currency"]
    text = _COUNTRY_TEMPLATES[number % len(_COUNTRY_TEMPLATES)].format(
        country=the(name),
        continent=facts["continent"][0],
        capital=facts["capital"][0],
        currency=f"{currency} ({code})",
    )
    if facts["language"]:
        template = _LANGUAGE_TEMPLATES[len(facts["language"]) > 1 or number % 2]
        text += template.format(languages=" and ".join(facts["language"]))
    if numbers := [template.format(facts[name][0]) for name, template in _NUMBER_TEMPLATES.items() if facts[name]]:
        text += f" Its {', its '.join(numbers)}."
    if facts["neighbour"]:
        *first, last = map(the, facts["neighbour"])
        borders = f" It borders {', '.join(first)}{' and ' if first else ''}{last}."
        if len((text + borders).split()) > max_words:
            facts["neighbour"] = ()
        else:
            text += borders
    return _capitalize_sentences(text)


def city_text(name: str, country: str, record: Mapping[str, Any]) -> str:
    """The passage of a city, from its record of GeoNames."""
    people = record["population"]
    latitude, longitude = record["latitude"], record["longitude"]
    text = _CITY_TEMPLATES[record["geonameid"] % len(_CITY_TEMPLATES)].format(
        city=name,
        country=the(country),
        people=f"{people / 1e6:.1f} million" if people >= 1e6 else f"{round(people, -3):,}",
        place=f"{abs(latitude):.1f} degrees {'north' if latitude >= 0 else 'south'} and "
        f"{abs(longitude):.1f} degrees {'east' if longitude >= 0 else 'west'}",
    )
    return _capitalize_sentences(text)


def the(name: str) -> str:
    """A country's name as it stands inside a sentence: "France", "the Philippines"."""
    return f"the {name}" if name.endswith(_WITH_ARTICLE) or "Republic of" in name or name == "Isle of Man" else name


def _capitalize_sentences(text: str) -> str:
    return ". ".join(sentence[:1].upper() + sentence[1:] for sentence in text.split(". "))
