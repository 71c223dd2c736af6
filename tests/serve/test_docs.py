"""docs/serving.md: its examples run, and its lists of fields match the server."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from redraft.serve import schema
from redraft.serve.errors import TYPES
from tests.serve.live import Live

README = (Path(__file__).parents[2] / "README.md").read_text(encoding="utf-8")
PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text(encoding="utf-8")
BODIES = (
    schema.CompletionRequest,
    schema.ChatRequest,
    schema.EmbeddingRequest,
    schema.TokenizeRequest,
    schema.DetokenizeRequest,
    schema.AdapterRequest,
    schema.StreamOptions,
    schema.SpeculationChoice,
    schema.CacheChoice,
    schema.Message,
    schema.ToolCall,
    schema.FunctionCall,
)


def test_its_examples_run_one_after_the_other(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    names: dict[str, object] = {}
    for block in re.findall(r"```python\n(.*?)```", PAGE, re.S):
        exec(compile(block.replace("http://localhost:8000", live.url), "serving.md", "exec"), names)
    names["client"].close()  # type: ignore[attr-defined]
    printed = capsys.readouterr().out.splitlines()
    assert printed[-1] == "top_q unknown field 'top_q'; did you mean 'top_p'?"
    assert "24" in printed
    assert "320" in printed


def test_the_example_of_the_readme_runs(live: Live, capsys: pytest.CaptureFixture[str]) -> None:
    (block,) = [code for code in re.findall(r"```python\n(.*?)```", README, re.S) if "base_url" in code]
    names: dict[str, object] = {}
    exec(compile(block.replace("http://127.0.0.1:8000", live.url), "README.md", "exec"), names)
    names["client"].close()  # type: ignore[attr-defined]
    assert capsys.readouterr().out.strip()


def test_every_field_is_documented_and_no_other() -> None:
    fields = {name for body in BODIES for name in body.model_fields}
    assert sorted(fields - set(re.findall(r"[`\"](\w+)[`\"]", PAGE))) == []
    refused = re.search(r"\*\*Refused by name\*\*, unless null, `\[\]` or false: (.*?)\.\n\n", PAGE, re.S)
    assert refused is not None
    assert set(re.findall(r"`(\w+)`", refused[1])) == set(schema.LACKING)
    fields_section = PAGE[PAGE.index("## Fields\n") : PAGE.index("**Refused by name**")]
    named = set(re.findall(r"`(\w+)`", fields_section))
    assert named <= fields | {"auto", "default", "text", "none", "last", "mean", "system", "developer", "user", "assistant", "tool"}


def test_every_status_is_documented() -> None:
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", PAGE, re.M)} == set(TYPES) - {405}
