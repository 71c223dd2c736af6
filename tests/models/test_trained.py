from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from safetensors.numpy import save_file

from redraft.errors import CheckpointError, InvalidInput
from redraft.models.runner import Runner
from redraft.models.trained import FILE, Trained, model_hash, place
from redraft.ops.backend import Linear
from redraft.ops.numpy_ops import NumpyOps
from tests.arrays import placed
from tests.contracts import plain
from tests.models import tiny

OPS = NumpyOps()


def runner(**changes: Any) -> Runner:
    spec, weights = plain.tiny()
    return Runner(replace(spec, **changes), placed(OPS, weights), OPS, 1)


def test_what_was_saved_comes_back(tmp_path: Path) -> None:
    one = runner()
    arrays = {"a": np.arange(6, dtype=ml_dtypes.bfloat16).reshape(2, 3), "ids": np.array([4, 2])}
    path = Trained("witness", model_hash(one), {"heads": 3, "note": "x"}, arrays).save(tmp_path / "head")
    assert path == tmp_path / "head" / FILE and [file.name for file in path.parent.iterdir()] == [FILE]
    back = Trained.load(tmp_path / "head", "witness")
    assert (back.method, back.model, back.about) == ("witness", model_hash(one), {"heads": 3, "note": "x"})
    assert back.arrays.keys() == arrays.keys() and all(np.array_equal(back.arrays[name], arrays[name]) for name in arrays)
    assert back.arrays["a"].dtype == ml_dtypes.bfloat16
    back.check(one, path)
    with pytest.raises(InvalidInput, match=f"witness: .* was made for the model with hash {model_hash(one)}, this one has"):
        back.check(runner(context=99), path)


def test_what_is_not_complete_is_refused(tmp_path: Path) -> None:
    path = Trained("witness", "abc", {}, {"a": np.zeros(9)}).save(tmp_path / "one.safetensors")
    with pytest.raises(CheckpointError, match="a file of witness, not of other"):
        Trained.load(path, "other")
    (tmp_path / "half").write_bytes(path.read_bytes()[:-9])
    save_file({"a": np.zeros(1)}, tmp_path / "bare", {"method": "witness"})
    save_file({"a": np.zeros(1)}, tmp_path / "words", {"method": "witness", "model": "abc", "heads": "three"})
    for name in ("half", "bare", "words", "missing"):
        with pytest.raises(CheckpointError, match=f"{name}: not a complete file of witness"):
            Trained.load(tmp_path / name, "witness")


def test_where_files_are_kept(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path))
    assert place("witness", "abc") == tmp_path / "witness" / "abc.safetensors"


def test_the_hash_follows_the_weights_and_the_config_and_nothing_else(tmp_path: Path) -> None:
    def hashed(folder: str, **changes: Any) -> str:
        return model_hash(SimpleNamespace(source=(tiny.saved if "shard" in changes else tiny.save)("llama2", tmp_path / folder, **changes)))  # type: ignore[arg-type]

    one = hashed("one")
    assert hashed("again") == hashed("sharded", shard="8KB") == one
    assert len({one, hashed("weights", seed=1), hashed("config", rope_theta=5e5)}) == 3
    spec, weights = plain.tiny()
    last = weights.layers[-1]
    changed = replace(weights, layers=(*weights.layers[:-1], replace(last, out=Linear(last.out.weight + 1e-9))))
    assert (
        model_hash(Runner(spec, placed(OPS, weights), OPS, 1))
        == model_hash(runner())
        != model_hash(Runner(spec, placed(OPS, changed), OPS, 1))
    )
