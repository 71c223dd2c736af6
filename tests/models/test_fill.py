"""Prompts that fill in the middle: every form of marks, and a text that ends before a mark."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft import LLM, SamplingParams
from redraft.errors import InvalidInput, Unsupported
from redraft.models import fill
from redraft.models.gguf import vocabulary
from redraft.models.tokenizer import Tokenizer
from tests.checkpoints import tiny_llama
from tests.models import kinds
from tests.models.gguf import files

QWEN = ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>", "<|fim_pad|>", "<|repo_name|>", "<|file_sep|>")
SHORT = {"temperature": 0, "max_tokens": 8, "ignore_eos": True}
BEFORE, AFTER = "def add(a, b):\n    return ", "\n\nprint(add(1, 2))"


def marked(make: Any, folder: Path, *marks: str, special: bool = True) -> Tokenizer:
    """A tokenizer of tests/models/kinds.py with these tokens."""
    made = make(folder)
    fast = made.vocabulary.fast
    (fast.add_special_tokens if special else fast.add_tokens)(list(marks))
    fast.save(str(folder / "tokenizer.json"))
    return Tokenizer(folder)


def spelled(tokenizer: Tokenizer, ids: list[int]) -> list[str]:
    return [str(tokenizer.vocabulary.spelling(token)) for token in ids]


@pytest.fixture(scope="module")
def qwen(tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    return marked(kinds.byte_level, tmp_path_factory.mktemp("qwen"), *QWEN)


@pytest.mark.parametrize("form", fill.FORMS, ids=lambda form: form[0])
@pytest.mark.parametrize("make", [kinds.byte_level, kinds.sentencepiece])
def test_every_form_is_found_and_written(make: Any, form: tuple[str, str, str], tmp_path: Path) -> None:
    tokenizer = marked(make, tmp_path, *filter(None, form))
    prefix, suffix, middle = (tokenizer.vocabulary.ids().get(word) for word in form)
    made = fill.find(tokenizer)
    assert (made.prefix, made.suffix, made.middle) == (prefix, suffix, middle)
    ids = made.tokens("the cat", "on the mat")
    begin, end = ids.index(made.prefix), ids.index(made.suffix)
    before = ids[begin + 1 : end if begin < end else None]
    after = ids[end + 1 : begin if end < begin else -1]
    assert ids[0] == tokenizer.vocabulary.id("bos_token")
    assert before == tokenizer.encode("the cat", special=False)
    assert b"".join(map(tokenizer.bytes_of, after)) == b"on the mat"  # no space before it, which some tokenizers put before a text
    assert (ids[-1] == middle and begin < end) if middle is not None else (end == 1 and ids[-1] == before[-1])
    assert made.tokens("the cat", "on the mat", special=False) == ids[1:]


def test_a_vocabulary_without_marks(tmp_path: Path) -> None:
    for at, words in enumerate(((), ("<fim_prefix>", "<fim_suffix>"), ("<|file_sep|>",))):
        (folder := tmp_path / str(at)).mkdir()
        with pytest.raises(Unsupported, match="suffix: this model has no tokens"):
            fill.find(marked(kinds.byte_level, folder, *words))


def test_marks_that_a_text_spells_are_text(qwen: Tokenizer) -> None:
    made = fill.find(qwen)
    text = "a<|fim_middle|>b<|fim_prefix|><|file_sep|>"
    ids = made.tokens(text, text)
    assert [ids.count(mark) for mark in (made.prefix, made.suffix, made.middle, made.file)] == [1, 1, 1, 0]
    assert b"".join(map(qwen.bytes_of, ids)).decode() == f"<s><|fim_prefix|>{text}<|fim_suffix|>{text}<|fim_middle|>"


def test_a_repository_and_its_files(qwen: Tokenizer) -> None:
    made, others = fill.find(qwen), [("a.py", "x = 1\n"), ("b.py", "y = 2\n")]
    whole = made.tokens("p", "s", others)
    written = "<s><|repo_name|>project\n<|file_sep|>a.py\nx = 1\n<|file_sep|>b.py\ny = 2\n<|file_sep|>current\n"
    assert qwen.decode_all(whole) == f"{written}<|fim_prefix|>p<|fim_suffix|>s<|fim_middle|>"
    assert made.tokens("p", "s", others, limit=len(whole)) == whole
    last = made.tokens("p", "s", others, limit=len(whole) - 1)
    assert "b.py" in qwen.decode_all(last) and "a.py" not in qwen.decode_all(last)
    assert made.tokens("p", "s", others, limit=5) == made.tokens("p", "s", limit=1) == made.tokens("p", "s")


def test_other_files_without_marks_for_them_are_text(tmp_path: Path) -> None:
    tokenizer = marked(kinds.byte_level, tmp_path, "[PREFIX]", "[SUFFIX]")
    assert tokenizer.decode_all(fill.find(tokenizer).tokens("p", "s", [("a.py", "x")])) == "<s>a.py\nx\n\n[SUFFIX]s[PREFIX]p"


def test_a_filled_text_ends_before_a_mark(tmp_path: Path) -> None:
    """As a token where marks are special; else as a text, because the token would be shown."""
    (tmp_path / "plain").mkdir()
    (tmp_path / "special").mkdir()
    params = SamplingParams(stop=("x",), stop_token_ids=(1,))
    special = fill.find(marked(kinds.byte_level, tmp_path / "special", *QWEN))
    ids = tuple(special.tokenizer.vocabulary.ids()[word] for word in QWEN)
    found = special.params(params)
    assert found.stop == ("x",) and found.stop_token_ids[0] == 1 and set(found.stop_token_ids[1:]) == set(ids)
    shown = fill.find(marked(kinds.byte_level, tmp_path / "plain", *QWEN, special=False)).params(params)
    assert shown.stop_token_ids == (1,) and shown.stop[0] == "x" and set(shown.stop[1:]) == set(QWEN)


@pytest.mark.parametrize("names", [("fim_pre", "fim_suf", "fim_mid"), ("prefix", "suffix", "middle")])
def test_ids_that_a_gguf_file_names(names: tuple[str, ...], tmp_path: Path) -> None:
    own = marked(kinds.byte_level, tmp_path, "<before>", "<after>", "<gap>", "<pad>")
    ids = own.vocabulary.ids()

    def add(writer: Any) -> None:
        files.byte_level(writer, tmp_path)
        for name, word in zip(names, ("<before>", "<after>", "<gap>"), strict=True):
            writer.add_uint32(f"tokenizer.ggml.{name}_token_id", ids[word])
        writer.add_uint32("tokenizer.ggml.fim_pad_token_id", ids["<pad>"])

    made = fill.find(Tokenizer(files.vocabulary(tmp_path / "m.gguf", add)))
    assert (made.prefix, made.suffix, made.middle, made.others) == (ids["<before>"], ids["<after>"], ids["<gap>"], (ids["<pad>"],))
    assert set(vocabulary._MARKS) == {"prefix", "suffix", "middle", "repository", "file", "pad"}


# ---- through the engine


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> LLM:
    path = tiny_llama(tmp_path_factory.mktemp("fill") / "llama", marks=QWEN)
    return LLM(str(path), dtype="float32", threads=1, cache_memory=1 << 22)


def test_a_prompt_with_a_suffix(llm: LLM) -> None:
    (output,) = llm.generate({"prompt": BEFORE, "suffix": AFTER}, **SHORT)
    ids = llm.fill.tokens(BEFORE, AFTER)
    assert (output.prompt, output.prompt_token_ids) == (BEFORE, ids)
    assert output.outputs[0].token_ids == llm.generate(ids, **SHORT)[0].outputs[0].token_ids
    streamed = [delta.text for delta in llm.stream({"prompt": BEFORE, "suffix": AFTER}, **SHORT)]
    assert "".join(streamed) == output.outputs[0].text
    plain, filled = llm.generate([BEFORE, {"prompt": BEFORE, "suffix": ""}], **SHORT)
    assert filled.prompt_token_ids == llm.fill.tokens(BEFORE, "") != plain.prompt_token_ids


def test_the_text_ends_where_the_model_writes_a_mark(llm: LLM) -> None:
    pad = llm.tokenizer.vocabulary.ids()["<|fim_pad|>"]
    params = {"temperature": 0, "max_tokens": 8, "logit_bias": {pad: 100.0}}
    (output,) = llm.generate({"prompt": BEFORE, "suffix": AFTER}, **params)
    assert (output.outputs[0].finish_reason, output.outputs[0].token_ids, output.outputs[0].text) == ("stop", [pad], "")
    assert llm.generate(BEFORE, **params)[0].outputs[0].finish_reason == "length"


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ({"prompt": "a", "suffix": 3}, "suffix = 3: a string is needed"),
        ({"prompt_token_ids": [1], "suffix": "b"}, "suffix: only a prompt that is a text has one"),
        ({"messages": [], "prompt": "a", "suffix": "b"}, "suffix: only a prompt that is a text has one"),
        ({"suffix": "b"}, "prompt has none of prompt"),
        ({"prompt": "a", "suffix": "\ud800"}, "suffix holds half of a surrogate pair"),
    ],
)
def test_what_has_no_suffix(llm: LLM, prompt: Any, message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        llm.generate(prompt, **SHORT)


def test_a_model_without_marks_says_so() -> None:
    with pytest.raises(Unsupported, match="suffix: this model has no tokens"):
        LLM(threads=1, cache_memory=8 << 20).generate({"prompt": "a", "suffix": "b"}, max_tokens=2)
