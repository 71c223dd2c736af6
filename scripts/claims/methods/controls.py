"""What decides beside the model how a text goes on."""

from __future__ import annotations

import time
from typing import Any

import numpy as np

from redraft import SamplingParams
from redraft.sample.controls import rpg
from redraft.sample.controls.awrs import AWRS
from redraft.sample.controls.json_text import may_be_json
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab

# ---- momentum decoding

OPENINGS = (
    "The old lighthouse keeper had not spoken to anyone for",
    "On the morning of the election, the mayor of the small town",
    "Scientists announced on Tuesday that a new kind of",
    "When she opened the letter, her hands",
    "The history of the bicycle begins",
    "It was raining in the city when the detective",
    "The river had flooded the valley three times before",
    "My grandmother used to say that",
    "The company reported that its profits",
    "Deep in the forest there lived",
    "The first settlers of the island",
    "Nobody knew why the clock",
    "The museum's newest exhibit",
    "In the year 2150, most people",
    "The train was late again, and",
    "A recent study of honey bees",
    "The king's youngest daughter",
    "After the war, the village",
    "The recipe had been in the family",
    "At the edge of the desert",
)
TOKENS = 160


def repeated(tokens: list[int], n: int = 4) -> float:
    """The share of n-grams that occurred before."""
    grams = [tuple(tokens[i : i + n]) for i in range(len(tokens) - n + 1)]
    return 1 - len(set(grams)) / len(grams)


def momentum(lab: Lab) -> Found:
    """Greedy text, momentum decoding, and a nucleus of 0.95, each continuing a first sentence."""
    ways = {
        "greedy": {"temperature": 0},
        "momentum": {"temperature": 0, "control": "momentum"},
        "nucleus": {"temperature": 1, "top_p": 0.95},
    }
    prompts = list(OPENINGS[: lab.count(len(OPENINGS))])
    shares, likely = {}, {}
    for name, way in ways.items():
        params = [SamplingParams(max_tokens=TOKENS, ignore_eos=True, seed=lab.seed + i, logprobs=0, **way) for i in range(len(prompts))]
        texts = [output.outputs[0] for output in lab.llm.generate(prompts, params)]
        shares[name] = np.array([repeated(text.token_ids) for text in texts])
        likely[name] = float(np.mean([np.mean([one.logprob for one in text.logprobs]) for text in texts]))
    notes = [f"{name}: {shares[name].mean():.2f} of 4-grams repeated, {likely[name]:+.2f} nats a token" for name in ways]
    return Found(shares["momentum"], notes)


# ---- repetition penalization by grammar

STARTS = (
    "def roman(number):\n    if number == 1:\n        return 'I'\n",
    "def test_add():\n    assert add(1, 2) == 3\n",
    "COLORS = {\n    'red': '#ff0000',\n",
    "def day_name(day):\n    if day == 0:\n        return 'Monday'\n",
    "import os\nimport sys\n",
    "class Config:\n    def __init__(self):\n        self.host = 'localhost'\n",
    "def factorial(n):\n",
    "def is_prime(n):\n",
    "SQUARES = [\n    (1, 1),\n",
    "def grade(score):\n    if score >= 90:\n        return 'A'\n",
    "def test_upper():\n    assert 'a'.upper() == 'A'\n",
    "def month_days(month):\n    if month == 1:\n        return 31\n",
)
CODE_TOKENS = 200


def written(lab: Lab, **way: object) -> list[str]:
    """The new text after each start, up to its last whole line."""
    params = SamplingParams(temperature=0, max_tokens=CODE_TOKENS, **way)
    outputs = lab.llm.generate(list(STARTS[: lab.count(len(STARTS))]), params)
    return [output.outputs[0].text.rpartition("\n")[0] for output in outputs]


def looped(text: str) -> float:
    """The share of lines that belong to the third copy, or a later one, of a block of one structure."""
    lines: list[tuple[rpg.Shape, int]] = []
    extra = 0
    try:
        for line in text.splitlines():
            if shape := rpg.shape_of(line, "")[0]:
                lines.append((shape, 0))
                extra += rpg.copies(tuple(lines), 8)[0] > 2
    except ValueError:
        pass
    return extra / max(len(lines), 1)


def parses(start: str, text: str) -> bool:
    """Whether start and text, which may end within a block, are Python."""
    lines = (start + text).splitlines()
    for end in range(len(lines), max(len(lines) - 4, 0), -1):
        try:
            compile("\n".join([*lines[:end], ""]), "text", "exec")
            return True
        except (SyntaxError, ValueError):
            continue
    return False


def structural(lab: Lab) -> Found:
    """Greedy code, with RPG at several decays, and with a repetition penalty."""
    ways: dict[str, dict[str, object]] = {
        "greedy": {}, "rpg, 0.9": {"control": "rpg"}, "rpg, 0.5": {"control": "rpg:decay=0.5"}, "rpg, 0.1": {"control": "rpg:decay=0.1"},
        "penalty 1.1": {"repetition_penalty": 1.1},
    }  # fmt: skip
    shares, notes = {}, []
    for name, way in ways.items():
        texts = written(lab, **way)
        shares[name] = np.array([looped(text) for text in texts])
        valid = np.mean([parses(start, text) for start, text in zip(STARTS, texts, strict=False)])
        notes.append(f"{name}: {shares[name].mean():.2f} of lines are a third copy or later, {valid:.2f} of texts parse")
    return Found(shares["greedy"] - shares["rpg, 0.9"], notes)


# ---- adaptive weighted rejection sampling

THINGS = (
    "a book", "a city", "a person", "a car", "a recipe", "a film", "a planet", "a song", "a dog", "a shop", "a ticket", "a weather report",
)  # fmt: skip
JSON_TOKENS = 64


EXAMPLE = [
    {"role": "user", "content": "Describe a chair in JSON. Reply with JSON only."},
    {"role": "assistant", "content": '{"name": "chair", "material": "wood", "legs": 4, "colors": ["brown", "black"]}'},
]


def rejection(lab: Lab) -> Found:
    """JSON by a predicate that is asked lazily, by a mask of a compiled grammar, and without any."""
    asked = 0

    def counted(text: str, ended: bool) -> bool:
        nonlocal asked
        asked += 1
        return may_be_json(text, ended)

    lazy = {"control": AWRS(counted)}
    ways: dict[str, tuple[dict[str, Any], list[dict[str, str]]]] = {
        "awrs": (lazy, EXAMPLE),
        "mask": ({"structured_outputs": {"json_object": True}}, EXAMPLE),
        "plain": ({}, EXAMPLE),
        "awrs, no example": (lazy, []),
    }
    calls, notes = {}, []
    for name, (way, before) in ways.items():
        ended, valid, tokens, counts, began = 0, 0, 0, [], time.process_time()
        for i, thing in enumerate(THINGS[: lab.count(len(THINGS))]):
            asked = 0
            messages = [*before, {"role": "user", "content": f"Describe {thing} in JSON. Reply with JSON only."}]
            params = SamplingParams(temperature=0.7, top_p=1, top_k=0, seed=lab.seed + i, max_tokens=JSON_TOKENS, **way)
            text = lab.llm.chat(messages, params)[0].outputs[0]
            tokens += len(text.token_ids)
            ended += text.finish_reason == "stop"
            valid += may_be_json(text.text, text.finish_reason == "stop")
            counts.append(asked / len(text.token_ids))
        calls[name], spent = counts, (time.process_time() - began) / tokens
        questions = f"{np.mean(counts):.2f} questions a token, median {np.median(counts):.2f}, most {max(counts):.0f}; " if asked else ""
        notes.append(f"{name}: {questions}{valid} of {len(counts)} texts are JSON so far, {ended} ended, {1e3 * spent:.1f} ms a token")
    return Found(calls["awrs"], notes)


CLAIMS = (
    Claim("momentum", ("control=momentum",), "Greedy texts by momentum decoding do not loop, at a higher likelihood than sampled ones",
          f"{len(OPENINGS)} first sentences, {TOKENS} tokens, against greedy and a nucleus of 0.95",
          "share of repeated 4-grams", momentum, border=0.1, below=True),
    Claim("rpg", ("control=rpg",), "A penalty on copies of a grammatical structure breaks loops of code where the text differs",
          f"{len(STARTS)} beginnings of Python, {CODE_TOKENS} tokens, greedy, decay 0.9 from the third copy on",
          "share of lines that are a third copy or later, greedy minus RPG", structural, border=0.05),
    Claim("awrs", ("control=awrs",), "A constraint is asked about a handful of tokens, not about the vocabulary",
          f"JSON by a predicate, {len(THINGS)} questions after an example, {JSON_TOKENS} tokens, temperature 0.7, a vocabulary of 49,152",
          "questions to the predicate for each token", rejection, border=10, below=True),
)  # fmt: skip
