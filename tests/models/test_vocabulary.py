"""A folder's vocabulary is the one that transformers reads, whether it is read without it or through it."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, normalizers, pre_tokenizers
from transformers import AutoTokenizer

from redraft import registry
from redraft.models.vocabulary import BUILT, MISTRAL, NAMES, Vocabulary, known, read
from tests.models import kinds

TEXTS = [*kinds.TEXTS, "", " ", "  a  b", "<s>a</s>", "a<tool>b naïve", "12345 it's IT'S we'Ll", "e\u0301 ½ ²", "a\r\n\r\n b", "<unk>x"]


def same(ours: Vocabulary, folder: Path) -> None:
    theirs: Any = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    for text in TEXTS:
        for special in (True, False):
            ids = theirs(text, add_special_tokens=special)["input_ids"]
            assert ours.encode(text, special) == ids, text
            for skip in (True, False):
                assert ours.decode(ids, skip) == theirs.backend_tokenizer.decode(ids, skip_special_tokens=skip)
    assert ours.ids() == theirs.get_vocab() and len(ours) == len(theirs)
    assert dict(ours.named) == theirs.special_tokens_map and list(ours.named) == list(theirs.special_tokens_map)
    assert sorted(ours.special_ids) == sorted(theirs.all_special_ids)
    for name in NAMES:
        assert ours.id(name) == getattr(theirs, f"{name}_id")
    assert {id: (token.content, token.special) for id, token in theirs.added_tokens_decoder.items()} == ours.added
    for id in range(len(theirs) + 2):
        assert ours.spelling(id) == theirs.convert_ids_to_tokens(id)
    templates = theirs.chat_template
    assert dict(ours.templates) == (templates if isinstance(templates, dict) else {} if templates is None else {"default": templates})


def config(folder: Path, **changes: Any) -> None:
    """Changes tokenizer_config.json."""
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


@pytest.mark.parametrize("kind", kinds.KINDS)
def test_folders_without_a_class_of_their_own(kind: str, tmp_path: Path) -> None:
    kinds.KINDS[kind](tmp_path)
    found = known(tmp_path)
    assert found is not None
    same(found, tmp_path)


def as_class(folder: Path, name: str) -> None:
    """A byte-level or SentencePiece vocabulary with the pipeline of a class."""
    kinds.sentencepiece(folder) if name == "GemmaTokenizer" else kinds.byte_level(folder)
    normalizer, words, decoder, _ = BUILT[name]
    whole = json.loads((folder / "tokenizer.json").read_text())
    whole |= {"normalizer": normalizer, "pre_tokenizer": words, "decoder": decoder}
    if name != "GemmaTokenizer":
        whole["model"] |= {"continuing_subword_prefix": "", "end_of_word_suffix": ""}
    (folder / "tokenizer.json").write_text(json.dumps(whole))
    config(folder, tokenizer_class=name, unk_token="<unk>" if name == "GemmaTokenizer" else "</s>", pad_token="</s>")
    if name == "GemmaTokenizer":
        config(folder, mask_token=None)


@pytest.mark.parametrize("suffix", ["", "Fast"])
@pytest.mark.parametrize("name", BUILT)
def test_classes_that_build_what_the_file_has(name: str, suffix: str, tmp_path: Path) -> None:
    as_class(tmp_path, name)
    config(tmp_path, tokenizer_class=name + suffix)
    found = known(tmp_path)
    if name != "GemmaTokenizer":  # it has a default for mask_token too
        assert found is not None
        same(found, tmp_path)
    same(read(tmp_path), tmp_path)


@pytest.mark.parametrize("name", BUILT)
@pytest.mark.parametrize("part", ["normalizer", "pre_tokenizer", "decoder", "model"])
def test_classes_that_build_something_else_are_left_to_transformers(name: str, part: str, tmp_path: Path) -> None:
    as_class(tmp_path, name)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    whole[part] = {
        "normalizer": json.loads(normalizers.Lowercase().__getstate__()),
        "pre_tokenizer": json.loads(pre_tokenizers.Digits(individual_digits=True).__getstate__()),
        "decoder": json.loads(decoders.Fuse().__getstate__()),
        "model": {**whole["model"], "ignore_merges": True},
    }[part]
    (tmp_path / "tokenizer.json").write_text(json.dumps(whole))
    assert known(tmp_path) is None


CONFIGS: dict[str, dict[str, Any]] = {
    "bos": {"add_bos_token": True},
    "eos": {"add_eos_token": True},
    "bos and eos": {"add_bos_token": True, "add_eos_token": True},
    "neither": {"add_bos_token": False, "add_eos_token": False},
    "bos without a name": {"add_bos_token": True, "bos_token": None},
    "dictionaries": {"bos_token": {"__type": "AddedToken", "content": "<s>", "lstrip": False, "rstrip": False, "special": True}},
    "more names": {"pad_token": "</s>", "unk_token": "<s>", "sep_token": "</s>"},
    "further tokens": {"extra_special_tokens": ["<tool>"]},
    "further tokens, the older way": {"additional_special_tokens": ["<tool>"]},
    "a template": {"chat_template": "{{ messages }}"},
    "several templates": {"chat_template": [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]},
    "nothing around texts": {"add_bos_token": False},
    "neutral": {"add_prefix_space": False, "model_max_length": 99, "padding_side": "left", "legacy": True},
}


@pytest.mark.parametrize("name", CONFIGS)
def test_fields_of_the_config(name: str, tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    config(tmp_path, **CONFIGS[name])
    found = known(tmp_path)
    assert found is not None
    same(found, tmp_path)


UNSURE: dict[str, dict[str, Any]] = {
    "a token that the file lacks": {"pad_token": "<pad>"},
    "a further token that the file lacks": {"extra_special_tokens": ["<more>"]},
    "an unknown field": {"surprising": 1},
    "a dictionary of an unknown type": {"bos_token": {"content": "<s>"}},
    "a space before texts": {"add_prefix_space": True},
    "special tokens in texts": {"split_special_tokens": True},
    "named further tokens": {"extra_special_tokens": {"image_token": "<tool>"}},
    "another class": {"tokenizer_class": "BertTokenizer"},
    "code of its own": {"auto_map": {"AutoTokenizer": ["a.B", None]}},
    "another added token": {"added_tokens_decoder": {"0": {"content": "<s>", "lstrip": True, "special": True}}},
}


@pytest.mark.parametrize("name", UNSURE)
def test_what_is_not_sure_is_left_to_transformers(name: str, tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    assert known(tmp_path) is not None
    config(tmp_path, **UNSURE[name])
    assert known(tmp_path) is None


def test_added_tokens_of_the_config_that_are_those_of_the_file(tmp_path: Path) -> None:
    made = kinds.byte_level(tmp_path)
    tokens = made.vocabulary.fast.get_added_tokens_decoder()
    parts = ("content", "lstrip", "rstrip", "single_word", "normalized", "special")
    config(tmp_path, added_tokens_decoder={str(id): {part: getattr(token, part) for part in parts} for id, token in tokens.items()})
    found = known(tmp_path)
    assert found is not None
    same(found, tmp_path)


@pytest.mark.parametrize("file", ["added_tokens.json", "special_tokens_map.json", "additional_chat_templates"])
def test_further_files(file: str, tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    if file == "additional_chat_templates":
        (tmp_path / file).mkdir()
        (tmp_path / file / "rag.jinja").write_text("{{ documents }}")
        (tmp_path / "chat_template.jinja").write_text("{{ messages }}")
    else:
        (tmp_path / file).write_text(json.dumps({"<s>": 0} if file == "added_tokens.json" else {"pad_token": "</s>"}))
    assert known(tmp_path) is None
    if file == "additional_chat_templates":
        assert dict(read(tmp_path).templates) == {"default": "{{ messages }}", "rag": "{{ documents }}"}
    if file == "special_tokens_map.json":
        (tmp_path / file).write_text(json.dumps({"bos_token": {"content": "<s>"}}))
        found = known(tmp_path)
        assert found is not None
        same(found, tmp_path)


def test_a_file_that_puts_nothing_around_texts(tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    whole = json.loads((tmp_path / "tokenizer.json").read_text())
    (tmp_path / "tokenizer.json").write_text(json.dumps({**whole, "post_processor": None}))
    config(tmp_path, add_bos_token=True)
    found = known(tmp_path)
    assert found is not None and found.encode("a", True) == found.encode("a", False)
    same(found, tmp_path)


def test_a_template_in_a_file_goes_before_the_configs(tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    config(tmp_path, chat_template="a")
    (tmp_path / "chat_template.jinja").write_text("b")
    found = known(tmp_path)
    assert found is not None and dict(found.templates) == {"default": "b"}
    same(found, tmp_path)


def test_lengths_in_the_file_do_not_cut_texts(tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    made = Fast.from_file(str(tmp_path / "tokenizer.json"))
    made.enable_truncation(3)
    made.enable_padding(length=9, pad_token="</s>", pad_id=1)
    made.save(str(tmp_path / "tokenizer.json"))
    found = known(tmp_path)
    assert found is not None and len(found.encode("a b c d e f g", True)) > 9 and len(found.encode("a", True)) == 2


@pytest.mark.parametrize("family", sorted({where.partition(":")[0].rpartition(".")[2] for where in registry.FAMILIES.values()}))
def test_every_family(family: str, tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps({"model_type": family}))
    found = known(tmp_path)
    assert (found is None) == (family in (*MISTRAL, "qwen2"))
    if found is not None:
        same(found, tmp_path)


def test_it_is_read_without_transformers(tmp_path: Path) -> None:
    kinds.byte_level(tmp_path)
    code = f"import sys, pathlib; from redraft.models.tokenizer import Tokenizer; Tokenizer(pathlib.Path({str(tmp_path)!r}))"
    done = subprocess.run(
        [sys.executable, "-c", f"{code}; print([m for m in ('torch', 'transformers', 'jinja2') if m in sys.modules])"],
        capture_output=True, text=True, check=True,
    )  # fmt: skip
    assert done.stdout.strip() == "[]"


def test_a_tokenizer_in_python(tmp_path: Path) -> None:
    """Bytes are its ids."""
    from transformers import ByT5Tokenizer

    ByT5Tokenizer().save_pretrained(tmp_path)
    found = read(tmp_path)
    theirs: Any = AutoTokenizer.from_pretrained(tmp_path, local_files_only=True)
    ids = theirs("naïve")["input_ids"]
    assert found.encode("naïve", True) == ids and found.decode(ids, True) == "naïve" and not found.decoder
    assert found.special_ids == theirs.all_special_ids and len(found) == len(theirs) and found.spelling(ids[0]) == "n"
    assert found.id("eos_token") == theirs.eos_token_id and found.ids()["n"] == ids[0]
