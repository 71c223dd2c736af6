"""`redraft generate --prompts`: one line of results for each line, in order, even if some lines are wrong."""

from __future__ import annotations

import json
import signal
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft import LLM, SamplingParams, registry
from redraft.cli import batch
from tests.checkpoints import tiny_llama
from tests.cli.conftest import Ran, start

OPTIONS = ("--temperature", "0", "--max-tokens", "6", "--ignore-eos", "--dtype", "float32")


@pytest.fixture
def prompts(tmp_path: Path) -> Callable[..., Path]:
    def write(*lines: Any) -> Path:
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(b"\n".join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines))
        return path

    return write


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_each_form_of_a_line(redraft: Callable[..., Ran], tiny: str, prompts: Callable[..., Path], tmp_path: Path) -> None:
    talk, out = [{"role": "user", "content": "hello"}], tmp_path / "out.jsonl"
    file = prompts("hello", {"prompt": "hello", "id": 7}, {"messages": talk, "id": "m"}, {"prompt_token_ids": [5, 6, 7], "max_tokens": 3})
    code, stdout, err = redraft("generate", tiny, "--prompts", str(file), "--output", str(out), *OPTIONS)
    assert (code, stdout) == (0, "") and "4 of 4 lines" in err
    llm = LLM(tiny, dtype="float32")
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    answer = llm.chat(talk, params)[0].outputs[0]
    ids = llm.generate({"prompt_token_ids": [5, 6, 7]}, params.but(max_tokens=3))[0].outputs[0]
    found = read(out)
    assert [one["id"] for one in found] == [None, 7, "m", None]
    assert [one["token_ids"] for one in found] == [answer.token_ids] * 3 + [ids.token_ids]
    assert [one["text"] for one in found] == [answer.text] * 3 + [ids.text]
    assert {(one["finish_reason"], one["error"]) for one in found} == {("length", None)}
    assert found[3]["usage"] == {"prompt_tokens": 3, "completion_tokens": 3, "total_tokens": 6}
    assert [one["index"] for one in found] == [0, 1, 2, 3]
    assert set(found[0]) == {"index", "id", "text", "token_ids", "finish_reason", "usage", "seed", "error"}


WRONG: list[tuple[Any, str]] = [
    (b"{", "not JSON at column "),
    (b"", "not JSON"),
    (b'"\xff"', "not JSON"),
    (b'"\\ud83d"', "half of a surrogate pair"),
    (b"[" * 100_000, "not JSON"),
    (3, "a string or an object is needed, not 3"),
    ({"prompt": 3}, "prompt: a string is needed"),
    ({"prompt": ""}, "prompt is empty"),
    ({"prompt": "x" * 300}, "max_model_len = 256"),
    ({"max_tokens": 3}, "one of prompt, messages, prompt_token_ids is needed"),
    ({"prompt": "a", "messages": []}, "is needed, not prompt and messages"),
    ({"messages": [3]}, "messages: a list of objects"),
    ({"messages": [{"role": "user"}]}, "messages[0]"),
    ({"prompt_token_ids": [1, 9999]}, "prompt_token_ids[1] = 9999"),
    ({"prompt_token_ids": "a"}, "prompt_token_ids: a list is needed"),
    ({"prompt": "a", "temperature": -1}, "temperature = -1: must be at least 0"),
    ({"prompt": "a", "temprature": 1}, "unknown field 'temprature': did you mean 'temperature'"),
    ({"prompt": "a", "max_tokens": True}, "max_tokens = true"),
    ({"prompt": "a", "n": 2}, "unknown field 'n'"),
    ({"prompt": "a", "logprobs": 2}, "unknown field 'logprobs'"),
    ({"prompt": "a", "id": {}}, "id: a string or a whole number is needed"),
    ({"prompt": "a", "keep": "nonsense"}, "nonsense"),
]


def test_a_wrong_line_gets_an_error_and_the_others_finish(
    redraft: Callable[..., Ran], tiny: str, prompts: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(batch, "BLOCK", 5)  # several blocks, some of which hold errors only
    lines = ["first", *(line for line, _ in WRONG), {"prompt": "last", "id": None, "temperature": None}]
    code, out, err = redraft("generate", tiny, "--prompts", str(prompts(*lines)), *OPTIONS)
    found = [json.loads(line) for line in out.splitlines()]
    assert (code, len(found)) == (1, len(lines)) and f"{len(lines)} of {len(lines)} lines" in err and f"{len(WRONG)} with an error" in err
    for number, (one, (_, problem)) in enumerate(zip(found[1:-1], WRONG), 2):
        assert one["error"].startswith(f"line {number}: ") and problem in one["error"] and "\n" not in one["error"]
        assert (one["text"], one["token_ids"], one["finish_reason"]) == (None, None, None)
    assert [len(one["token_ids"]) for one in (found[0], found[-1])] == [6, 6]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--output", "OLD"], "--output = OLD: exists; --overwrite replaces it"),
        (["--output", "FILE", "--overwrite"], "is the file of --prompts"),
        (["--output", "none/out.jsonl"], "there is no folder none"),
        (["--prompt", "x"], "--prompt and --prompts exclude each other"),
        (["--n", "2"], "--n and --prompts"),
    ],
)
def test_what_cannot_be_done_is_refused_before_loading(
    redraft: Callable[..., Ran], prompts: Callable[..., Path], tmp_path: Path, arguments: list[str], problem: str
) -> None:
    file, old = prompts("x"), tmp_path / "old.jsonl"
    old.write_text("precious")
    named = {"OLD": str(old), "FILE": str(file)}
    code, out, err = redraft("generate", "none/model", "--prompts", str(file), *(named.get(word, word) for word in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1) and problem.replace("OLD", str(old)) in err
    assert old.read_text() == "precious" and json.loads(file.read_text()) == "x"


def test_every_scheduler_writes_the_same_lines_in_order(
    redraft: Callable[..., Ran], tiny: str, prompts: Callable[..., Path], tmp_path: Path
) -> None:
    stems = ["the first document is about the sea and ships ", "the second one has to do with rivers and boats "]
    file, found = prompts(*(stems[i % 2] + f"question {i}" for i in range(6))), []
    for scheduler in registry.METHODS["sched"]:
        out = tmp_path / f"{scheduler}.jsonl"
        assert (
            redraft("generate", tiny, "--prompts", str(file), "--output", str(out), "--scheduler", scheduler, "--seed", "3", *OPTIONS)[0]
            == 0
        )
        found.append(read(out))
    assert [one["index"] for one in found[0]] == [*range(6)] and all(lines == found[0] for lines in found)


def test_overwrite_replaces_a_file(redraft: Callable[..., Ran], tiny: str, prompts: Callable[..., Path], tmp_path: Path) -> None:
    old = tmp_path / "old.jsonl"
    old.write_text("old\n" * 9)
    assert redraft("generate", tiny, "--prompts", str(prompts("x")), "--output", str(old), "--overwrite", *OPTIONS)[0] == 0
    assert len(read(old)) == 1


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_keeps_whole_lines(tmp_path: Path, prompts: Callable[..., Path]) -> None:
    model, out = str(tiny_llama(tmp_path / "long", max_position_embeddings=65_536)), tmp_path / "out.jsonl"
    file = prompts({"prompt": "a", "max_tokens": 2}, {"prompt": "b", "max_tokens": 60_000}, {"prompt": "c", "max_tokens": 2})
    options = ("--ignore-eos", "--draft", "none", "--cache-memory", "100MB", "--raw")
    process = start("generate", model, "--prompts", str(file), "--output", str(out), *options, stderr=subprocess.PIPE)
    try:
        while process.poll() is None and not (out.exists() and out.read_text()):
            time.sleep(0.05)
        process.send_signal(signal.SIGINT)
        _, err = process.communicate(timeout=300)
    finally:
        process.kill()
    assert process.returncode == 130 and b"1 of 3 lines" in err, err
    (one,) = read(out)
    assert (one["finish_reason"], len(one["token_ids"])) == ("length", 2)
