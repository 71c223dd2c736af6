from __future__ import annotations

import io
import json
import os
import pty
import re
import select
import signal
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import LLM, SamplingParams
from tests.checkpoints import tiny_llama
from tests.cli.conftest import Ran, start
from tests.models.tiny import edit

OPTIONS = ("--temperature", "0", "--max-tokens", "20", "--ignore-eos", "--dtype", "float32")


def piped(text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.stdin", io.StringIO(text))


def test_each_line_is_a_turn_of_one_conversation(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    llm, messages, replies = LLM(tiny, dtype="float32"), [{"role": "system", "content": "Be brief."}], ""
    for said in ("hello", "and now?"):
        messages.append({"role": "user", "content": said})
        reply = llm.chat(messages, SamplingParams(temperature=0, max_tokens=20, ignore_eos=True))[0].outputs[0].text
        messages.append({"role": "assistant", "content": reply})
        replies += reply if reply.endswith("\n") else reply + "\n"
    piped("hello\n\nand now?\n", monkeypatch)
    code, out, err = redraft("chat", tiny, "--system", "Be brief.", *OPTIONS)
    assert (code, out) == (0, replies)
    cached = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens cached", err)]
    assert cached[0] == 0
    assert cached[1] >= 32, "the first turn's pages serve the second"


def test_a_reply_is_as_long_as_the_checkpoint_says(redraft: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tiny_llama(tmp_path)
    edit(folder, "generation_config.json", max_new_tokens=3)
    (short,) = LLM(str(folder), dtype="float32").chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=3, ignore_eos=True)
    for words in ([], ["--max-tokens", "5"]):
        piped("hello\n", monkeypatch)
        code, out, _ = redraft("chat", str(folder), "--temperature", "0", "--ignore-eos", "--dtype", "float32", *words)
        assert code == 0 and out.startswith(short.outputs[0].text)
        assert (out.removesuffix("\n") == short.outputs[0].text.removesuffix("\n")) == (not words)


def test_commands(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped("hello\n", monkeypatch)
    once = redraft("chat", tiny, *OPTIONS)[1]
    piped("hello\n/clear\nhello\n/exit\nhello\n", monkeypatch)
    assert redraft("chat", tiny, *OPTIONS)[1] == once * 2


def test_bytes_that_are_no_text_are_refused_in_one_line(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python reads such a byte as half of a surrogate pair."""
    piped("/system \udcff\n", monkeypatch)
    for code, _, err in (redraft("chat", tiny, *OPTIONS), redraft("generate", tiny, "-p", "\udcff", *OPTIONS)):
        assert code == 2 and "half of a surrogate pair" in err and "Traceback" not in err


def test_the_system_message_can_be_set_and_removed(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped("hello\n", monkeypatch)
    plain = redraft("chat", tiny, *OPTIONS)[1]
    piped("hello\n", monkeypatch)
    brief = redraft("chat", tiny, "--system", "Be brief.", *OPTIONS)[1]
    assert plain != brief
    piped("/system Be brief.\nhello\n/clear\nhello\n/clear\n/system\nhello\n", monkeypatch)
    code, out, err = redraft("chat", tiny, *OPTIONS)
    assert (code, out) == (0, brief * 2 + plain)
    assert "system message set" in err and "system message removed" in err


def test_a_conversation_is_saved_as_a_line_of_prompts(
    redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    file = tmp_path / "talk.jsonl"
    piped(f"/system Be brief.\nhello\n/save {file}\n", monkeypatch)
    code, out, _ = redraft("chat", tiny, *OPTIONS)
    system, user, assistant = json.loads(file.read_text())["messages"]
    assert code == 0 and file.read_text().count("\n") == 1
    assert (system, user["content"]) == ({"role": "system", "content": "Be brief."}, "hello")
    assert assistant["role"] == "assistant" and assistant["content"].strip("\n") == out.strip("\n")
    piped(f"/save {file}\n", monkeypatch)
    before = file.read_text()
    code, _, err = redraft("chat", tiny, *OPTIONS)
    assert (code, err, file.read_text()) == (2, f"error: /save {file}: File exists\n", before)


@pytest.mark.parametrize(("line", "problem"), [("/clera", "/clera: unknown command; /help"), ("/save", "/save: a FILE is needed")])
def test_an_unknown_command_is_refused(
    redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch, line: str, problem: str
) -> None:
    piped(line + "\n", monkeypatch)
    code, out, err = redraft("chat", tiny, *OPTIONS)
    assert (code, out, err.count("\n")) == (2, "", 1) and problem in err


def test_text_that_begins_with_a_slash_can_be_sent(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped(" /clera\n/usr/bin/env is what?\n", monkeypatch)
    code, _, err = redraft("chat", tiny, *OPTIONS)
    assert (code, err.count("20 new tokens")) == (0, 2)


def test_help_lists_every_command(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped("/help\n", monkeypatch)
    _, out, err = redraft("chat", tiny, *OPTIONS)
    assert out == "" and all(f"/{name}" in err for name in ("help", "system", "clear", "save", "exit"))
    assert max(map(len, err.splitlines())) <= 80


def test_a_base_model_chats_by_a_template_of_the_user(redraft: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    file = tmp_path / "own.jinja"
    file.write_text("{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}")
    piped("hello\n", monkeypatch)
    base = str(tiny_llama(tmp_path / "base", chat=False))
    code, out, _ = redraft("chat", base, "--chat-template", str(file), *OPTIONS)
    assert code == 0 and out
    code, _, err = redraft("chat", base, "--chat-template", str(tmp_path / "none.jinja"))
    assert code == 2 and err.startswith("error: --chat-template = ") and err.count("\n") == 1


def test_the_first_reply_leaves_room_for_a_second(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped("hello\nand\n", monkeypatch)
    code, _, err = redraft("chat", tiny, "--temperature", "0", "--ignore-eos", "--dtype", "float32")
    assert (code, err.count("64 new tokens")) == (0, 2)


def test_a_conversation_too_long_is_one_line(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    piped("x" * 300, monkeypatch)
    code, out, err = redraft("chat", tiny, *OPTIONS)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert "max_model_len = 256" in err


def test_refused_without_a_chat_template(redraft: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    piped("", monkeypatch)
    code, out, err = redraft("chat", str(tiny_llama(tmp_path / "base", chat=False)))
    assert (code, out) == (2, "")
    assert err == "error: this checkpoint has no chat template: give plain prompts, or a template of your own\n"


@pytest.mark.usefixtures("ctrl_c")
def test_at_a_terminal_ctrl_c_ends_the_reply_and_ctrl_d_the_conversation(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "long", max_position_embeddings=65_536))
    ours, theirs = pty.openpty()
    options = ["--ignore-eos", "--temperature", "0", "--cache-memory", "100000000", "--max-tokens", "60000", "--draft", "none"]
    process = start("chat", model, *options, stdin=theirs, stdout=theirs, stderr=theirs, env={**os.environ, "TERM": "xterm"})
    os.close(theirs)
    seen = ""

    def until(wanted: str) -> None:
        """Reads on until `wanted`, a regular expression, is found in what came since the last call."""
        nonlocal seen
        fresh, deadline = "", time.monotonic() + 300
        while not re.search(wanted, fresh, re.DOTALL):
            assert select.select([ours], [], [], deadline - time.monotonic())[0], f"no {wanted!r} in {fresh!r} after {seen!r}"
            fresh += os.read(ours, 4096).decode(errors="replace")
        seen += fresh

    try:
        until(r"drafts by\s+none.*/help.*/exit or Ctrl-D.*> $")
        os.write(ours, b"/nothing\n")
        until("error: /nothing: unknown command.*> $")
        os.write(ours, b"hello\n")
        until("hello.{60}")
        process.send_signal(signal.SIGINT)  # as Ctrl-C does; the pty is not the controlling terminal of the process
        until("tokens cached.*> $")
        while not select.select([ours], [], [], 0.5)[0]:  # readline misses a signal that comes just before it waits
            process.send_signal(signal.SIGINT)
        until("> $")
        os.write(ours, b"\x04")
        assert process.wait(timeout=300) == 0
    finally:
        process.kill()
        process.wait()
        os.close(ours)
    assert "Traceback" not in seen
