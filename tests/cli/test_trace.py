"""`redraft generate --trace`: one page that opens offline."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.cli import trace
from tests.cli.conftest import Ran

OPTIONS = ("--raw", "--temperature", "0", "--max-tokens", "40", "--ignore-eos", "--dtype", "float32", "--draft", "token-recycling")


def parts(page: str) -> tuple[str, str, str, Any]:
    """The policy, the style, the script and the data of a page."""
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]*)"', page)
    style = re.search(r"<style>(.*?)</style>", page, re.S)
    data, script = re.findall(r"<script type=[^>]*>(.*?)</script>", page, re.S)
    assert policy and style
    return policy[1], style[1], script, json.loads(data)


def test_a_trace_holds_the_text_and_the_origin_of_each_token(redraft: Callable[..., Ran], tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    prompt = "</script><b>hello there"
    code, out, _ = redraft("generate", tiny, "--prompt", prompt, *OPTIONS, "--trace", str(path))
    assert code == 0
    page = path.read_text(encoding="utf-8")
    policy, style, script, data = parts(page)
    assert page.count("</script>") == 2 and "<b>" not in page
    for kind, text in (("script", script), ("style", style)):
        digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
        assert f"{kind}-src 'sha256-{digest}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy
    question, answer = data["turns"]
    assert question == {"role": "user", "content": prompt}
    (run,) = answer["runs"]
    assert "".join(piece["text"] for piece in run["pieces"]) == out.removesuffix("\n")
    tokens = [token for piece in run["pieces"] for token in piece["provenance"]]
    assert len(tokens) == 40
    assert {token["origin"] for token in tokens} == {"model", "token-recycling"}
    accepted = [node for piece in run["pieces"] for tree in piece["trees"] for node in tree["nodes"] if node["accepted"]]
    assert len(accepted) >= sum(token["origin"] != "model" for token in tokens) > 0
    assert len(tokens[0]["alternatives"]) == 4
    assert [entry.name for entry in tmp_path.iterdir()] == ["out.html"]


def test_several_texts_of_one_prompt_are_in_one_trace(redraft: Callable[..., Ran], tiny: str, tmp_path: Path) -> None:
    path = tmp_path / "out.html"
    assert redraft("generate", tiny, "--prompt", "hello", *OPTIONS, "--n", "2", "--trace", str(path))[0] == 0
    runs = parts(path.read_text(encoding="utf-8"))[3]["turns"][1]["runs"]
    assert [run["name"] for run in runs] == ["Text 1 of 2", "Text 2 of 2"]


def test_the_text_is_the_same_with_a_trace(redraft: Callable[..., Ran], tiny: str, tmp_path: Path) -> None:
    sampled = ("generate", tiny, "--prompt", "hello", "--raw", "--seed", "3", "--max-tokens", "20", "--dtype", "float32")
    assert redraft(*sampled)[1] == redraft(*sampled, "--trace", str(tmp_path / "out.html"))[1]


def test_a_trace_shows_one_prompt(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    prompts = tmp_path / "prompts.jsonl"
    prompts.write_text('"hello"\n')
    code, _, err = redraft("generate", "--prompts", str(prompts), "--trace", str(tmp_path / "out.html"))
    assert (code, err) == (2, "error: --trace and --prompts exclude each other: a trace shows one prompt\n")


def test_a_place_that_cannot_be_written_is_refused_before_the_model_loads(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    code, _, err = redraft("generate", "/no/such/model", "--prompt", "hello", "--trace", str(tmp_path / "none" / "out.html"))
    assert code == 2 and "trace = " in err and "there is no folder" in err
    code, _, err = redraft("generate", "/no/such/model", "--prompt", "hello", "--trace", str(tmp_path))
    assert code == 2 and "is a folder" in err


def test_a_trace_that_is_not_written_leaves_the_old_one(
    redraft: Callable[..., Ran], tiny: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "out.html"
    path.write_text("old")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("redraft.bench.files.os.replace", full)
    code, _, err = redraft("generate", tiny, "--prompt", "hello", *OPTIONS, "--trace", str(path))
    assert code == 2 and f"trace = {path}: No space left on device" in err
    assert [(entry.name, entry.read_text()) for entry in tmp_path.iterdir()] == [("out.html", "old")]


def test_the_scripts_of_a_trace_are_whole() -> None:
    script = "".join(trace._modules(trace.FIRST, []))
    assert not re.search(r"^(import|export)\b", script, re.M)
    assert "fetch(" not in script
    made = re.findall(r"^const (\$_\w+) = ", script, re.M)
    assert made[-1] == "$_recorded" and len(made) == len(set(made)) > 5
