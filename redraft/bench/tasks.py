"""The texts that are scored under a cache policy: running text, facts in filler, and questions about key-value pairs.

The retrieval tasks follow SCBench (Yucheng Li et al., SCBench: A KV Cache-Centric Analysis of Long-Context Methods, 2024,
arXiv 2412.10319): one long context, up to five questions, and two modes over the same data. Multi-turn: each question follows
the earlier ones and their right answers. Multi-request: each question follows the context alone. The context ends before the first
question, so policies do not know the questions, unless the task says "asked in the context". A model with a chat template gets facts
and questions as messages.

All turns of a multi-turn text are scored in one pass over the right answers. Policies depend on committed tokens only, so each turn is
scored as if the text ended there. The model's own answers do not enter the cache.
Differs from SCBench: the beginning of the answer is given, because base models continue texts and do not answer questions; texts are
joined as tokens, so an answer has the same tokens in the context and in the turn.
"""

from __future__ import annotations

import gzip
import random
import re
import string
import sysconfig
import zlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import NamedTuple

from redraft.errors import InvalidInput, did_you_mean
from redraft.models.tokenizer import Tokenizer

Spell = Callable[[str], list[int]]  # text to ids, without special tokens

LIBRARY = ("ntpath", "os", "re/__init__", "asyncio/subprocess")  # of Python 3.11, held out when the embedded model was trained
QUARTERS = 4
TURNS = 5  # that SCBench scores
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)  # parts of the filler before the needle
KEY, VALUE, WORD, LABEL = 3, 4, 5, 4  # letters
CLASSES = (
    "cat dog horse cow sheep goat lion tiger bear wolf fox mouse rabbit pig duck eagle",
    "apple bread cheese soup rice butter sugar honey pasta cake onion tomato potato lemon salad pizza",
    "red blue green yellow black white brown purple orange pink grey gold silver violet scarlet beige",
    "hammer knife spoon fork saw drill needle scissors brush ladder rope axe shovel pencil ruler bucket",
)
NEEDLE = ("needle", "needle, asked in the context")
FACTS = ("facts, multi-turn", "facts, multi-request")
PAIRS = ("key-value, multi-turn", "key-value, multi-request")
SHOTS, OFTENEST = ("many-shot",), ("most frequent word",)
OFTEN = 3  # times as often as any other word


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

    @classmethod
    def of(cls, item: int, context: list[int], turns: Seq[tuple[int, list[int], list[int]]], end: Seq[int] = ()) -> Probe:
        """The context, then (place, question, answer) for each turn, with `end` between them."""
        ids, answers = list(context), []
        for i, (place, question, answer) in enumerate(turns):
            ids += [*(end if i else ()), *question, *answer]
            answers.append(Answer(place, len(ids) - len(answer), len(ids)))
        return cls(item, ids, len(context), tuple(answers))


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


class Form(NamedTuple):
    """What stands around a text and the questions about it. start: before the text; answer: between a question and its answer; again:
    between an answer and the next question; asks: whether there are questions, or only beginnings of sentences."""

    start: list[int]
    answer: list[int]
    again: list[int]
    asks: bool

    @classmethod
    def of(cls, tokenizer: Tokenizer) -> Form:
        """Messages, if the tokenizer has a chat template that knows three of them."""
        spell = partial(tokenizer.encode, special=False)
        marks = ("first text", "first answer", "second text")
        if tokenizer.has_template:
            said = [{"role": "user" if i != 1 else "assistant", "content": mark} for i, mark in enumerate(marks)]
            parts = re.split("|".join(marks), tokenizer.render(said))
            if len(parts) == len(marks) + 1:
                return cls(spell(parts[0]), spell(parts[3]), spell(f".{parts[2]}"), True)
        return cls(tokenizer.encode(""), [], spell(".\n\n"), False)

    def question(self, spell: Spell, asked: str, begun: str) -> list[int]:
        """`asked` as a question, if the form has questions; then `begun`, the beginning of the answer."""
        return [*spell(asked), *self.answer, *spell(begun)] if self.asks else spell(f"\n\n{begun}")


@dataclass(frozen=True)
class Wanted:
    """How the tasks are made. length: tokens of a text, None for all that the context holds; count: texts of each task; turns:
    questions about one context; given: tokens at the start of running text that are not scored; tasks: their names, empty for all."""

    length: int | None = None
    count: int = 16
    turns: int = 5
    given: int = 64
    seed: int = 0
    tasks: tuple[str, ...] = ()

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


def build(
    tokenizer: Tokenizer, found: Mapping[str, Seq[str]], wanted: Wanted, longest: int, left_out: list[str] | None = None
) -> list[Task]:
    """The tasks for texts by source (see `sources`). longest: tokens of the longest text that can be scored; left_out: gets a line for each
    task that needs longer texts, unless tasks are named; then InvalidInput."""
    length = longest if wanted.length is None else wanted.length
    if length > longest:
        raise InvalidInput(f"length = {length}: the context leaves {longest} tokens for a text that is scored")
    spell, start, form = partial(tokenizer.encode, special=False), tokenizer.encode(""), Form.of(tokenizer)
    spelled = {name: [spell(text) for text in texts] for name, texts in found.items()}
    filler, (turns, count, seed) = next(iter(spelled.values())), (wanted.turns, wanted.count, wanted.seed)
    makers: dict[tuple[str, ...], Callable[[], Seq[Task]]] = {
        (name,): partial(lambda *of: [running(*of)], name, texts, start, length, wanted.given, count) for name, texts in spelled.items()
    }
    makers |= {
        NEEDLE: lambda: needle(spell, filler, form, length, count, seed),
        FACTS: lambda: facts(spell, filler, form, length, turns, count, seed),
        PAIRS: lambda: key_values(spell, start, length, turns, count, seed),
        SHOTS: lambda: [many_shot(spell, start, length, turns, count, seed)],
        OFTENEST: lambda: [most_frequent(spell, start, length, count, seed)],
    }
    known = [name for names in makers for name in names]
    if unknown := {*wanted.tasks} - {*known}:
        raise InvalidInput(f"task = {min(unknown)!r}: {did_you_mean(min(unknown), known)}")
    chosen = {*(wanted.tasks or known)}
    tasks: list[Task] = []
    reasons: list[str] = [] if left_out is None else left_out
    for names, make in makers.items():
        try:
            tasks += [task for task in (make() if chosen & {*names} else ()) if task.name in chosen]
        except InvalidInput as error:
            if wanted.tasks:
                raise
            reasons.append(str(error))
    if not tasks:
        raise InvalidInput(reasons[0])
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


class Fact(NamedTuple):
    """A sentence about a person. other: the word of the controls; turn: the question at a later turn."""

    stated: list[int]
    word: list[int]
    other: list[int]
    question: list[int]
    turn: list[int]


def drawn_facts(spell: Spell, form: Form, count: int, chance: random.Random) -> list[Fact]:
    found = []
    names, both = words(chance, count, WORD), words(chance, 2 * count, WORD)
    for name, word, other in zip(names, both[::2], both[1::2]):
        begun, asked = f"The code word of {name.title()} is", f"What is the code word of {name.title()}?"
        question = form.question(spell, f"\n\n{asked}", begun)
        turn = [*form.again, *(form.question(spell, asked, begun) if form.asks else spell(begun))]
        found.append(Fact(spell(f"\n\n{begun}"), spell(f" {word}"), spell(f" {other}"), question, turn))
    return found


def needle(spell: Spell, texts: Seq[list[int]], form: Form, length: int, count: int, seed: int) -> tuple[Task, Task]:
    """A fact at several depths of filler, and a question about it: (after the context, in the context). The filler of an item is the
    same at all depths. In the controls the fact has another word."""
    chance = random.Random(f"needle {seed}")
    end = spell(".\n\n")
    drawn = [drawn_facts(spell, form, 1, chance)[0] for _ in range(count)]
    taken = max(len(one.stated) + len(one.question) + len(one.word) + max(len(one.word), len(one.other)) for one in drawn)
    room = length - len(form.start) - len(end) - taken
    if room < 1:
        raise InvalidInput(f"length = {length}: too short for a needle, {1 - room} tokens more are needed")
    made: dict[bool, list[Probe]] = {True: [], False: []}
    seen: dict[bool, list[Probe]] = {True: [], False: []}
    for i, (filler, fact) in enumerate(zip(pieces(texts, room, count), drawn)):
        for place, depth in enumerate(DEPTHS):
            at = round(depth * room)
            for right, stated in ((True, fact.word), (False, fact.other)):
                context = [*form.start, *filler[:at], *fact.stated, *stated, *end, *filler[at:]]
                made[right].append(Probe.of(i, context, [(place, fact.question, fact.word)]))
                seen[right].append(Probe.of(i, [*context, *fact.question], [(place, [], fact.word)]))
    places = tuple(f"depth {depth:.0%}" for depth in DEPTHS)
    return Task(NEEDLE[0], places, made[True], made[False]), Task(NEEDLE[1], places, seen[True], seen[False])


def facts(spell: Spell, texts: Seq[list[int]], form: Form, length: int, turns: int, count: int, seed: int) -> tuple[Task, Task]:
    """Facts about `turns` persons, evenly spread in filler, then a question about each: (multi-turn, multi-request) over the same data.
    In the controls each person has another word."""
    chance = random.Random(f"facts {seed}")
    end = spell(".\n\n")
    drawn = [drawn_facts(spell, form, turns, chance) for _ in range(count)]
    taken = max(sum(len(a.stated) + len(a.turn) + len(a.word) + max(len(a.word), len(a.other)) + len(end) for a in one) for one in drawn)
    room = length - len(form.start) - taken - len(end)
    if room < turns:
        raise InvalidInput(f"length = {length}: too short for {turns} facts, {turns - room} tokens more are needed")
    multi: dict[bool, list[Probe]] = {True: [], False: []}
    single: dict[bool, list[Probe]] = {True: [], False: []}
    for i, (filler, stated) in enumerate(zip(pieces(texts, room, count), drawn)):
        asked = chance.sample(range(turns), turns)  # the order of questions is not that of facts
        cuts = [round(room * (one + 0.5) / turns) for one in range(turns)]
        for right in (True, False):
            context = [*form.start, *filler[: cuts[0]]]
            for fact, begin, last in zip(stated, cuts, [*cuts[1:], room], strict=True):
                context += [*fact.stated, *(fact.word if right else fact.other), *end, *filler[begin:last]]
            turned = [(turn, stated[of].turn if turn else stated[of].question, stated[of].word) for turn, of in enumerate(asked)]
            multi[right].append(Probe.of(i, context, turned))
            single[right] += [Probe.of(i, context, [(turn, stated[of].question, stated[of].word)]) for turn, of in enumerate(asked)]
    names = tuple(f"turn {turn + 1}" for turn in range(turns))
    return (
        Task(FACTS[0], names, multi[True], multi[False], 1 / turns),
        Task(FACTS[1], names, single[True], single[False], 1 / turns),
    )


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
            turn_by_turn.append(Probe.of(i, context, questions, end))
            one_by_one += [Probe.of(i, context, [one]) for one in questions]
    names = tuple(f"turn {turn + 1}" for turn in range(turns))
    return (
        Task(PAIRS[0], names, multi, multi_controls, 1 / fewest),
        Task(PAIRS[1], names, single, single_controls, 1 / fewest),
    )


def many_shot(spell: Spell, start: list[int], length: int, turns: int, count: int, seed: int) -> Task:
    """Lines "word: label", where a word's class has a random label; then words that no line has. In the controls the labels are those of
    the next class."""
    chance = random.Random(f"many-shot {seed}")
    classes = [one.split() for one in CLASSES]
    made: tuple[list[Probe], list[Probe]] = [], []
    for i in range(count):
        labels, order = words(chance, len(classes), LABEL), [chance.sample(one, len(one)) for one in classes]
        asked = [(turn % len(classes), order[turn % len(classes)].pop()) for turn in range(turns)]
        stated = [(of, word) for of, some in enumerate(order) for word in some]
        shown = [line for _ in range(1 + length // (3 * len(stated))) for line in chance.sample(stated, len(stated))]
        questions = [(turn, spell(f"{word}:"), spell(f" {labels[of]}")) for turn, (of, word) in enumerate(asked)]
        room = length - len(start) - max(len(question) + len(answer) for _, question, answer in questions)
        for probes, shift in zip(made, (0, 1), strict=True):
            lines = [spell(f"{word}: {labels[(of + shift) % len(classes)]}\n") for of, word in shown]
            probes += [Probe.of(i, _fitting(start, lines, room, length), [one]) for one in questions]
    return Task(*SHOTS, tuple(f"request {turn + 1}" for turn in range(turns)), *made, 1 / len(classes))


def most_frequent(spell: Spell, start: list[int], length: int, count: int, seed: int) -> Task:
    """A list of words, one of them more often than the others, and the beginning of a sentence about it. In the controls it is another
    one."""
    chance = random.Random(f"most frequent {seed}")
    asks = spell("\nThe word that is repeated most often in this list is")
    made: tuple[list[Probe], list[Probe]] = [], []
    for i in range(count):
        listed = chance.sample([word for one in CLASSES for word in one.split()], 16)
        room = length - len(start) - len(asks) - max(len(spell(f" {word}")) for word in listed)
        drawn = chance.choices(range(len(listed)), [OFTEN, *[1] * (len(listed) - 1)], k=length)
        for probes, shift in zip(made, (0, 1), strict=True):
            lines = [spell(f" {listed[(of + shift) % len(listed)]},") for of in drawn]
            probes.append(Probe.of(i, _fitting(start, lines, room, length), [(0, asks, spell(f" {listed[0]}"))]))
    return Task(*OFTENEST, ("request 1",), *made, 1 / 16)


def _fitting(start: list[int], lines: Seq[list[int]], room: int, length: int) -> list[int]:
    """As many whole lines as fit."""
    found = list(start)
    for line in lines:
        if len(found) + len(line) > room + len(start):
            break
        found += line
    if len(found) == len(start):
        raise InvalidInput(f"length = {length}: too short for a line of examples")
    return found


def words(chance: random.Random, count: int, letters: int) -> list[str]:
    """Different random words, at most half of all possible ones."""
    alphabet = string.ascii_lowercase
    found: dict[str, None] = {}
    while len(found) < min(count, len(alphabet) ** letters // 2):
        found["".join(chance.choices(alphabet, k=letters))] = None
    return list(found)
