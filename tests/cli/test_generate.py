from __future__ import annotations

import io
import re
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import LLM, SamplingParams
from redraft.cli.generate import PROMPT
from redraft.cli.stream import PICTURES
from tests.checkpoints import tiny_llama
from tests.cli.conftest import Ran, start

ANSI = re.compile("\x1b\\[[0-9;]*m")
STATS = re.compile(
    r"(\d+) new tokens, [\d.]+ tokens/s, mean acceptance length ([\d.]+)\n"
    r"(?:stopped where drafts did not pay: [^:]* steps\n)?"  # the line may be broken anywhere
    r"(?:native|torch|numpy), (\S+), same-text, (greedy|seed \d+), (raw prompt|chat template)\n"
)


@pytest.fixture(scope="module")
def texts(tiny: str) -> list[str]:
    """Two samples of the same request by the Python interface, without drafts."""
    params = SamplingParams(n=2, temperature=1, seed=5, max_tokens=60, ignore_eos=True)
    return [output.text for output in LLM(tiny, dtype="float32").generate("hello there", params)[0].outputs]


SAMPLED = ("--raw", "--temperature", "1", "--seed", "5", "--max-tokens", "60", "--ignore-eos", "--dtype", "float32")


def test_a_pipe_gets_the_text_and_nothing_else(redraft: Callable[..., Ran], tiny: str, texts: list[str]) -> None:
    code, out, err = redraft("generate", tiny, "--prompt", "hello there", "--draft", "token-recycling", *SAMPLED)
    assert (code, out.removesuffix("\n")) == (0, texts[0].removesuffix("\n"))
    assert out.endswith("\n")
    tokens, length, method, draw, _ = STATS.fullmatch(err).groups()  # type: ignore[union-attr]
    assert (tokens, method, draw) == ("60", "token-recycling", "seed 5")
    assert 1 <= float(length) < 16


def test_several_texts_come_one_after_the_other(redraft: Callable[..., Ran], tiny: str, texts: list[str]) -> None:
    _, out, err = redraft("generate", tiny, "--prompt", "hello there", "--n", "2", *SAMPLED)
    ended = [text if text.endswith("\n") else text + "\n" for text in texts]
    assert out == f"[1/2]\n{ended[0]}[2/2]\n{ended[1]}"
    assert err.startswith("120 new tokens")


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (("--keep", "streaming-llm:recent=6"), ", auto, streaming-llm:recent=6, lossy, "),
        (("--cache-policy", "keep=streaming-llm:recent=6"), ", auto, streaming-llm:recent=6, lossy, "),
        (("--cache-policy", "keep=streaming-llm:recent=6", "--keep", "none"), ", auto, same-text, "),
    ],
)
def test_the_last_line_names_the_cache_policy_that_ran(redraft: Callable[..., Ran], tiny: str, given: tuple[str, ...], said: str) -> None:
    _, _, err = redraft("generate", tiny, "--prompt", "hello there", *given, *SAMPLED)
    assert said in " ".join(err.split())


def test_a_terminal_shows_accepted_drafts_green(
    redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch, texts: list[str]
) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("TERM", "xterm-256color")
    arguments = (
        "generate",
        tiny,
        "--prompt",
        "hello there",
        "--raw",
        "--temperature",
        "0",
        "--max-tokens",
        "120",
        "--ignore-eos",
        "--dtype",
        "float64",
        "--draft",
        "token-recycling",
    )
    _, out, err = redraft(*arguments)
    green = re.findall("\x1b\\[32m(.*?)\x1b\\[0m", out, re.DOTALL)
    assert green, "the tiny model's greedy text is known to hold accepted drafts"
    assert float(STATS.fullmatch(err)[2]) > 1  # type: ignore[index]
    plain = LLM(tiny, dtype="float64").generate("hello there", SamplingParams(temperature=0, max_tokens=120, ignore_eos=True))
    assert ANSI.sub("", out) == "hello there" + plain[0].outputs[0].text.translate(PICTURES) + "\n"
    assert "\x1b" in plain[0].outputs[0].text, "or this does not show that a model cannot steer the terminal"
    _, out, _ = redraft(*arguments, "--draft", "none")
    assert "\x1b[32m" not in out
    monkeypatch.setenv("NO_COLOR", "1")
    _, out, _ = redraft(*arguments)
    assert "\x1b[32m" not in out


def test_the_prompt_may_be_piped_in(redraft: Callable[..., Ran], tiny: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = ("--raw", "--temperature", "0", "--max-tokens", "20", "--ignore-eos", "--dtype", "float32")
    for piped, prompt in (("two\nlines\n", "two\nlines"), ("", PROMPT[:200])):
        monkeypatch.setattr("redraft.cli.generate.PROMPT", PROMPT[:200])
        monkeypatch.setattr("sys.stdin", io.StringIO(piped))
        assert redraft("generate", tiny, *options)[1] == redraft("generate", tiny, "--prompt", prompt, *options)[1] != ""


def test_a_stop_string_ends_the_text(redraft: Callable[..., Ran], tiny: str, texts: list[str]) -> None:
    stop = texts[0][20:23]
    _, out, _ = redraft("generate", tiny, "--prompt", "hello there", *SAMPLED, "--stop", stop)
    assert out == texts[0][: texts[0].index(stop)] + "\n"


@pytest.mark.usefixtures("ctrl_c")
def test_ctrl_c_prints_the_statistics_and_exits_130(tmp_path: Path) -> None:
    model = str(tiny_llama(tmp_path / "long", max_position_embeddings=65_536))
    pipes = {"stdin": subprocess.DEVNULL, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    process = start("generate", model, "--prompt", "x", "--ignore-eos", "--temperature", "0", "--cache-memory", "100000000", **pipes)
    assert process.stdout is not None
    assert process.stdout.read(20)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=300)
    assert process.returncode == 130
    assert out.endswith(b"\n")
    found = STATS.fullmatch(err.decode())
    assert found is not None, err
    assert 0 < int(found[1]) < 65_000


def test_a_chat_template_is_used_unless_raw(redraft: Callable[..., Ran], tiny: str, tmp_path: Path) -> None:
    params, options = (
        SamplingParams(temperature=0, max_tokens=12, ignore_eos=True),
        ("--temperature", "0", "--max-tokens", "12", "--ignore-eos"),
    )
    llm = LLM(tiny, dtype="float32")
    answer = llm.chat([{"role": "user", "content": "hello"}], params)[0].outputs[0].text
    continued = llm.generate("hello", params)[0].outputs[0].text
    assert answer != continued, "or this shows nothing"
    _, out, err = redraft("generate", tiny, "--prompt", "hello", "--dtype", "float32", *options)
    assert (out.removesuffix("\n"), STATS.fullmatch(err)[5]) == (answer.removesuffix("\n"), "chat template")  # type: ignore[index]
    _, out, err = redraft("generate", tiny, "--prompt", "hello", "--dtype", "float32", "--raw", *options)
    assert (out.removesuffix("\n"), STATS.fullmatch(err)[5]) == (continued.removesuffix("\n"), "raw prompt")  # type: ignore[index]
    base = str(tiny_llama(tmp_path / "base", chat=False))
    assert redraft("generate", base, "--prompt", "hello", *options)[2].endswith("raw prompt\n")


def test_a_template_of_the_user_is_used(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    base, file = str(tiny_llama(tmp_path / "base", chat=False)), tmp_path / "own.jinja"
    file.write_text("<{{ messages[0].content }}>")
    options = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos")
    by_template = redraft("generate", base, "--prompt", "hello", "--chat-template", str(file), *options)
    assert by_template[2].endswith("chat template\n")
    llm = LLM(base)
    ids = llm.tokenizer.encode("<hello>", special=False)
    text = llm.generate({"prompt_token_ids": ids}, SamplingParams(temperature=0, max_tokens=12, ignore_eos=True))[0].outputs[0].text
    assert by_template[1].removesuffix("\n") == text.removesuffix("\n")


def test_statistics_fit_80_columns(redraft: Callable[..., Ran], tiny: str) -> None:
    policies = ("--keep", "streaming-llm:recent=64", "--depth", "layer-skip:speedup=1.2", "--quant", "int8")
    code, _, err = redraft("generate", tiny, "--prompt", "hello", *policies, "--max-tokens", "3", "--verify", "coupled")
    assert code == 0 and "layer-skip:speedup=1.2" in err
    assert max(map(len, err.splitlines())) <= 80


def test_what_stands_between_two_texts(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    marked = str(tiny_llama(tmp_path / "marked", marks=("<fim_prefix>", "<fim_suffix>", "<fim_middle>")))
    sampled = ("--temperature", "0", "--max-tokens", "8", "--ignore-eos", "--dtype", "float32")
    code, out, err = redraft("generate", marked, "--prompt", "def ", "--suffix", "():", *sampled)
    (expected,) = LLM(marked, dtype="float32").generate({"prompt": "def ", "suffix": "():"}, temperature=0, max_tokens=8, ignore_eos=True)
    assert (code, out.removesuffix("\n")) == (0, expected.outputs[0].text.removesuffix("\n"))
    assert "filled in the middle" in err


def test_a_suffix_needs_a_model_with_marks_and_one_prompt(redraft: Callable[..., Ran], tiny: str, tmp_path: Path) -> None:
    code, _, err = redraft("generate", tiny, "--prompt", "a", "--suffix", "b")
    assert code == 1 and "suffix: this model has no tokens that mark the text" in err
    file = tmp_path / "prompts.jsonl"
    file.write_text('"a"\n')
    _, _, err = redraft("generate", tiny, "--prompts", str(file), "--suffix", "b")
    assert "--suffix and --prompts exclude each other" in err
