"""The checkpoints that tests write without PyTorch are those that transformers writes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file

from tests.models import tiny


@pytest.mark.torch
@pytest.mark.parametrize("name", [name for name, (prefix, _) in tiny.FAMILIES.items() if prefix in tiny.LLAMA_LIKE])
def test_the_files_are_those_of_transformers(name: str, tmp_path: Path) -> None:
    own, other = tiny.save(name, tmp_path / "own", seed=3), tiny.saved(name, tmp_path / "other", seed=3)
    assert sorted(file.name for file in own.iterdir()) == sorted(file.name for file in other.iterdir())
    for file in own.glob("*.json"):
        written, wanted = json.loads(file.read_text()), json.loads((other / file.name).read_text())
        assert written == {key: value for key, value in wanted.items() if key in written or file.name == "config.json"}, file.name
    tensors, others = load_file(own / "model.safetensors"), load_file(other / "model.safetensors")
    assert tensors.keys() == others.keys()
    for key, numbers in tensors.items():
        np.testing.assert_array_equal(numbers, others[key], err_msg=key)
