"""The tokenizer of a GGUF file gives the ids of the tokenizer it was made from; what it lacks is refused by name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gguf
import pytest
from gguf import TokenType

from redraft.errors import CheckpointError, RedraftError, Unsupported
from redraft.models.gguf import file, vocabulary
from redraft.models.tokenizer import Tokenizer
from tests import checkpoints
from tests.models import kinds
from tests.models.gguf import files

TEXTS = [*kinds.TEXTS, *kinds.CORPUS, "", " ", "   a", "<s>a</s>", "a<tool>b naïve", "12345 it's IT'S we'Ll", "e\u0301 ½ ²", "a\r\n\r\n b"]

Writer = gguf.GGUFWriter


def both(folder: Path, make: Callable[[Path], Tokenizer], add: Callable[[Writer, Path], None]) -> tuple[Tokenizer, Tokenizer]:
    """(the folder's tokenizer, the same from a GGUF file)"""
    own = folder / "own"
    own.mkdir()
    return make(own), Tokenizer(files.vocabulary(folder / "m.gguf", lambda writer: add(writer, own)))


def same(ours: Tokenizer, theirs: Tokenizer) -> None:
    for text in TEXTS:
        for special in (True, False):
            assert ours.encode(text, special=special) == theirs.encode(text, special=special), text
        ids = theirs.encode(text)
        assert ours.decode(ids) == theirs.decode(ids) and ours.decode_all(ids) == theirs.decode_all(ids)
    assert ours.vocabulary.ids() == theirs.vocabulary.ids()
    for name in ("bos_token", "eos_token"):
        assert ours.vocabulary.id(name) == theirs.vocabulary.id(name)
    assert ours.vocabulary.templates == theirs.vocabulary.templates
    for token in range(len(theirs)):
        assert ours.bytes_of(token) == theirs.bytes_of(token)


def test_byte_level_ids_are_those_of_the_folder(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, kinds.byte_level, files.byte_level)
    same(ours, theirs)


def sentencepiece(writer: Writer, folder: Path, **changes: Any) -> None:
    """As llama.cpp's converter writes a SentencePiece model: scores fall in the order of merges."""
    whole = json.loads((folder / "tokenizer.json").read_text())["model"]
    tokens = sorted(whole["vocab"], key=lambda token: whole["vocab"][token])
    rank = {"".join(merge): i for i, merge in reversed(list(enumerate(whole["merges"])))}
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(rank.get(token, 10_000)) for token in tokens])
    special = {"<unk>": TokenType.UNKNOWN, "<s>": TokenType.CONTROL, "</s>": TokenType.CONTROL}
    writer.add_token_types([special.get(t, TokenType.BYTE if t.startswith("<0x") else TokenType.NORMAL) for t in tokens])
    for key, value in changes.items():
        getattr(writer, key)(value)


def test_sentencepiece_ids_are_those_of_the_folder(tmp_path: Path) -> None:
    theirs, ours = both(tmp_path, kinds.sentencepiece, sentencepiece)
    same(ours, theirs)


def test_sentencepiece_without_a_space_before_the_text(tmp_path: Path) -> None:
    _, ours = both(tmp_path, kinds.sentencepiece, lambda writer, own: sentencepiece(writer, own, add_add_space_prefix=False))
    assert ours.decode(ours.encode("the cat")) == "the cat"
    assert [ours.vocabulary.spelling(token) for token in ours.encode("the cat")[:2]] == ["<s>", "the"]


# pre-tokenizer -> how it cuts a text, as the models' own tokenizers do
CUT = {
    "gpt-2": ["it", "'s", " 2024", " IT", "'", "S", " x", "²", "...", "\n\n ", " y"],
    "llama-bpe": ["it", "'s", " ", "202", "4", " IT", "'S", " x", "²", "...\n\n", " ", " y"],
    "qwen2": ["it", "'s", " ", "2", "0", "2", "4", " IT", "'S", " x", "²", "...\n\n", " ", " y"],
    "smollm": ["it", "'s", " ", "2", "0", "2", "4", " IT", "'", "S", " x", "²", "...", "\n\n ", " y"],
    "tekken": ["it", "'s", " ", "2", "0", "2", "4", " IT", "'S", " x", "²", "...\n\n", " ", " y"],
}


@pytest.mark.parametrize("pre", CUT)
def test_text_is_cut_into_words(pre: str, tmp_path: Path) -> None:
    checkpoints.tiny_llama(tmp_path)
    made = Tokenizer(files.vocabulary(tmp_path / "m.gguf", lambda writer: files.byte_level(writer, tmp_path, pre)))
    text = "it's 2024 IT'S x²...\n\n  y"
    found = made.vocabulary.fast.pre_tokenizer.pre_tokenize_str(text)
    assert [text[begin:end] for _, (begin, end) in found] == CUT[pre]


def test_words_that_are_tokens_are_not_merged_from_bytes(tmp_path: Path) -> None:
    def add(writer: Writer, pre: str) -> None:
        writer.add_tokenizer_model("gpt2")
        writer.add_tokenizer_pre(pre)
        writer.add_token_list(["a", "b", "c", "ab", "abc", "bc"])
        writer.add_token_merges(["b c", "a b"])

    for pre, ids in (("llama-bpe", [4]), ("qwen2", [0, 5])):
        made = Tokenizer(files.vocabulary(tmp_path / f"{pre}.gguf", lambda writer, pre=pre: add(writer, pre)))  # type: ignore[misc]
        assert made.encode("abc", special=False) == ids


def plain(writer: Writer, **changes: Any) -> None:
    """A byte-level tokenizer of eight tokens."""
    fields: dict[str, Any] = {
        "add_tokenizer_model": "gpt2",
        "add_tokenizer_pre": "gpt-2",
        "add_token_list": ["<s>", "</s>", "a", "b", "ab", "<|im_end|>", "<think>", "<|eot_id|>"],
        "add_token_types": [3, 3, 1, 1, 1, 3, 4, 1],
        "add_token_merges": ["a b"],
        "add_bos_token_id": 0,
        "add_eos_token_id": 1,
        "add_add_bos_token": False,
        **changes,
    }
    for name, value in fields.items():
        if value is not None:
            getattr(writer, name)(value)


def made(folder: Path, **changes: Any) -> Tokenizer:
    return Tokenizer(files.vocabulary(folder / "m.gguf", lambda writer: plain(writer, **changes)))


def test_special_tokens(tmp_path: Path) -> None:
    found = made(tmp_path)
    assert found.encode("ab<think>a<|im_end|>") == [4, 6, 2, 5]
    assert found.decode([4, 6, 2, 5]) == "ab<think>a" and found.decode_all([4, 5]) == "ab<|im_end|>"
    assert made(tmp_path, add_add_bos_token=True).encode("a") == [0, 2]
    assert made(tmp_path, add_add_bos_token=True, add_add_eos_token=True).encode("a") == [0, 2, 1]
    assert made(tmp_path, add_add_bos_token=None, add_tokenizer_pre="llama-bpe").encode("a") == [0, 2]
    assert made(tmp_path, add_add_bos_token=None).encode("a") == [2]


def test_the_tokens_that_end_a_text(tmp_path: Path) -> None:
    """The one that the file names, and control tokens with a known spelling."""
    out = files.vocabulary(tmp_path / "m.gguf", plain)
    assert list(vocabulary.ends(file.read(out))) == [1, 5]
    out = files.vocabulary(tmp_path / "n.gguf", lambda writer: plain(writer, add_eot_token_id=6, add_eos_token_id=2))
    assert list(vocabulary.ends(file.read(out))) == [1, 2, 5, 6]


def test_chat_templates(tmp_path: Path) -> None:
    messages = [{"role": "user", "content": "a"}]
    assert made(tmp_path, add_chat_template="{{ messages[0]['content'] }}b").encode_chat(messages) == [4]
    both = [{"name": "default", "template": "a"}, {"name": "tool_use", "template": "b"}]
    found = made(tmp_path, add_chat_template=both)
    assert (found.render(messages), found.render(messages, tools=[{"type": "function"}])) == ("a", "b")


# what is wrong -> (changes, the error, what it names)
WRONG: dict[str, tuple[dict[str, Any], type[RedraftError], str]] = {
    "no tokenizer": ({"add_tokenizer_model": "none"}, CheckpointError, "holds no tokenizer"),
    "another model": ({"add_tokenizer_model": "bert"}, Unsupported, "tokenizer.ggml.model = 'bert'; known: gpt2, llama"),
    "another cut": ({"add_tokenizer_pre": "x"}, Unsupported, "tokenizer.ggml.pre = 'x'; known: gpt-2"),
    "no cut": ({"add_tokenizer_pre": None}, Unsupported, "tokenizer.ggml.pre = None; known"),
    "no tokens": ({"add_token_list": None}, CheckpointError, "tokenizer.ggml.tokens: a list of strings is needed"),
    "no merges": ({"add_token_merges": None}, CheckpointError, "tokenizer.ggml.merges: a list of strings is needed"),
    "half a merge": ({"add_token_merges": ["a"]}, CheckpointError, "tokenizer.ggml.merges: 'a' is not two tokens"),
    "a merge of nothing": ({"add_token_merges": ["a x"]}, CheckpointError, "tokenizer.ggml.merges: "),
    "few types": ({"add_token_types": [3, 3, 1]}, CheckpointError, "tokenizer.ggml.token_type: one number for each of the 8 tokens"),
    "an end outside": ({"add_eos_token_id": 8}, CheckpointError, "tokenizer.ggml.eos_token_id = 8: 0 to 7 is allowed"),
    "a token twice": ({"add_token_list": ["a", "b", "a"], "add_token_types": [1, 1, 1]}, CheckpointError, "tokens: 'a' is there twice"),
    "no scores": ({"add_tokenizer_model": "llama", "add_token_merges": None}, CheckpointError, "tokenizer.ggml.scores: one number"),
}  # fmt: skip


@pytest.mark.parametrize("what", WRONG)
def test_damaged_tokenizers(what: str, tmp_path: Path) -> None:
    changes, error, named = WRONG[what]
    with pytest.raises(error, match=named) as caught:
        made(tmp_path, **changes)
    assert str(tmp_path) in str(caught.value) and "\n" not in str(caught.value)
