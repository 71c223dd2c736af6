"""A GGUF file in place of a folder: the same texts, with every option that reads the model again."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest

from redraft import LLM
from redraft.errors import CheckpointError
from redraft.models.trained import model_hash
from tests import checkpoints
from tests.models.gguf import files

PROMPTS = ["once upon a time", "def f(x):"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, layers in (("target", 3), ("draft", 1)):
        own = checkpoints.tiny_llama(folder / name, num_hidden_layers=layers, hidden_size=32)
        files.write(own, folder / f"{name}.gguf")
    return folder


def texts(model: Path, **options: Any) -> list[list[int]]:
    llm = LLM(str(model), **{"dtype": "float32", "cache_memory": 1 << 22, **options})
    return [one.outputs[0].token_ids for one in llm.generate(PROMPTS, temperature=0, max_tokens=24)]


@pytest.mark.parametrize("options", [{}, {"backend": "torch"}, {"quant": "int8"}, {"quant": "int4"}, {"dtype": "bfloat16"}], ids=str)
def test_texts_are_those_of_the_folder(options: dict[str, Any], folder: Path) -> None:
    assert texts(folder / "target.gguf", **options) == texts(folder / "target", **options)


def test_a_draft_model_from_a_file(folder: Path) -> None:
    plain = texts(folder / "target", draft="none")
    options = {"draft": "draft-model", "draft_model": str(folder / "draft.gguf")}
    assert texts(folder / "target.gguf", **options) == plain
    assert texts(folder / "target", **options) == plain


def test_a_draft_model_with_another_vocabulary(folder: Path, tmp_path: Path) -> None:
    own = checkpoints.tiny_llama(tmp_path / "other", hidden_size=32)
    words = json.loads((own / "tokenizer.json").read_text())
    vocabulary = words["model"]["vocab"]
    vocabulary["a"], vocabulary["b"] = vocabulary["b"], vocabulary["a"]
    (own / "tokenizer.json").write_text(json.dumps(words))
    files.write(own, tmp_path / "other.gguf")
    with pytest.raises(CheckpointError, match="the draft model's vocabulary"):
        texts(folder / "target.gguf", draft="draft-model", draft_model=str(tmp_path / "other.gguf"))


def test_a_chat_and_the_end_of_a_text(folder: Path) -> None:
    ours, theirs = (LLM(str(folder / name), cache_memory=1 << 22) for name in ("target.gguf", "target"))
    messages = [{"role": "user", "content": "hello"}]
    first, second = (llm.chat(messages, temperature=0, max_tokens=8)[0] for llm in (ours, theirs))
    assert first.prompt_token_ids == second.prompt_token_ids and first.outputs[0].token_ids == second.outputs[0].token_ids
    assert ours.eos == theirs.eos == {2}
    assert ours.defaults == {}  # the file has none


def test_quantized_matrices_give_a_text(folder: Path, tmp_path: Path) -> None:
    out = files.write(checkpoints.tiny_llama(tmp_path / "own", hidden_size=64, intermediate_size=96), tmp_path / "q.gguf",
                      gguf.GGMLQuantizationType.Q4_0)  # fmt: skip
    assert texts(out, draft="copyspec") == texts(out, draft="none")


def test_the_hash_of_a_model(folder: Path, tmp_path: Path) -> None:
    out = folder / "target.gguf"
    other = files.write(folder / "target", tmp_path / "m.gguf", rope__freq_base=500.0)
    found = [model_hash(LLM(str(path), cache_memory=1 << 22).runner) for path in (out, out, other, folder / "draft.gguf")]
    assert found[0] == found[1] and len(set(found)) == 3


def test_verbs_take_a_file(folder: Path, redraft: Callable[..., tuple[int, str, str]]) -> None:
    own, out = (str(folder / name) for name in ("target", "target.gguf"))
    common = ("-p", "once upon", "--max-tokens", "8", "--temperature", "0", "--cache-memory", "4MiB")
    codes, found, _ = zip(*(redraft("generate", model, *common) for model in (own, out)), strict=True)
    assert codes == (0, 0) and found[0] == found[1]
    code, shown, _ = redraft("doctor", out)
    assert code == 0 and "llama" in shown
    code, shown, _ = redraft("explain", out)
    assert code == 0
    code, _, error = redraft("generate", str(folder / "none.gguf"), "-p", "x")
    assert code and error.count("\n") == 1 and "no such file" in error
