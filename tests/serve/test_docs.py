"""docs/serving.md: its examples run, and its lists of fields match the server."""

from __future__ import annotations

import re
from pathlib import Path
from types import ModuleType

import pytest

from redraft.serve import llama_cpp_schema, messages_schema, ollama_schema, responses_schema, schema, score_schema
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
    schema.ResponseFormat,
    schema.JsonSchema,
    schema.StructuredOutputs,
    schema.Message,
    schema.ToolCall,
    schema.FunctionCall,
    schema.Tool,
    schema.Function,
    schema.ToolChoice,
    schema.Named,
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
    fields = {field.alias or name for body in BODIES for name, field in body.model_fields.items()}
    assert sorted(fields - set(re.findall(r"[`\"](\w+)[`\"]", PAGE))) == []
    refused = re.search(r"\*\*Refused by name\*\*, unless null, `\[\]` or false: (.*?)\.\n\n", PAGE, re.S)
    assert refused is not None
    assert set(re.findall(r"`(\w+)`", refused[1])) == set(schema.LACKING)
    fields_section = PAGE[PAGE.index("## Fields\n") : PAGE.index("**Refused by name**")]
    named = set(re.findall(r"`(\w+)`", fields_section))
    assert named <= fields | {"auto", "default", "text", "none", "last", "mean", "system", "developer", "user", "assistant", "tool"}


def test_every_field_of_responses_is_documented() -> None:
    section = PAGE[PAGE.index("## The Responses API") :].partition("\n## ")[0]
    fields, kinds = set[str](), [schema.Body]
    for kind in kinds:
        kinds += kind.__subclasses__()
        if kind.__module__ == responses_schema.__name__:
            fields |= {field.alias or name for name, field in kind.model_fields.items()}
    assert sorted(fields - set(re.findall(r"`(\w+)`", section)) - {"text"}) == []
    refused = re.search(r"\*\*Refused there by name\*\*, unless null, `\[\]` or false: (.*?)\.\n", section, re.S)
    assert refused is not None
    assert set(re.findall(r"`(\w+)`", refused[1])) == set(responses_schema.LACKING)


@pytest.mark.parametrize(
    ("section", "module", "body"),
    [
        ("## Anthropic's Messages API", messages_schema, messages_schema.Conversation),
        ("## Scores and rankings", score_schema, score_schema.Judged),
        ("## Ollama's clients", ollama_schema, ollama_schema.Options),
        ("## llama.cpp's clients", llama_cpp_schema, llama_cpp_schema.Options),
    ],
)
def test_every_field_of_other_interfaces_is_documented(section: str, module: ModuleType, body: type[schema.Body]) -> None:
    text = PAGE[PAGE.index(section) :].partition("\n## ")[0]
    kinds = [kind for kind in vars(module).values() if isinstance(kind, type) and issubclass(kind, schema.Body)]
    own = [kind for kind in kinds if kind.__module__ == module.__name__]
    fields = {field.alias or name for kind in own for name, field in kind.model_fields.items()}
    assert fields and sorted(fields - set(re.findall(r"`(\w+)`", text))) == []
    refused = re.search(r"\*\*Refused \w+ by name\*\*, unless [^:]*: (.*?)\.\n", text, re.S)
    assert refused is not None
    lacking = {name for kind in own for name in kind.lacking} - set(schema.LACKING)
    assert set(re.findall(r"`(\w+)`", refused[1])) == lacking and body.lacking.keys() <= lacking


def test_every_status_is_documented() -> None:
    assert {int(status) for status in re.findall(r"^\| (\d+) \|", PAGE, re.M)} == set(TYPES) - {405}
