"""The tasks are right: answers are where scores are taken, and controls differ only in the answer."""

from __future__ import annotations

import gzip
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path

import pytest

from redraft.bench import tasks
from redraft.bench.tasks import (
    WORD,
    Form,
    Probe,
    Wanted,
    facts,
    key_values,
    many_shot,
    most_frequent,
    needle,
    pieces,
    read,
    running,
    sources,
)
from redraft.errors import InvalidInput
from redraft.models.tokenizer import Tokenizer
from tests.checkpoints import tiny_llama

START = [1]
LETTERS = "".join(chr(97 + i % 23) for i in range(5000))
PAIR = re.compile(r"([a-z]{3}):([a-z]{4});")


def spell(text: str) -> list[int]:
    return [ord(letter) for letter in text]


def said(ids: list[int]) -> str:
    return "".join(map(chr, ids))


def scored(probe: Probe) -> list[str]:
    return [said(probe.ids[answer.first : answer.last]) for answer in probe.answers]


# ---- running text


def test_pieces_do_not_overlap_and_come_from_all_texts() -> None:
    long, short, none = [*range(1000)], [*range(2000, 2045)], [7, 7]
    found = pieces([long, short, none], 20, 7)
    assert [len(piece) for piece in found] == [20] * 5  # three of the long one, its share, and the two that the short one has
    assert [piece[0] < 2000 for piece in found] == [True, False, True, False, True]
    assert all(piece == [*range(piece[0], piece[0] + 20)] for piece in found)
    starts = sorted(piece[0] for piece in found)
    assert all(b - a >= 20 for a, b in pairwise(starts)) and max(start for start in starts if start < 2000) > 500  # spread
    assert pieces([none], 20, 3) == [] and pieces([long], 20, 3) == pieces([long], 20, 3)


def test_running_text_is_scored_in_four_equal_parts_behind_what_is_given() -> None:
    task = running("books", [[*range(100, 600)]], START, 50, 8, 5)
    assert task.items == 5 and task.places == ("quarter 1", "quarter 2", "quarter 3", "quarter 4") and not task.retrieval
    for probe in task.probes:
        assert probe.ids[0] == START[0] and probe.ids[1:] == [*range(probe.ids[1], probe.ids[1] + 47)]
        assert probe.context == 8 and len(probe.ids) == 48 == task.longest  # the 42 tokens after the given ones are not a multiple of 4
        assert [(a.place, a.first, a.last) for a in probe.answers] == [(0, 8, 18), (1, 18, 28), (2, 28, 38), (3, 38, 48)]
    with pytest.raises(InvalidInput, match="length = 11: must be 12 or more, 8 of them given"):
        running("books", [[1] * 99], START, 11, 8, 5)


# ---- needles

PLAIN = Form(START, [], spell(".\n\n"), False)
CHAT = Form([*START, *spell("<u>")], spell("</u><a>"), spell(".</a><u>"), True)


def test_a_needle_lies_at_its_depth_and_is_asked_for_at_the_end() -> None:
    task, _ = needle(spell, [spell(LETTERS)], PLAIN, 300, 3, seed=4)
    assert (task.items, len(task.probes)) == (3, 15) and task.longest <= 300
    for probe in task.probes:
        text = said(probe.ids[1:])
        (answer,) = probe.answers
        sentence = re.search(r"\n\nThe code word of ([A-Z][a-z]{4}) is( [a-z]{5})\.\n\n", text)
        assert sentence is not None
        name, word = sentence.groups()
        assert text.endswith(f"\n\nThe code word of {name} is{word}") and text.count(name) == 2
        assert scored(probe) == [word] and answer.last == len(probe.ids)
        filler = probe.context - 1 - len(sentence[0])
        assert sentence.start() / filler == pytest.approx(tasks.DEPTHS[answer.place], abs=0.01)
    stripped = {re.sub(r"\n\nThe.*?\n\n", "", said(probe.ids[1 : probe.context])) for probe in task.probes if probe.item == 1}
    assert len(stripped) == 1, "the filler must not change with the depth"


def test_controls_of_a_needle_tell_another_word_and_ask_for_the_same() -> None:
    task, _ = needle(spell, [spell(LETTERS)], PLAIN, 300, 2, seed=4)
    for probe, control in zip(task.probes, task.controls, strict=True):
        assert (probe.item, probe.answers, scored(probe)) == (control.item, control.answers, scored(control))
        (word,) = scored(probe)
        assert said(probe.ids).count(word) == 2 and said(control.ids).count(word) == 1
        assert sum(a != b for a, b in zip(probe.ids, control.ids, strict=True)) <= len(word)


@pytest.mark.parametrize("form", [PLAIN, CHAT])
def test_a_policy_sees_the_question_in_one_task_and_not_in_the_other(form: Form) -> None:
    after, within = needle(spell, [spell(LETTERS)], form, 300, 2, seed=4)
    for one, other in zip([*after.probes, *after.controls], [*within.probes, *within.controls], strict=True):
        assert (one.ids, one.answers, one.item) == (other.ids, other.answers, other.item)
        name = re.search("code word of ([A-Z][a-z]{4})", said(one.ids[1:]))
        assert name is not None
        asked = f"</u><a>The code word of {name[1]} is " if form.asks else f"\n\nThe code word of {name[1]} is "
        assert said(one.ids[1 : one.context]).count(f"of {name[1]}") == 1 and asked in said(one.ids[one.context :])
        assert other.context == other.answers[0].first == len(other.ids) - WORD - 1


def test_a_chat_template_gives_the_form(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = Tokenizer(tiny_llama(tmp_path / "llama"))
    monkeypatch.setattr(tokenizer, "render", lambda said: "".join(f"<{one['role']}>{one['content']}</>" for one in said) + "<assistant>")
    spelled = [tokenizer.encode(text, special=False) for text in ("<user>", "</><assistant>", ".</><user>")]
    assert Form.of(tokenizer) == (*spelled, True)
    monkeypatch.setattr(Tokenizer, "has_template", False)
    assert Form.of(tokenizer) == ([1], [], tokenizer.encode(".\n\n", special=False), False)


# ---- several facts


@pytest.mark.parametrize("form", [PLAIN, CHAT])
def test_facts_are_asked_for_in_another_order_and_each_question_has_the_same_context(form: Form) -> None:
    multi, single = facts(spell, [spell(LETTERS)], form, 500, 3, 4, seed=1)
    assert (multi.items, len(multi.probes), len(single.probes), multi.chance) == (4, 4, 12, 1 / 3)
    assert multi.longest <= 500 and multi.places == single.places == ("turn 1", "turn 2", "turn 3")
    orders = set()
    for probe, control in zip(multi.probes, multi.controls, strict=True):
        stated = re.findall(r"The code word of ([A-Z][a-z]{4}) is( [a-z]{5})\.\n\n", said(probe.ids[: probe.context][1:]))
        assert len(stated) == 3
        asked = re.findall(r"The code word of ([A-Z][a-z]{4}) is( [a-z]{5})", said(probe.ids[probe.context :]))
        assert sorted(stated) == sorted(asked) and scored(probe) == [word for _, word in asked]
        orders.add(tuple(stated.index(one) for one in asked))
        assert all(word not in said(control.ids[1 : control.context]) for _, word in stated)
        alone = [one for one in single.probes if one.item == probe.item]
        assert all(one.ids[: one.context] == probe.ids[: probe.context] for one in alone)
        assert [scored(one) for one in alone] == [[word] for _, word in asked]
    assert len(orders) > 1


# ---- tasks over the whole context


def test_examples_show_a_label_for_each_class() -> None:
    task = many_shot(spell, START, 400, 3, 2, seed=3)
    assert (task.items, len(task.probes), task.longest <= 400, task.chance) == (2, 6, True, 0.25)
    for probe, control in zip(task.probes, task.controls, strict=True):
        lines = dict(re.findall(r"([a-z]+): ([a-z]{4})\n", said(probe.ids[1 : probe.context])))
        label, classes = dict.fromkeys(lines.values()), [one.split() for one in tasks.CLASSES]
        word = said(probe.ids[probe.context :]).split(":")[0]
        assert len(label) <= 4 and word not in lines
        own = {lines[other] for other in next(one for one in classes if word in one) if other in lines}
        assert own == {scored(probe)[0].strip()} and scored(control) == scored(probe)
        other = dict(re.findall(r"([a-z]+): ([a-z]{4})\n", said(control.ids[1 : control.context])))
        assert lines.keys() == other.keys() and all(lines[one] != other[one] for one in lines)


def test_the_most_frequent_word_is_asked_for() -> None:
    task = most_frequent(spell, START, 800, 4, seed=3)
    for probe, control in zip(task.probes, task.controls, strict=True):
        (word,) = scored(probe)
        counts = Counter(re.findall(r"( [a-z]+),", said(probe.ids[1 : probe.context])))
        assert counts.most_common(1)[0][0] == word and scored(control) == [word]
        assert Counter(re.findall(r"( [a-z]+),", said(control.ids[1 : control.context]))).most_common(1)[0][0] != word


# ---- key-value pairs


@pytest.fixture(scope="module")
def both() -> tuple[tasks.Task, tasks.Task]:
    return key_values(spell, START, 400, 3, 4, seed=9)


def pairs_of(probe: Probe) -> dict[str, str]:
    text = said(probe.ids[1 : probe.context])
    found = PAIR.findall(text)
    assert "".join(f"{key}:{value};" for key, value in found) == text and len(dict(found)) == len(found)
    return dict(found)


def test_both_modes_ask_the_same_of_the_same_contexts(both: tuple[tasks.Task, tasks.Task]) -> None:
    multi, single = both
    assert (multi.items, single.items, len(multi.probes), len(single.probes)) == (4, 4, 4, 12)
    assert multi.places == single.places == ("turn 1", "turn 2", "turn 3") and multi.longest <= 400
    fewest = len(multi.probes[0].ids)
    for probe in multi.probes:
        pairs = pairs_of(probe)
        fewest = min(fewest, len(pairs))
        asked = said(probe.ids[probe.context :])
        assert re.fullmatch(r"(\?[a-z]{3}:[a-z]{4};){2}\?[a-z]{3}:[a-z]{4}", asked)  # golden history: right answers only
        turns = re.findall(r"\?([a-z]{3}):([a-z]{4})", asked)
        assert all(pairs[key] == value for key, value in turns)
        assert scored(probe) == [value for _, value in turns] and [answer.place for answer in probe.answers] == [0, 1, 2]
        alone = [one for one in single.probes if one.item == probe.item]
        assert [said(one.ids[one.context :]) for one in alone] == [f"?{key}:{value}" for key, value in turns]
        assert all(one.ids[: one.context] == probe.ids[: probe.context] for one in alone)
        assert [scored(one) for one in alone] == [[value] for _, value in turns]
    assert multi.chance == pytest.approx(1 / fewest) and fewest > 30


def test_controls_give_the_asked_keys_values_of_others(both: tuple[tasks.Task, tasks.Task]) -> None:
    for task in both:
        for probe, control in zip(task.probes, task.controls, strict=True):
            reported, otherwise = pairs_of(probe), pairs_of(control)
            assert probe.answers == control.answers and probe.ids[probe.context :] == control.ids[control.context :]
            assert list(reported) == list(otherwise) and sorted(reported.values()) == sorted(otherwise.values())
            changed = {key for key in reported if reported[key] != otherwise[key]}
            asked = set(re.findall(r"\?([a-z]{3})", said(probe.ids[probe.context :])))
            assert asked <= changed and len(changed) == 6, "three keys and their three partners"


def test_answers_are_spelled_as_in_the_context() -> None:
    """Also if a tokenizer could merge a value with the text before it: here whole pieces are single tokens."""
    vocabulary: dict[str, int] = {}
    multi, _ = key_values(lambda text: [vocabulary.setdefault(text, len(vocabulary) + 10)], START, 60, 2, 2, seed=1)
    for probe in multi.probes:
        for answer in probe.answers:
            assert answer.last - answer.first == 1 and probe.ids[: probe.context].count(probe.ids[answer.first]) == 1


def test_a_seed_decides(both: tuple[tasks.Task, tasks.Task]) -> None:
    assert key_values(spell, START, 400, 3, 4, seed=9) == both
    assert key_values(spell, START, 400, 3, 4, seed=8)[0].probes[0].ids != both[0].probes[0].ids
    assert needle(spell, [spell(LETTERS)], PLAIN, 300, 2, 4) == needle(spell, [spell(LETTERS)], PLAIN, 300, 2, 4)


# ---- sources, and all of them together


def test_files_of_one_folder_are_one_source(tmp_path: Path) -> None:
    for name, text in (("books/a.txt", "one"), ("books/b.txt.gz", "two"), ("wiki/a.txt", "three")):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    found = sources([tmp_path / "books/a.txt", tmp_path / "wiki/a.txt", tmp_path / "books/b.txt.gz"])
    assert found == {"books": ["one", "two"], "wiki": ["three"]}


def test_without_files_the_standard_library_is_read() -> None:
    ((name, texts),) = sources([]).items()
    assert name == "standard library" and len(texts) == len(tasks.LIBRARY) and min(map(len, texts)) > 1000


def test_bad_files(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none.txt: cannot be read \(No such file or directory\)$"):
        read(tmp_path / "none.txt")
    for name, data in (("a.txt", b"\xff\xfe\x00"), ("a.gz", b"plain"), ("b.gz", gzip.compress(b"cut off here")[:-9])):
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InvalidInput, match=rf"{name}: cannot be read \(not UTF-8 text, or not gzip"):
            read(tmp_path / name)


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return Tokenizer(tiny_llama(tmp_path_factory.mktemp("tiny") / "llama"))


def test_all_tasks_fit_the_length(tokenizer: Tokenizer) -> None:
    made = tasks.build(tokenizer, {"one": [LETTERS], "two": [LETTERS]}, Wanted(255, 2, 2, 16), 255)
    assert [task.name for task in made] == ["one", "two", *tasks.NEEDLE, *tasks.FACTS, *tasks.PAIRS, *tasks.SHOTS, *tasks.OFTENEST]
    for task in made:
        assert task.items == 2 and task.longest <= 255
        chat = task.name in (*tasks.NEEDLE, *tasks.FACTS)  # its template writes no <s>
        assert chat or all(probe.ids[:1] == [1] for probe in (*task.probes, *task.controls)), "the checkpoint's <s> stands in front"
        for probe in task.probes:
            assert all(probe.context <= a.first < a.last <= len(probe.ids) for a in probe.answers)


@pytest.mark.parametrize(
    ("options", "reported"),
    [
        ({"length": 0}, "length = 0: must be 1 or more"),
        ({"count": 1}, "limit = 1: must be 2 or more"),
        ({"turns": 6}, "turns = 6: 1 to 5 is allowed"),
        ({"given": 0}, "given = 0: must be 1 or more"),
        ({"length": 300}, "length = 300: the context leaves 255"),
        ({"length": 60, "tasks": tasks.NEEDLE}, "length = 60: too short for a needle"),
        ({"length": 140, "tasks": tasks.FACTS}, "length = 140: too short for 5 facts"),
        ({"length": 2}, "length = 2: must be 68 or more, 64 of them given"),
        ({"length": 140, "tasks": tasks.PAIRS}, r"length = 140: too short for 5 turns, which take 10 pairs; \d fit"),
        ({"length": 9, "tasks": tasks.SHOTS}, "length = 9: too short for a line of examples"),
        ({"tasks": ("needles",)}, "task = 'needles': did you mean 'needle'"),
        ({"length": 255, "count": 99, "turns": 1}, None),
    ],
)
def test_what_cannot_be_made_is_one_line(tokenizer: Tokenizer, options: dict[str, int], reported: str | None) -> None:
    if reported is None:
        assert tasks.build(tokenizer, {"one": [LETTERS]}, Wanted(**options), 255)[0].items < 99  # as many as there are
        return
    with pytest.raises(InvalidInput, match=reported):
        tasks.build(tokenizer, {"one": [LETTERS]}, Wanted(**options), 255)


def test_too_little_text_is_named(tokenizer: Tokenizer) -> None:
    with pytest.raises(InvalidInput, match="texts: one: fewer than 2 pieces of 220 tokens"):
        tasks.build(tokenizer, {"one": [LETTERS[:250]]}, Wanted(220, 2, 2, tasks=("one", *tasks.NEEDLE)), 255)


def test_a_task_that_needs_longer_texts_is_left_out_with_a_reason(tokenizer: Tokenizer) -> None:
    left_out: list[str] = []
    made = tasks.build(tokenizer, {"one": [LETTERS]}, Wanted(200, 2, 2, 16), 255, left_out)
    assert {task.name for task in made} == {"one", *tasks.NEEDLE, *tasks.PAIRS, *tasks.SHOTS, *tasks.OFTENEST}
    assert len(left_out) == 1 and left_out[0].startswith("length = 200: too short for 2 facts")
