import json
from collections import Counter
from pathlib import Path

import pytest

from redraft.bench.prompts import Prompt, load
from redraft.errors import InvalidInput


def written(folder: Path, *lines: object) -> Path:
    path = folder / "p.jsonl"
    path.write_text("".join((line if isinstance(line, str) else json.dumps(line)) + "\n" for line in lines))
    return path


# our suite


def test_the_suite_has_ten_prompts_in_each_category() -> None:
    prompts = load()
    names = ["code-completion", "code-edit", "chat", "summary", "document-qa", "writing"]
    assert Counter(p.category for p in prompts) == dict.fromkeys(names, 10)
    for p in prompts:
        assert [p.prompt, p.messages, p.turns].count(None) == 2
        assert (p.prompt is None) == (p.category == "chat")


def test_the_suite_is_short_enough_for_a_small_context() -> None:
    texts = [p.prompt or "\n".join(p.turns or [m["content"] for m in p.messages or []]) for p in load()]
    assert len(set(texts)) == 60
    assert max(map(len, texts)) < 2000 and min(map(len, texts)) >= 100  # characters; about 3.6 a token


def test_edits_begin_the_rewritten_code() -> None:
    for p in load(categories=["code-edit"]):
        assert p.prompt is not None
        before, after = p.prompt.split("# Before:")[1].split("# After:")
        assert 0 < len(after) < len(before) and p.prompt.endswith("\n")


# the three forms


def test_forms(tmp_path: Path) -> None:
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    path = written(
        tmp_path,
        {"id": "a", "category": "c", "prompt": "Once"},
        "",
        {"messages": messages},
        {"question_id": 81, "category": "writing", "turns": ["One", "Two"], "reference": ["1", "2"]},
    )
    assert (
        load(path)
        == load(str(path))
        == [
            Prompt("a", "c", prompt="Once"),
            Prompt("3", "all", messages=messages),
            Prompt("81", "writing", turns=["One", "Two"]),
        ]
    )


def test_line_separators_inside_a_text(tmp_path: Path) -> None:
    path = tmp_path / "p.jsonl"
    path.write_text('{"prompt": "a\u2028b\x85c"}\r\n', encoding="utf-8")
    assert [p.prompt for p in load(path)] == ["a\u2028b\x85c"]


def test_the_files_of_humaneval_are_read_as_they_are(tmp_path: Path) -> None:
    line = {"task_id": "HumanEval/0", "prompt": "def f():", "entry_point": "f", "canonical_solution": "    pass", "test": "f()"}
    assert load(written(tmp_path, line)) == [Prompt("HumanEval/0", "all", prompt="def f():")]


# choosing


def test_turns_and_chat(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "Hello"}]
    path = written(tmp_path, {"prompt": "Once"}, {"messages": messages}, {"turns": ["One", "Two", "Three"]})
    assert [p.turns for p in load(path, turns=2)] == [None, None, ["One", "Two"]]
    assert [(p.prompt, p.turns) for p in load(path, turns=1, chat=True)] == [(None, ["Once"]), (None, None), (None, ["One"])]
    assert load(path, chat=True)[1].messages == messages
    with pytest.raises(InvalidInput, match="turns = 0: must be 1 or more"):
        load(path, turns=0)


def test_other_prompts_are_those_with_another_text(tmp_path: Path) -> None:
    lines = [{"id": f"{c}{i}", "category": c, "turns": [f"{c} {i}", "more"]} for c in "ab" for i in range(4)]
    path = written(tmp_path, *lines)
    measured = load(path, limit=3, turns=1)
    others = load(path, limit=4, turns=1, without=measured)
    assert [p.id for p in measured] == ["a0", "a1", "b0"] and [p.id for p in others] == ["a2", "a3", "b1", "b2"]
    renamed = [Prompt("other", "c", turns=p.turns) for p in load(path)]
    with pytest.raises(InvalidInput, match="holds no other prompts"):
        load(path, without=renamed)


@pytest.fixture
def mixed(tmp_path: Path) -> Path:
    ids = ["a0", "a1", "a2", "a3", "b0", "c0", "c1", "c2"]
    return written(tmp_path, *({"id": i, "category": i[0], "prompt": "x"} for i in ids))


@pytest.mark.parametrize(
    ("limit", "ids"),
    [(1, "a0"), (2, "a0 b0"), (3, "a0 b0 c0"), (5, "a0 a1 b0 c0 c1"), (7, "a0 a1 a2 b0 c0 c1 c2"), (8, None), (99, None)],
)
def test_a_limit_takes_evenly(mixed: Path, limit: int, ids: str | None) -> None:
    assert [p.id for p in load(mixed, limit=limit)] == (ids.split() if ids else [p.id for p in load(mixed)])


def test_categories(mixed: Path) -> None:
    assert [p.id for p in load(mixed, ["c", "b"])] == ["b0", "c0", "c1", "c2"]
    assert [p.id for p in load(mixed, ["c", "b"], limit=3)] == ["b0", "c0", "c1"]


# errors


def test_a_text_alone_is_a_prompt(tmp_path: Path) -> None:
    """As `generate --prompts` takes it."""
    (tmp_path / "p.jsonl").write_text('"class A"\n{"prompt": "def b"}\n')
    assert [(prompt.id, prompt.prompt) for prompt in load(tmp_path / "p.jsonl")] == [("1", "class A"), ("2", "def b")]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", r"p.jsonl:2: not JSON \(.*\)$"),
        ("[" * 100_000, r"p.jsonl:2: not JSON that can be read"),
        ('{"prompt": "a", "reference": ' + "1" * 5000 + "}", r"p.jsonl:2: not JSON that can be read"),
        ("[1]", r"p.jsonl:2: \[1\] is not an object$"),
        ({"promt": "x"}, r"p.jsonl:2: unknown key 'promt'; did you mean 'prompt'\?$"),
        ({"id": "b"}, r"p.jsonl:2: has no prompt; exactly one of prompt, messages, turns is needed$"),
        ({"prompt": "x", "turns": ["x"]}, r"p.jsonl:2: has prompt and turns; exactly one"),
        ({"prompt": ""}, r'p.jsonl:2: prompt = "": must be a text that is not empty$'),
        ({"prompt": 7}, r"p.jsonl:2: prompt = 7: must be"),
        ({"turns": []}, r"p.jsonl:2: turns = \[\]: must be a list of texts"),
        ({"turns": "one"}, r'p.jsonl:2: turns = "one": must be'),
        ({"turns": ["x", ""]}, r"p.jsonl:2: turns = .*: must be"),
        ({"messages": []}, r"p.jsonl:2: messages = \[\]: must be a list of"),
        ({"messages": [{"role": "robot", "content": "x"}]}, r"p.jsonl:2: messages = .*system \| user \| assistant"),
        ({"messages": [{"role": "user"}]}, r"p.jsonl:2: messages = .*: must be"),
        ({"messages": [{"role": ["user"], "content": "x"}]}, r"p.jsonl:2: messages = .*: must be"),
        ({"id": "a", "prompt": "x"}, r"p.jsonl:2: id 'a' is used twice$"),
    ],
)
def test_bad_lines(tmp_path: Path, line: object, message: str) -> None:
    path = written(tmp_path, {"id": "a", "prompt": "x"}, line)
    with pytest.raises(InvalidInput, match=message) as caught:
        load(path)
    assert "\n" not in str(caught.value)


def test_bad_files_and_choices(tmp_path: Path, mixed: Path) -> None:
    with pytest.raises(InvalidInput, match=r"none.jsonl: cannot be read \(No such file or directory\)$"):
        load(tmp_path / "none.jsonl")
    with pytest.raises(InvalidInput, match=r"cannot be read \(Is a directory\)$"):
        load(tmp_path)
    (tmp_path / "latin.jsonl").write_bytes(b'{"prompt": "\xe9"}')
    with pytest.raises(InvalidInput, match=r"not UTF-8 text"):
        load(tmp_path / "latin.jsonl")
    (tmp_path / "empty.jsonl").write_text("\n")
    with pytest.raises(InvalidInput, match=r"holds no prompts$"):
        load(tmp_path / "empty.jsonl")
    with pytest.raises(InvalidInput, match=r"^no category 'd': known: a, b, c$"):
        load(mixed, ["d"])
    with pytest.raises(InvalidInput, match=r"^limit = 0: must be 1 or more$"):
        load(mixed, limit=0)
