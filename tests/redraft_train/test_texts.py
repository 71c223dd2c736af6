"""Prompts and their two sides; the texts that a model writes, and how a later run continues them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from redraft import LLM
from redraft.bench.prompts import Prompt
from redraft.errors import CheckpointError, InvalidInput
from redraft_train import texts
from redraft_train.texts import Writer
from tests.redraft_train.conftest import LINES


def test_a_text_file_has_a_prompt_a_line(llm: LLM, prompt_file: Path, tmp_path: Path) -> None:
    assert [prompt.prompt for prompt in texts.prompts(prompt_file, llm)] == LINES
    (tmp_path / "some.jsonl").write_text('"def f"\n{"turns": ["one", "two"]}\n')
    raw, chat = texts.prompts(tmp_path / "some.jsonl", llm)
    assert raw.prompt == "def f" and chat.turns == ["one", "two"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\n \n", "a.txt: holds no prompts"),
        ("a.txt", b"\xff", "a.txt: cannot be read .not UTF-8 text"),
        ("a.jsonl", b'{"prompt": 3}', "a.jsonl:1: prompt = 3: must be a text that is not empty"),
        ("a.jsonl", b"def f", "a.jsonl:1: not JSON"),
        ("missing.txt", None, "missing.txt: cannot be read .No such file"),
    ],
)
def test_a_bad_file_is_named(llm: LLM, tmp_path: Path, name: str, content: bytes | None, message: str) -> None:
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(InvalidInput, match=message):
        texts.prompts(tmp_path / name, llm)


def test_equal_prompts_are_on_one_side() -> None:
    found = [Prompt(f"{copy}-{i}", "all", prompt=f"text {i}") for copy in "ab" for i in range(60)]
    training, held = texts.split(found)
    assert len(held) == 6 and len(training) == 114  # a twentieth of 60 contents, each twice
    assert not {one.content for one in training} & {one.content for one in held}
    assert texts.split(found[::-1])[1] == held[::-1]
    with pytest.raises(InvalidInput, match="2 different ones or more are needed"):
        texts.split(found[:1] * 2)


def written(llm: LLM, file: Path, limit: int, prompts: list[Prompt] | None = None) -> list[texts.Text]:
    training, held = texts.split(prompts or [Prompt(str(i), "all", prompt=line) for i, line in enumerate(LINES)])
    return Writer(llm, file, training, held, max_tokens=12, seed=3).run(limit=limit)


def test_texts_are_what_the_model_writes(llm: LLM, tmp_path: Path) -> None:
    found = written(llm, tmp_path / "texts.jsonl", 14)
    assert [text.held for text in found] == [True] + [False] * 13
    assert [text.number for text in found[1:]] == [0] * 5 + [1] * 5 + [2] * 3
    assert {text.temperature for text in found if text.number == 0} == {0.0, 0.7}
    assert {text.temperature for text in found if text.number == 2} == {1.0}
    for text in found:
        ((first, last),) = text.answers
        assert text.tokens[:first] == llm.tokenizer.encode(LINES[int(text.prompt)]) and last == len(text.tokens)
        if text.temperature == 0:
            greedy = llm.generate({"prompt_token_ids": text.tokens[:first]}, temperature=0, max_tokens=12)[0].outputs[0]
            assert text.tokens[first:] == greedy.token_ids
    answers = [text.tokens for text in found if text.prompt == found[1].prompt]
    assert len({tuple(tokens) for tokens in answers}) == len(answers) > 1


def test_a_later_run_continues_a_file_that_was_cut(llm: LLM, tmp_path: Path) -> None:
    file = tmp_path / "texts.jsonl"
    whole = written(llm, file, 8)
    lines = file.read_bytes().splitlines(keepends=True)
    file.write_bytes(b"".join(lines[:5]) + lines[5][:20])
    assert written(llm, file, 8) == whole
    assert file.read_bytes().splitlines(keepends=True)[:5] == lines[:5] and len(texts.read(file)) == 8
    before = file.read_bytes()
    assert written(llm, file, 8) == whole and file.read_bytes() == before
    file.write_bytes(b"{}\n" + before)
    with pytest.raises(CheckpointError, match=r"texts.jsonl:1: not a text that redraft train wrote"):
        texts.read(file)


def test_without_time_both_sides_have_a_text(llm: LLM, tmp_path: Path) -> None:
    training, held = texts.split([Prompt(str(i), "all", prompt=line) for i, line in enumerate(LINES)])
    found = Writer(llm, tmp_path / "texts.jsonl", training, held, max_tokens=4).run(seconds=0)
    assert {text.held for text in found} == {True, False}


def test_answers_and_turns_are_cut_when_time_is_up(llm: LLM, tmp_path: Path) -> None:
    training, held = texts.split([Prompt(str(i), "all", turns=[line, "Why?", "How?"]) for i, line in enumerate(LINES)])
    tokens: list[int] = []
    found = Writer(llm, tmp_path / "texts.jsonl", training, held, max_tokens=400).run(seconds=0, tick=tokens.append)
    assert {text.held for text in found} == {True, False} and sum(tokens) == sum(text.written for text in found) < 400
    assert all(text.answers[-1][1] == len(text.tokens) for text in found)
    assert texts.read(tmp_path / "texts.jsonl") and not llm.engine.has_work


def test_turns_become_one_text(llm: LLM, tmp_path: Path) -> None:
    prompts = [Prompt("a", "all", turns=["What is a stack?", "And a queue?"]), Prompt("b", "all", turns=["Why?", "How?"])]
    for text in written(llm, tmp_path / "texts.jsonl", 2, prompts):
        said = llm.tokenizer.decode(text.tokens)
        assert said.count("Question:") == 2 + sum(llm.tokenizer.decode(text.tokens[a:b]).count("Question:") for a, b in text.answers)
        assert text.answers[-1][1] == len(text.tokens) and text.written == sum(b - a for a, b in text.answers)


def test_a_prompt_without_room_for_an_answer_is_left_out(llm: LLM, tmp_path: Path) -> None:
    prompts = [Prompt("long", "all", prompt="x = 1\n" * 2000), *(Prompt(str(i), "all", prompt=line) for i, line in enumerate(LINES))]
    assert {text.prompt for text in written(llm, tmp_path / "texts.jsonl", 7, prompts)} == {str(i) for i in range(len(LINES))}


def test_each_line_of_the_file_says_what_it_is(llm: LLM, tmp_path: Path) -> None:
    written(llm, tmp_path / "texts.jsonl", 2)
    for line in (tmp_path / "texts.jsonl").read_text().splitlines():
        assert set(json.loads(line)) == {"prompt", "number", "held", "temperature", "tokens", "answers"}
