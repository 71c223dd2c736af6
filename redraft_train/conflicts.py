"""Fact conflicts from templates: a text that contradicts what a model knows, a question, and both answers.

"In this story the capital of France is Rome. The capital of France is": Rome by the context, Paris by prior knowledge.
"""

from __future__ import annotations

from collections.abc import Sequence as Seq
from random import Random
from typing import NamedTuple

CAPITALS = """France Paris, Germany Berlin, Italy Rome, Spain Madrid, Portugal Lisbon, England London, Ireland Dublin, Greece Athens,
Austria Vienna, Hungary Budapest, Poland Warsaw, Russia Moscow, Sweden Stockholm, Norway Oslo, Denmark Copenhagen, Finland Helsinki,
Belgium Brussels, Japan Tokyo, China Beijing, Thailand Bangkok, Vietnam Hanoi, Turkey Ankara, Egypt Cairo, Kenya Nairobi, Iran Tehran,
Iraq Baghdad, Syria Damascus, Lebanon Beirut, Cuba Havana, Peru Lima, Chile Santiago, Canada Ottawa, Australia Canberra,
Romania Bucharest, Bulgaria Sofia, Serbia Belgrade, Pakistan Islamabad, Afghanistan Kabul, Qatar Doha, Libya Tripoli"""
LANGUAGES = """Germany German, Brazil Portuguese, Mexico Spanish, Japan Japanese, Russia Russian, Italy Italian, Egypt Arabic,
Greece Greek, Sweden Swedish, Poland Polish, Turkey Turkish, France French, Denmark Danish, Finland Finnish, Thailand Thai,
Korea Korean, Hungary Hungarian, Norway Norwegian"""
OPPOSITES = """hot cold, big small, fast slow, black white, happy sad, rich poor, up down, left right, open closed, dark light,
early late, old young, good bad, strong weak, wet dry, hard soft, high low, full empty, day night, love hate"""
FOLLOWING = """Monday Tuesday, Tuesday Wednesday, Wednesday Thursday, Thursday Friday, Friday Saturday, Saturday Sunday, Sunday Monday"""
RELATIONS = {
    "the capital of {} is": CAPITALS,
    "the people of {} speak": LANGUAGES,
    "the opposite of {} is": OPPOSITES,
    "the day after {} is": FOLLOWING,
}
CONTEXT, PRIOR = "In this story", "In the real world"  # words of the two intents


class Fact(NamedTuple):
    """`stem` is what precedes the answer; relation: the template that it was made from."""

    relation: str
    stem: str
    answer: str

    @property
    def prompt(self) -> str:
        return f"{self.stem[0].upper()}{self.stem[1:]}"


class Conflict(NamedTuple):
    """prompt: a context and a question that does not say which to follow; by_context, by_prior: with words that say it; context, prior:
    the answers, as they continue the prompts; about: what the fact is about."""

    prompt: str
    by_context: str
    by_prior: str
    context: str
    prior: str
    about: str


def facts() -> list[Fact]:
    pairs = [(relation, *pair.split()) for relation, text in RELATIONS.items() for pair in text.split(",")]
    return [Fact(relation, relation.format(subject), f" {answer}") for relation, subject, answer in pairs]


def conflicts(known: Seq[Fact], count: int, seed: int = 0) -> list[Conflict]:
    """`count` conflicts over facts that a model knows, in turn; another fact of the same relation gives the wrong answer. At most as many
    as there are pairs."""
    dice, found = Random(seed), list[Conflict]()
    wrong = {fact: sorted({other.answer for other in known if other.relation == fact.relation} - {fact.answer}) for fact in known}
    for answers in wrong.values():
        dice.shuffle(answers)
    for turn in range(max(map(len, wrong.values()), default=0)):
        for fact, answers in wrong.items():
            if turn < len(answers) and len(found) < count:
                context = f"{CONTEXT} {fact.stem}{answers[turn]}."
                prompt, *worded = (f"{context} {question}" for question in (fact.prompt, f"{CONTEXT} {fact.stem}", f"{PRIOR} {fact.stem}"))
                found.append(Conflict(prompt, worded[0], worded[1], answers[turn], fact.answer, fact.stem))
    return found


def halves(given: Seq[Conflict], seed: int = 0) -> tuple[list[Conflict], list[Conflict]]:
    """Two halves that have no fact in common."""
    about = sorted({one.about for one in given})
    Random(seed).shuffle(about)
    first = set(about[: (len(about) + 1) // 2])
    return [one for one in given if one.about in first], [one for one in given if one.about not in first]
