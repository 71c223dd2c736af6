"""Options are the fields of config.py. None is missing, and given values arrive unchanged."""

from __future__ import annotations

from typing import Any

import pytest
import typer
from typer.testing import CliRunner

from redraft.cli.options import DEFAULTS, ENGINE, NOT_OFFERED, SAMPLING, Given, engine_config, takes
from redraft.config import EngineConfig, SamplingParams
from redraft.errors import InvalidInput


def parsed(*arguments: str) -> dict[str, Any]:
    got: dict[str, Any] = {}

    @takes(sampling=SAMPLING, engine=ENGINE)
    def verb(name: str = "it", *, sampling: Given, engine: Given) -> None:
        """Help."""
        got.update(name=name, sampling=sampling, engine=engine)

    app = typer.Typer()
    app.command()(verb)
    done = CliRunner().invoke(app, list(arguments))
    assert done.exit_code == 0, done.output
    return got


def test_only_what_was_given_arrives() -> None:
    assert parsed() == {"name": "it", "sampling": {}, "engine": {}}
    assert parsed("--seed", "0", "--temperature", "0", "--draft-rows", "0")["sampling"] == {"seed": 0, "temperature": 0.0}


def test_values_have_the_types_of_their_fields() -> None:
    got = parsed(
        *("--name", "x", "--stop", "a,b", "--stop", "c", "--stop-token-ids", "3", "--ignore-eos", "--top-p", "0.5", "--max-tokens", "7"),
        *("--no-prefix-sharing", "--draft", "copyspec:gamma=2", "--draft-total", "9", "--dtype", "float64", "--cache-memory", "5"),
    )
    params = SamplingParams(**got["sampling"])
    assert params == SamplingParams(stop=("a,b", "c"), stop_token_ids=(3,), ignore_eos=True, top_p=0.5, max_tokens=7)
    expected = EngineConfig.of(prefix_sharing=False, draft="copyspec:gamma=2", draft_total=9, dtype="float64", cache_memory=5)
    assert engine_config("embedded", got["engine"]) == expected


@pytest.mark.parametrize(
    ("text", "size"),
    [("2GB", 2 * 10**9), ("512MiB", 512 << 20), ("1.5 gib", 3 << 29), ("64kb", 64_000), ("1TiB", 1 << 40), ("1000", 1000), ("7B", 7)],
)
def test_cache_memory_takes_a_unit(text: str, size: int) -> None:
    got = parsed("--cache-memory", text)
    assert engine_config("embedded", got["engine"]).cache.memory == EngineConfig.of(cache_memory=text).cache.memory == size
    assert EngineConfig.of(cache_memory=size).cache.memory == size


@pytest.mark.parametrize("value", ["2G", "GB", "-1GB", "1.5", "1e9", "", "0x10", "9" * 5000, True, [1]])
def test_other_sizes_are_refused(value: Any) -> None:
    with pytest.raises(InvalidInput, match=r"CacheConfig\.memory = .*a whole number of bytes, or a size in KB") as raised:
        EngineConfig.of(cache_memory=value)
    assert "\n" not in str(raised.value)


def test_every_field_has_an_option_with_help() -> None:
    assert set(SamplingParams.model_fields) - set(SAMPLING.fields) == set(NOT_OFFERED)
    assert set(EngineConfig._homes()) - set(ENGINE.fields) == {"model"}
    assert set(ENGINE.fields) <= set(EngineConfig._homes())
    assert [name for group in (SAMPLING, ENGINE) for name, field in group.fields.items() if not field.description and name != "dtype"] == []


def test_drafting_is_on_by_default() -> None:
    assert engine_config("embedded", {}).draft == DEFAULTS["draft"] == "auto"
    assert engine_config("embedded", {"draft": "none"}).draft == "none"
