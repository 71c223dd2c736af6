"""`redraft generate --prompts --ray`: the rows of a run in one process, whatever ended the runs before."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import ray  # noqa: F401, without it these tests do not run

from redraft.cli import distributed, rows
from redraft.cli.distributed import Job
from redraft.config import EngineConfig
from tests.cli.conftest import Ran
from tests.workers.ray_heads import head

OPTIONS = ("--max-tokens", "6", "--ignore-eos", "--dtype", "float32", "--seed", "3")
LINES = ['"hello"', '{"prompt": "a", "id": 7, "temperature": 0.0}', "{", *(json.dumps({"prompt": f"x{i}", "seed": i}) for i in range(9))]
TOKEN = "5" * 64


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    with head(TOKEN) as address:
        yield address


@pytest.fixture
def prompts(tmp_path: Path) -> Path:
    path = tmp_path / "prompts.jsonl"
    path.write_text("\n".join(LINES))
    return path


def read(folder: Path) -> list[dict[str, object]]:
    return [json.loads(line) for file in sorted(folder.glob("part-*.jsonl")) for line in file.read_text().splitlines()]


def test_the_same_rows_and_only_what_is_missing_again(
    redraft: Callable[..., Ran], tiny: str, prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.chdir(Path(tiny).parent)  # an engine may run in another folder
    name, out = Path(tiny).name, tmp_path / "out"
    common = ("generate", name, "--prompts", str(prompts), *OPTIONS)
    here = ("--ray-address", cluster, "--replicas", "2", "--output", str(out))
    assert redraft(*common, "--output", str(tmp_path / "alone.jsonl"))[0] == 1
    alone = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    code, stdout, err = redraft(*common, *here)
    assert (code, stdout) == (1, "") and f"12 of 12 lines are in {out}, 1 with an error" in err
    assert read(out) == alone and [row["index"] for row in alone] == list(range(12))
    parts = sorted(out.glob("part-*"))
    assert len(parts) == 4  # two for each engine
    before = {path: path.stat().st_mtime_ns for path in parts}
    parts[0].unlink()
    parts[2].write_text(parts[2].read_text()[:-9])
    code, _, err = redraft(*common, *here)
    assert code == 1 and "12 of 12 lines are in" in err and "6 of them by an earlier run, 1 with an error" in err
    assert read(out) == alone
    assert [path.stat().st_mtime_ns == before[path] for path in parts] == [False, True, False, True]
    monkeypatch.setattr(distributed, "connect", None)  # nothing is missing, so no cluster is needed
    assert redraft(*common, *here)[0] == 1
    code, _, err = redraft(*common, "--temperature", "0", *here)
    assert code == 2 and "has results with other sampling; --overwrite replaces them" in err and read(out) == alone


def test_tables_and_a_model_that_cannot_be_loaded(
    redraft: Callable[..., Ran], tiny: str, prompts: Path, tmp_path: Path, cluster: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RAY_AUTH_TOKEN", TOKEN)
    monkeypatch.setenv("RAY_ADDRESS", cluster)
    out = tmp_path / "out.parquet"
    common = ("--prompts", str(prompts), *OPTIONS, "--ray", "--output", str(out))
    code, _, err = redraft("generate", str(tmp_path / "none"), *common)
    assert code == 1 and err.splitlines()[-1].startswith("error: ") and "none" in err and not list(out.glob("part-*"))
    assert redraft("generate", tiny, *common)[0] == 1
    found = pq.read_table(out).to_pylist()
    assert [row["index"] for row in found] == list(range(12)) and [row["id"] for row in found[:2]] == [None, "7"]
    assert redraft("generate", tiny, "--prompts", str(prompts), *OPTIONS, "--output", str(tmp_path / "alone.jsonl"))[0] == 1
    alone = [json.loads(line) for line in (tmp_path / "alone.jsonl").read_text().splitlines()]
    assert [row["token_ids"] for row in found] == [row["token_ids"] for row in alone]


@pytest.mark.parametrize(
    ("arguments", "problem"),
    [
        (["--prompts", "FILE", "--ray"], "--ray needs --output"),
        (["--prompts", "FILE", "--ray", "--output", "FILE"], "a folder is needed"),
        (["--prompts", "FILE", "--replicas", "2"], "--replicas needs --ray"),
        (["--prompts", "FILE", "--ray", "--output", "x", "--n", "2"], "--n and --prompts"),
        (["--prompts", "FILE", "--ray", "--output", "x", "-p", "y"], "--prompt and --prompts exclude each other"),
        (["--prompts", "none.jsonl", "--ray", "--output", "x"], "--prompts = none.jsonl: No such file"),
        (["--ray"], "need --prompts"),
        (["--ray-address", "a:1"], "need --prompts"),
    ],
)
def test_what_cannot_be_done_is_refused_before_a_cluster_begins(
    redraft: Callable[..., Ran], prompts: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: list[str], problem: str
) -> None:
    monkeypatch.setattr(distributed, "connect", None)
    monkeypatch.chdir(tmp_path)
    code, out, err = redraft("generate", *(str(prompts) if word == "FILE" else word for word in arguments))
    assert (code, out, err.count("\n")) == (2, "", 1) and problem in err


def test_a_folder_does_not_depend_on_what_texts_do_not(prompts: Path) -> None:
    def about(**options: object) -> dict[str, object]:
        return Job(EngineConfig.of(**options), None, False, {"seed": 1}).about()

    assert about(threads=1, max_seqs=3, cache_memory="1GB") == about()
    assert about(quant="none") != about() and about(model="x") != about()
    assert rows.prompts(prompts, ()).count == 12
