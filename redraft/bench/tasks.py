"""The texts that are scored under a cache policy: running text, a needle in filler, and questions about key-value pairs.

The two retrieval tasks follow SCBench (Yucheng Li et al., SCBench: A KV Cache-Centric Analysis of Long-Context Methods, 2024,
arXiv 2412.10319): one long context, up to five questions, and two modes over the same data. Multi-turn: each question follows
the earlier ones and their right answers. Multi-request: each question follows the context alone. The context ends before the first
question, so policies do not know the questions.

All turns of a multi-turn text are scored in one pass over the right answers. Policies depend on committed tokens only, so each turn is
scored as if the text ended there. The model's own answers do not enter the cache.
Differs from SCBench: questions are the beginnings of sentences and pairs, because base models continue texts and do not answer
questions; texts are joined as tokens, so an answer has the same tokens in the context and in the turn.
"""

from __future__ import annotations

import gzip
import random
import string
import sysconfig
import zlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from redraft.errors import InvalidInput
from redraft.models.tokenizer import Tokenizer

Spell = Callable[[str], list[int]]  # text to ids, without special tokens

LIBRARY = ("ntpath", "os", "re/__init__", "asyncio/subprocess")  # of Python 3.11, held out when the embedded model was trained
QUARTERS = 4
TURNS = 5  # that SCBench scores
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # parts of the filler before the needle
KEY, VALUE, WORD = 3, 4, 5  # letters


class Answer(NamedTuple):
    """The part of a probe that is scored: tokens first to last - 1. place: index in Task.places of its turn, depth or quarter."""

    place: int
    first: int
    last: int


@dataclass(frozen=True)
class Probe:
    """One text. item: the draw of the task that it belongs to; context: leading tokens that count as given."""

    item: int
    ids: list[int]
    context: int
    answers: tuple[Answer, ...]


@dataclass(frozen=True)
class Task:
    """Every item has one answer at every place. controls: the same questions and answers after contexts with other facts, empty for
    running text; chance: how often a guess among the answers in the context is right."""

    name: str
    places: tuple[str, ...]
    probes: list[Probe]
    controls: list[Probe]
    chance: float = 0.0

    @property
    def retrieval(self) -> bool:
        return bool(self.controls)

    @property
    def items(self) -> int:
        return len({probe.item for probe in self.probes})

    @property
    def longest(self) -> int:
        """Tokens of the longest probe. Budgets are parts of it."""
        return max(len(probe.ids) for probe in self.probes)


@dataclass(frozen=True)
class Wanted:
    """How the tasks are made. length: tokens of a text, None for all that the context holds; count: texts of each task; turns:
    questions about one context; given: tokens at the start of running text that are not scored."""

    length: int | None = None
    count: int = 16
    turns: int = 5
    given: int = 64
    seed: int = 0

    def __post_init__(self) -> None:
        """Raises InvalidInput before anything is loaded."""
        if self.length is not None and self.length < 1:
            raise InvalidInput(f"length = {self.length}: must be 1 or more")
        if self.count < 2:
            raise InvalidInput(f"limit = {self.count}: must be 2 or more, or there is no spread over texts")
        if not 1 <= self.turns <= TURNS:
            raise InvalidInput(f"turns = {self.turns}: 1 to {TURNS} is allowed")
        if self.given < 1:
            raise InvalidInput(f"given = {self.given}: must be 1 or more")


def build(tokenizer: Tokenizer, found: Mapping[str, Seq[str]], wanted: Wanted, longest: int) -> list[Task]:
    """All tasks for texts by source (see `sources`). longest: tokens of the longest text that can be scored."""
    length = longest if wanted.length is None else wanted.length
    if length > longest:
        raise InvalidInput(f"length = {length}: the context leaves {longest} tokens for a text that is scored")
    spell, start = partial(tokenizer.encode, special=False), tokenizer.encode("")
    spelled = {name: [spell(text) for text in texts] for name, texts in found.items()}
    tasks = [running(name, texts, start, length, wanted.given, wanted.count) for name, texts in spelled.items()]
    filler = next(iter(spelled.values()))
    tasks.append(needle(spell, filler, start, length, wanted.count, wanted.seed))
    tasks += key_values(spell, start, length, wanted.turns, wanted.count, wanted.seed)
    if short := [task.name for task in tasks if task.items < 2]:
        raise InvalidInput(f"texts: {', '.join(short)}: fewer than 2 pieces of {length} tokens; give more texts or a smaller length")
    return tasks


# ---- texts


def read(path: Path) -> str:
    """A text file, unpacked by gzip if its name ends in .gz. InvalidInput if it cannot be read."""
    try:
        data = path.read_bytes()
        return (gzip.decompress(data) if path.suffix == ".gz" else data).decode()
    except (OSError, EOFError, UnicodeDecodeError, zlib.error) as error:
        reason = error.strerror if isinstance(error, OSError) and error.strerror else "not UTF-8 text, or not gzip as its name says"
        raise InvalidInput(f"texts = {path}: cannot be read ({reason})") from None


def sources(paths: Seq[Path]) -> dict[str, list[str]]:
    """Name -> texts. Files of one folder are one source with the folder's name. Without files, parts of the standard library are used."""
    if not paths:
        return {"standard library": [read(Path(sysconfig.get_path("stdlib"), f"{name}.py")) for name in LIBRARY]}
    found: dict[Path, list[str]] = {}
    for path in paths:
        found.setdefault(path.resolve().parent, []).append(read(path))
    short = [folder.name for folder in found]
    return {folder.name if short.count(folder.name) == 1 else str(folder): texts for folder, texts in found.items()}


def pieces(texts: Seq[list[int]], length: int, count: int) -> list[list[int]]:
    """At most `count` pieces of `length` tokens that do not overlap, from the texts in turns and spread over each text."""
    cuts = []
    for ids in texts:
        whole = len(ids) // length
        take = min(whole, -(-count // len(texts)))
        cuts.append([ids[at * length : (at + 1) * length] for at in (i * whole // take for i in range(take))] if take else [])
    by_turns = [cut[i] for i in range(max(map(len, cuts), default=0)) for cut in cuts if i < len(cut)]
    return by_turns[:count]


# ---- tasks


def running(name: str, texts: Seq[list[int]], start: list[int], length: int, given: int, count: int) -> Task:
    """Windows of running text, with `start` before each, scored in quarters after the first `given` tokens."""
    part = (length - given) // QUARTERS
    if given < 1 or part < 1:
        raise InvalidInput(f"length = {length}: must be {max(1, given) + QUARTERS} or more, {given} of them given")
    windows = pieces(texts, given + QUARTERS * part - len(start), count)
    answers = tuple(Answer(i, given + i * part, given + (i + 1) * part) for i in range(QUARTERS))
    probes = [Probe(i, start + window, given, answers) for i, window in enumerate(windows)]
    return Task(name, tuple(f"quarter {i + 1}" for i in range(QUARTERS)), probes, [])


def needle(spell: Spell, texts: Seq[list[int]], start: list[int], length: int, count: int, seed: int) -> Task:
    """A sentence at several depths of filler, and its beginning again at the end. The filler of an item is the same at all depths. In
    the controls the sentence has another word."""
    chance = random.Random(f"needle {seed}")
    end = spell(".\n\n")
    drawn = []
    for _ in range(count):
        name, *both = words(chance, 3, WORD)
        drawn.append((spell(f"\n\nThe code word of {name.title()} is"), *(spell(f" {word}") for word in both)))
    room = length - len(start) - len(end) - max(2 * len(asks) + len(word) + max(len(word), len(other)) for asks, word, other in drawn)
    if room < 1:
        raise InvalidInput(f"length = {length}: too short for a needle, {1 - room} tokens more are needed")
    probes: list[Probe] = []
    controls: list[Probe] = []
    for i, (filler, (asks, word, other)) in enumerate(zip(pieces(texts, room, count), drawn)):
        for place, depth in enumerate(DEPTHS):
            at = round(depth * room)
            for made, stated in ((probes, word), (controls, other)):
                context = [*start, *filler[:at], *asks, *stated, *end, *filler[at:]]
                made.append(_turns(i, context, [(place, asks, word)]))
    return Task("needle", tuple(f"depth {depth:.0%}" for depth in DEPTHS), probes, controls)


def key_values(spell: Spell, start: list[int], length: int, turns: int, count: int, seed: int) -> tuple[Task, Task]:
    """Pairs "abc:wxyz;" of random letters, then "?abc:" for some of them: (multi-turn, multi-request) over the same data. In the
    controls each key in a question swaps its value with a key that is in no question."""
    chance = random.Random(f"key-value {seed}")
    end = spell(";")
    multi: list[Probe] = []
    multi_controls: list[Probe] = []
    single: list[Probe] = []
    single_controls: list[Probe] = []
    fewest = length
    for i in range(count):
        keys, values = (words(chance, length // 3, letters) for letters in (KEY, VALUE))  # a pair takes at least three tokens
        questions = [(turn, spell(f"?{key}:"), spell(value)) for turn, (key, value) in enumerate(zip(keys[:turns], values))]
        room = length - len(start) - sum(len(question) + len(value) + len(end) for _, question, value in questions)
        pairs: list[tuple[list[int], list[int]]] = []
        for key, value in zip(keys, values):
            pair = spell(f"{key}:"), spell(value)
            if (room := room - sum(map(len, pair)) - len(end)) < 0:
                break
            pairs.append(pair)
        if len(pairs) < 2 * turns:
            raise InvalidInput(f"length = {length}: too short for {turns} turns, which take {2 * turns} pairs; {len(pairs)} fit")
        fewest = min(fewest, len(pairs))
        places = chance.sample(range(len(pairs)), len(pairs))
        swapped = [*range(turns, 2 * turns), *range(turns), *range(2 * turns, len(pairs))]
        for of, turn_by_turn, one_by_one in ((range(len(pairs)), multi, single), (swapped, multi_controls, single_controls)):
            context = [*start, *(token for at in places for token in (*pairs[at][0], *pairs[of[at]][1], *end))]
            turn_by_turn.append(_turns(i, context, questions, end))
            one_by_one += [_turns(i, context, [one]) for one in questions]
    names = tuple(f"turn {turn + 1}" for turn in range(turns))
    return (
        Task("key-value, multi-turn", names, multi, multi_controls, 1 / fewest),
        Task("key-value, multi-request", names, single, single_controls, 1 / fewest),
    )


def words(chance: random.Random, count: int, letters: int) -> list[str]:
    """Different random words, at most half of all possible ones."""
    alphabet = string.ascii_lowercase
    found: dict[str, None] = {}
    while len(found) < min(count, len(alphabet) ** letters // 2):
        found["".join(chance.choices(alphabet, k=letters))] = None
    return list(found)


def _turns(item: int, context: list[int], turns: Seq[tuple[int, list[int], list[int]]], end: Seq[int] = ()) -> Probe:
    """A probe: the context, then (place, question, answer) for each turn, with `end` between them."""
    ids, answers = list(context), []
    for i, (place, question, answer) in enumerate(turns):
        ids += [*(end if i else ()), *question, *answer]
        answers.append(Answer(place, len(ids) - len(answer), len(ids)))
    return Probe(item, ids, len(context), tuple(answers))
