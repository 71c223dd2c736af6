"""--lora of generate, chat and explain: their requests have the first adapter."""

from __future__ import annotations

import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import LLM
from tests import adapters, checkpoints
from tests.cli.conftest import Ran

OPTIONS = ("--temperature", "0", "--max-tokens", "12", "--ignore-eos", "--dtype", "float64", "--cache-memory", "4MB")


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return checkpoints.tiny_llama(tmp_path_factory.mktemp("base") / "own")


@pytest.fixture(scope="module")
def loras(base: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, ...]:
    folder = tmp_path_factory.mktemp("adapters")
    made = {name: adapters.make(folder / name, base, seed=seed, rank=3 + seed) for seed, name in enumerate(("x", "y"))}
    return tuple(word for name, path in made.items() for word in ("--lora", f"{name}={path}"))


@pytest.fixture(scope="module")
def llm(base: Path, loras: tuple[str, ...]) -> LLM:
    return LLM(str(base), lora=loras[1::2], dtype="float64", cache_memory=4_000_000)


def text(llm: LLM, name: str | None, prompt: str) -> str:
    return llm.generate(prompt, temperature=0, max_tokens=12, ignore_eos=True, lora=name)[0].outputs[0].text


def test_generate_uses_the_first_adapter(redraft: Callable[..., Ran], base: Path, loras: tuple[str, ...], llm: LLM) -> None:
    code, out, err = redraft("generate", str(base), "--raw", "-p", "the cat sat", *OPTIONS, *loras)
    assert code == 0, err
    assert out.removesuffix("\n") == text(llm, "x", "the cat sat").removesuffix("\n") != text(llm, None, "the cat sat")
    assert "lora x" in err


def test_a_line_of_prompts_chooses_its_adapter(
    redraft: Callable[..., Ran], base: Path, loras: tuple[str, ...], llm: LLM, tmp_path: Path
) -> None:
    lines = [{"prompt": "the cat", **more} for more in ({}, {"lora": "y"}, {"lora": "x"}, {"lora": None}, {"lora": "z"}, {"lora": 3})]
    (tmp_path / "in.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    code, out, _ = redraft("generate", str(base), "--raw", "--prompts", str(tmp_path / "in.jsonl"), *OPTIONS, *loras)
    found = [json.loads(line) for line in out.splitlines()]
    assert code == 1
    assert [one["text"] for one in found[:4]] == [text(llm, name, "the cat") for name in ("x", "y", "x", None)]
    assert found[4]["error"] == "line 5: lora = 'z': known: x, y"
    assert found[5]["error"].startswith("line 6: lora = 3: ")


def test_chat_uses_the_first_adapter(
    redraft: Callable[..., Ran], base: Path, loras: tuple[str, ...], llm: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    first, *_ = llm.chat([{"role": "user", "content": "hello"}], temperature=0, max_tokens=12, ignore_eos=True, lora="x")
    monkeypatch.setattr("sys.stdin", io.StringIO("hello\nand now?\nand then?\n"))
    code, out, err = redraft("chat", str(base), *OPTIONS, *loras)
    assert code == 0, err
    assert out.startswith(first.outputs[0].text)
    cached = [int(n) for n in re.findall(r"(\d+) of \d+ prompt tokens cached", err)]
    assert cached[0] == 0 and cached[-1] >= 32, "the keys of the first turns serve the last"


def test_explain_shows_the_adapters(redraft: Callable[..., Ran], base: Path, loras: tuple[str, ...]) -> None:
    code, out, err = redraft("explain", str(base), "--dtype", "float32", *loras)
    assert code == 0, err
    assert re.search(r"adapter x, which the request chose: ranks 3; [\d.]+ KiB; LoRA: .*2106\.09685", out)
    assert re.search(r"adapter y: ranks 4; ", out)
