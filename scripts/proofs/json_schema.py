"""Whether JSON schemas are enforced or refused by name, on the JSON Schema Test
Suite, on a folder of schemas and on random ones.

For each schema that is accepted: the invalid values of the suite must all be
rejected, in any order of their properties; valid ones are counted that are
accepted in the order of the schema's. Random texts of the grammar must be valid
for the package jsonschema, if it can judge them.

Examples:
  scripts/prove json-schema --suite JSON-Schema-Test-Suite
  scripts/prove json-schema --suite DIR --schemas jsonschemabench/data --random 5000
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice, permutations
from pathlib import Path
from random import Random
from typing import Any

from redraft.errors import InvalidInput
from tests.sample.grammars.schemas import Schemas, value
from tests.sample.grammars.texts import Grammar, judge, values

ORDERS = 24  # of the properties of a value, at most


@dataclass
class Case:
    """A schema, with the values that its source calls valid or invalid; None: the judge decides."""

    schema: Any
    source: str
    values: list[tuple[Any, bool | None]] = field(default_factory=list)


@dataclass
class Totals:
    """What was found. faults: what must not be."""

    schemas: int = 0
    refused: Counter[str] = field(default_factory=Counter)
    invalid: int = 0
    valid: int = 0
    produced: int = 0  # valid values that the grammar accepts, in some order of their properties
    walks: int = 0
    unfinished: int = 0
    unjudged: int = 0
    seconds: list[float] = field(default_factory=list)
    faults: list[str] = field(default_factory=list)


def of_suite(folder: Path) -> Iterator[Case]:
    """Formats of the suite are of the folder optional/format; elsewhere it takes them for annotations."""
    root = folder / "tests" / "draft2020-12"
    files = sorted(root.rglob("*.json"))
    if not files:
        sys.exit(f"no tests in {root}")
    for file in files:
        for group in json.loads(file.read_text(encoding="utf-8")):
            cases = [(test["data"], test["valid"]) for test in group["tests"] if file.name != "format.json" or not test["valid"]]
            yield Case(group["schema"], f"{file.name}: {group['description']}", cases)


def of_folder(folder: Path) -> Iterator[Case]:
    for file in sorted(folder.rglob("*.json")):
        try:
            yield Case(json.loads(file.read_text(encoding="utf-8")), str(file))
        except ValueError:
            print(f"SKIPPED {file}: no JSON")


def of_chance(count: int, seed: int) -> Iterator[Case]:
    for number in range(count):
        rng = Random(f"{seed} {number}")
        yield Case(Schemas(rng).root(), f"random {seed} {number}", [(value(rng), None) for _ in range(10)])


def orders(one: Any) -> Iterator[Any]:
    """The value with its properties in all orders; those of inner objects as they are and sorted."""
    if isinstance(one, dict):
        yield from map(dict, permutations(one.items()))
        yield {name: next(orders(inner)) for name, inner in sorted(one.items())}
    elif isinstance(one, list):
        yield one
        yield from ([*one[:i], other, *one[i + 1 :]] for i in range(len(one)) for other in islice(orders(one[i]), ORDERS))
    else:
        yield one


def study(case: Case, walks: int, rng: Random, totals: Totals) -> None:
    totals.schemas += 1
    begun = time.perf_counter()
    try:
        grammar = Grammar(case.schema)
    except InvalidInput as error:
        totals.refused[reason(str(error))] += 1
        return
    finally:
        totals.seconds.append(time.perf_counter() - begun)
    others = judge(case.schema)
    for one, valid in case.values:
        if valid is None:
            valid = others.is_valid(one)
        accepted = any(grammar.accepts_value(other) for other in islice(orders(one), ORDERS))
        totals.valid += valid
        totals.invalid += not valid
        totals.produced += valid and accepted
        if accepted and not valid:
            totals.faults.append(f"{case.source}: accepts {json.dumps(one)[:200]}")
    for _ in range(walks):
        text = grammar.walk(rng)
        if text is None:
            totals.unfinished += 1
            continue
        totals.walks += 1
        try:
            wrong = [error.message[:200] for one in values(text) for error in others.iter_errors(one)]
        except Exception:  # of the judge: a pattern or a reference that it does not read, a number that it does not hold
            totals.unjudged += 1
            continue
        if wrong:
            totals.faults.append(f"{case.source}: {text[:200]}: {wrong[0]}")


def reason(error: str) -> str:
    """The keyword and the problem of an error, without the values."""
    _, place, problem = error.split(": ", 2)
    keyword = place.rpartition("/")[2]
    for word in ("not enforced", "not supported", "not allowed", "too complex", "could match", "names could repeat", "no value can"):
        if word in problem:
            return f"{keyword if place != '#' else 'whole schema'}: {word}"
    return f"{keyword}: {problem}"[:70]


def report(name: str, totals: Totals, reasons: int) -> None:
    accepted = totals.schemas - totals.refused.total()
    print(f"\n{name}: {totals.schemas} schemas, {accepted} accepted, {totals.refused.total()} refused")
    for why, count in totals.refused.most_common(reasons):
        print(f"  {count:6} {why}")
    if totals.invalid or totals.valid:
        share = totals.produced / max(1, totals.valid)
        print(f"  invalid values: {totals.invalid}; valid: {totals.valid}, of which {totals.produced} are accepted ({share:.1%})")
    print(f"  random texts: {totals.walks}, {totals.unjudged} that the judge cannot read, {totals.unfinished} more not finished")
    middle, most = statistics.median(totals.seconds), max(totals.seconds)
    print(f"  to check and compile: median {middle * 1000:.1f} ms, maximum {most * 1000:.0f} ms")
    for fault in totals.faults:
        print(f"  FAILED {fault}")
    print(f"  invalid and accepted: {len(totals.faults)}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suite", type=Path, help="a clone of the JSON Schema Test Suite")
    parser.add_argument("--schemas", type=Path, help="a folder of files, one schema each")
    parser.add_argument("--random", type=int, default=1000, help="random schemas")
    parser.add_argument("--walks", type=int, default=5, help="random texts per schema")
    parser.add_argument("--reasons", type=int, default=20, help="reasons of refusals to show")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    sources: dict[str, Iterator[Case]] = {"random": of_chance(options.random, options.seed)}
    if options.suite:
        sources["suite"] = of_suite(options.suite)
    if options.schemas:
        sources["folder"] = of_folder(options.schemas)
    faults = 0
    for name, cases in sources.items():
        totals, rng = Totals(), Random(options.seed)
        for case in cases:
            study(case, options.walks, rng, totals)
        report(name, totals, options.reasons)
        faults += len(totals.faults)
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
