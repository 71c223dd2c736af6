"""GGUF files with a tokenizer: their contents, and tokenizers that llama.cpp would read differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.bench.peers import gguf
from redraft.errors import Unsupported
from redraft.models import loader
from tests import checkpoints

LLAMA = next(cut for cut, name in gguf._CUTS.items() if name == "llama-bpe")
BYTES = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False}


def split(regex: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def cut(*parts: dict[str, Any]) -> Callable[[Any], None]:
    return lambda whole: whole.update(pre_tokenizer={"type": "Sequence", "pretokenizers": list(parts)})


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return checkpoints.tiny_llama(tmp_path / "model")


def changed(folder: Path, change: Callable[[Any], None]) -> Path:
    file = folder / "tokenizer.json"
    whole = json.loads(file.read_text())
    change(whole)
    file.write_text(json.dumps(whole))
    return folder


def test_what_is_read_of_a_tokenizer(folder: Path) -> None:
    found = gguf.read_vocabulary(folder)
    ids = json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"]
    assert found.cut == "gpt-2" and found.begins
    assert {found.tokens[id]: id for id in ids.values()} == ids
    assert [found.tokens[id] for id in (found.bos, found.eos) if id is not None] == ["<s>", "</s>"]
    assert {found.tokens[id] for id in found.special} >= {"<s>", "</s>"} and found.special == found.added


def test_merges_of_both_forms_and_the_words_of_others(folder: Path) -> None:
    def change(whole: Any) -> None:
        whole["model"]["vocab"]["ab"] = max(whole["model"]["vocab"].values()) + 1
        whole["model"]["merges"] = [["a", "b"]]
        whole["model"]["ignore_merges"] = True
        cut(split(LLAMA), BYTES)(whole)

    found = gguf.read_vocabulary(changed(folder, change))
    assert (found.merges, found.cut) == (["a b"], "llama-bpe")


@pytest.mark.parametrize(
    ("change", "named"),
    [
        (cut(split(r"\d+"), BYTES), r"words cut by .*\\d"),
        (cut(split(LLAMA), BYTES), "ignore_merges = False"),
        (cut(split(LLAMA), BYTES | {"use_regex": True}), "words cut by"),
        (cut({"type": "Digits", "individual_digits": True}, BYTES | {"use_regex": True}), "words cut by"),
        (cut({"type": "Whitespace"}), "not byte-level"),
        (lambda whole: whole.update(normalizer={"type": "Lowercase"}), "a normalizer"),
        (lambda whole: whole["pre_tokenizer"].update(add_prefix_space=True), "a space before"),
        (lambda whole: whole["post_processor"]["single"].append({"SpecialToken": {"id": "<s>", "type_id": 0}}), "tokens around"),
    ],
)
def test_tokenizers_that_llama_cpp_does_not_have_are_refused_by_name(folder: Path, change: Callable[[Any], None], named: str) -> None:
    with pytest.raises(Unsupported, match=f"GGUF files need a tokenizer that llama.cpp supports, .*{named}"):
        gguf.read_vocabulary(changed(folder, change))


def test_the_embedded_model_has_words_of_its_own() -> None:
    with pytest.raises(Unsupported, match="words cut by"):
        gguf.read_vocabulary(loader.resolve("embedded"))


def test_the_file_holds_the_tokenizer(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package = pytest.importorskip("gguf")
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    path, bare = gguf.converted(folder, "auto", tokenizer=True), gguf.converted(folder, "auto")
    fields, wanted = package.GGUFReader(path).fields, gguf.read_vocabulary(folder)
    tokens, kinds = fields["tokenizer.ggml.tokens"].contents(), fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == loader.inspect(folder).spec.vocab
    assert all(tokens[id] == text for id, text in wanted.tokens.items())
    control = {id for id, kind in enumerate(kinds) if kind == package.TokenType.CONTROL}
    assert control == wanted.special
    reported = {
        name: fields[f"tokenizer.ggml.{name}"].contents() for name in ("model", "pre", "bos_token_id", "eos_token_id", "add_bos_token")
    }
    assert reported == {"model": "gpt2", "pre": "gpt-2", "bos_token_id": wanted.bos, "eos_token_id": wanted.eos, "add_bos_token": True}
    assert package.GGUFReader(bare).fields["tokenizer.ggml.model"].contents() == "none", "two files, for two purposes"
