"""Prefixes on disk behind a server: found after a restart by their tenant only, counted, and dropped when prefixes are reset."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import pytest

from redraft import LLM
from tests.serve.live import Live

KEYS = ("key-one", "key-two")
PROMPT = "def add(a, b):\n    return a + b\n\n\n" * 8
OPTIONS: dict[str, Any] = {"max_model_len": 256, "cache_memory": "8MB", "threads": 1, "draft": "none"}


@contextmanager
def serving(folder: Path | None, keys: tuple[str, ...] = KEYS) -> Iterator[Live]:
    kept = {} if folder is None else {"prefix_cache_dir": str(folder)}
    with Live(LLM("embedded", **OPTIONS, **kept), api_key=keys) as made:
        yield made
        made.settle()
        if (disk := made.llm.runner.disk) is not None:
            assert disk.flush()


def ask(live: Live, key: str, **fields: Any) -> dict[str, Any]:
    body = {"model": "embedded", "prompt": PROMPT, "max_tokens": 4, "temperature": 0, **fields}
    answer = httpx.post(f"{live.url}/v1/completions", json=body, headers={"Authorization": f"Bearer {key}"}, timeout=60)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def cached(reply: dict[str, Any]) -> tuple[int, int]:
    """Tokens found in the prefix cache, and those of them that were on disk."""
    return reply["usage"]["prompt_tokens_details"]["cached_tokens"], reply["metrics"]["disk_tokens"]


def figure(live: Live, name: str) -> float:
    lines = httpx.get(f"{live.url}/metrics", headers={"Authorization": f"Bearer {KEYS[0]}"}).text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"redraft:{name}{{"))


def test_a_restart(tmp_path: Path) -> None:
    with serving(tmp_path / "kept") as first:
        before = ask(first, KEYS[0])
        salted = ask(first, KEYS[0], cache_salt="a")
        assert cached(before) == cached(salted) == (0, 0) and before["metrics"]["disk_seconds"] == 0
        assert httpx.get(f"{first.url}/server_info", headers={"Authorization": f"Bearer {KEYS[0]}"}).json()["cache"]["on_disk"]
    with serving(tmp_path / "kept") as again:
        assert figure(again, "prefix_cache_disk_bytes") > 0
        other = ask(again, KEYS[1])
        assert cached(other) == (0, 0)  # nor would the time tell it of the first tenant's prompt
        found = ask(again, KEYS[0])
        count = found["usage"]["prompt_tokens"] // 32 * 32
        assert cached(found) == (count, count) and found["metrics"]["disk_seconds"] > 0
        assert cached(ask(again, KEYS[0])) == (count, 0)
        assert cached(ask(again, KEYS[0], cache_salt="b")) == (0, 0)
        assert cached(ask(again, KEYS[0], cache_salt="a")) == (count, count)
        assert found["choices"] == other["choices"] == before["choices"]
        assert figure(again, "prefix_cache_disk_hits_total") == 2 * count and figure(again, "prefix_cache_disk_seconds_total") > 0
        assert again.llm.runner.disk is not None and again.llm.runner.disk.flush()
        assert figure(again, "prefix_cache_disk_written_pages_total") == 2 * (count // 32)
        assert figure(again, "prefix_cache_disk_dropped_pages_total") == 0
        headers = {"Authorization": f"Bearer {KEYS[0]}"}
        assert httpx.post(f"{again.url}/reset_prefix_cache", headers=headers).json()["pages"] > 0
        assert cached(ask(again, KEYS[0])) == (0, 0)


def test_no_key_can_be_guessed_from_a_salt(tmp_path: Path) -> None:
    """The salts of a tenant differ between servers, but for those with one folder."""
    salts = []
    for folder in (None, None, tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        with serving(folder) as live:
            service = live.service
            own = [service.tenant(*one) for one in ((KEYS[0], ""), (KEYS[1], ""), (KEYS[0], "s"), ("", "s"), ("", f"{KEYS[0]}\0"))]
            assert service.tenant("", "") == "" and len(set(own)) == 5
            salts.append(own)
    assert salts[2] == salts[3]
    assert len({salt for own in salts for salt in own}) == 20


def test_a_folder_that_others_may_enter_is_refused(tmp_path: Path) -> None:
    os.mkdir(tmp_path / "open", 0o755)
    with pytest.raises(Exception, match="others may enter the folder"), serving(tmp_path / "open"):
        pass
