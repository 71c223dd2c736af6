"""Prompts and results as tables: the same as in JSON lines."""

from __future__ import annotations

import json
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from redraft.cli import rows
from redraft.errors import InvalidInput
from tests.cli.conftest import Ran

OPTIONS = ("--temperature", "0", "--max-tokens", "4", "--ignore-eos", "--dtype", "float32")
TALK = [{"role": "user", "content": "hello"}]
ROWS: list[dict[str, Any]] = [
    {"id": 3, "prompt": "hello"}, {"prompt": "hello", "temperature": 0.5, "seed": 2**64 - 1}, {"id": 4, "messages": TALK},
    {"prompt_token_ids": [5, 6, 7], "max_tokens": 2}, {"id": 5}, {"prompt": "x", "logit_bias": {"7": 100.0}},
]  # fmt: skip
SCHEMA = {
    "id": pa.int32(), "prompt": pa.string(), "messages": pa.list_(pa.struct([("role", pa.string()), ("content", pa.string())])),
    "prompt_token_ids": pa.list_(pa.int64()), "max_tokens": pa.int64(), "temperature": pa.float64(), "seed": pa.uint64(),
    "logit_bias": pa.map_(pa.string(), pa.float64()),
}  # fmt: skip


def write(path: Path, some: list[dict[str, Any]], **options: Any) -> Path:
    made = [{**row, "logit_bias": list(row["logit_bias"].items())} if "logit_bias" in row else row for row in some]
    pq.write_table(pa.Table.from_pylist(made, pa.schema(list(SCHEMA.items()))), path, **options)
    return path


def test_the_same_results(redraft: Callable[..., Ran], tiny: str, tmp_path: Path) -> None:
    table, lines = write(tmp_path / "in.parquet", ROWS, row_group_size=2), tmp_path / "in.jsonl"
    lines.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    assert redraft("generate", tiny, "--prompts", str(table), "--output", str(tmp_path / "out.parquet"), *OPTIONS)[0] == 1
    assert redraft("generate", tiny, "--prompts", str(lines), "--output", str(tmp_path / "out.jsonl"), *OPTIONS)[0] == 1
    found = pq.read_table(tmp_path / "out.parquet")
    expected = [json.loads(line) for line in (tmp_path / "out.jsonl").read_text().splitlines()]
    expected[4]["error"] = "row 4: one of prompt, messages, prompt_token_ids is needed"
    assert found.to_pylist() == [{**row, "seed": one["seed"]} for row, one in zip(expected, found.to_pylist())]  # most seeds are drawn
    assert found.column("seed")[1].as_py() == 2**64 - 1 and found.column("id").type == pa.int64()
    assert rows.complete(tmp_path / "out.parquet") == rows.complete(tmp_path / "out.jsonl") == (6, 1)


def test_a_folder_in_pieces(tmp_path: Path) -> None:
    some = [{"id": i, "prompt": str(i)} for i in range(20)]
    write(tmp_path / "b.parquet", some[11:], row_group_size=4)
    write(tmp_path / "a.parquet", some[:11], row_group_size=5)
    found = pickle.loads(pickle.dumps(rows.prompts(tmp_path, SCHEMA)))
    assert (found.count, found.ids) == (20, "int64")
    for start in range(21):
        for stop in (start, start + 1, start + 7, 30):
            assert [json.loads(line) for line in found.lines(start, stop)] == some[start:stop]


def test_ids_of_both_kinds_are_text(tmp_path: Path) -> None:
    target = rows.results(tmp_path / "x.parquet")
    for name in (1, "b", None):
        target.write({"index": 0, "id": name, "error": None})
    target.close()
    assert pq.read_table(tmp_path / "x.parquet").column("id").to_pylist() == ["1", "b", None]


def test_what_cannot_be_read(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": ["a"], "temprature": [1.0]}), tmp_path / "a.parquet")
    with pytest.raises(InvalidInput, match=r"unknown column 'temprature': did you mean 'temperature'"):
        rows.prompts(tmp_path / "a.parquet", SCHEMA)
    (tmp_path / "b.parquet").write_bytes(b"PAR1 it is not")
    with pytest.raises(InvalidInput, match="not Parquet"):
        rows.prompts(tmp_path / "b.parquet", SCHEMA)
    assert rows.complete(tmp_path / "b.parquet") is None
    (tmp_path / "empty").mkdir()
    with pytest.raises(InvalidInput, match=r"is a folder without \.parquet files"):
        rows.prompts(tmp_path / "empty", SCHEMA)


def test_a_value_without_a_form_in_json_is_an_error_of_its_row(tmp_path: Path) -> None:
    pq.write_table(pa.table({"prompt": pa.array([b"a", None], pa.binary())}), tmp_path / "a.parquet")
    first, second = rows.prompts(tmp_path / "a.parquet", SCHEMA).lines(0, 2)
    assert first.startswith(b"not JSON: ") and json.loads(second) == {}
