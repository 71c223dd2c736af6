"""Bytes of tokens, chat templates and the token that begins a text, with tokenizers built here and the embedded one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from redraft.errors import InvalidInput
from redraft.models import loader
from redraft.models.tokenizer import Tokenizer
from tests.checkpoints import tiny_llama

TEXTS = [
    "once upon a time", "def f(x):\n    return x + 1\n", "naïve café, 東京 🎉🎉", "  two  spaces\tand a tab", "é", "\n", "<b>&amp;</b>",
    "mañana ▁ Ġ 0x0A <0x0A>",
]  # fmt: skip
CORPUS = [*TEXTS, "the cat sat on the mat and the dog sat on the log " * 4] * 3
SHARED = [path for path in sorted(Path("/work/shared/models").glob("*")) if (path / "tokenizer.json").exists()]


def save(folder: Path, made: Fast, **config: Any) -> Tokenizer:
    made.save(str(folder / "tokenizer.json"))
    raw = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>", "clean_up_tokenization_spaces": False}
    (folder / "tokenizer_config.json").write_text(json.dumps({**raw, **config}))
    return Tokenizer(folder)


def byte_level(folder: Path) -> Tokenizer:
    made = Fast(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<s>", "</s>"], initial_alphabet=alphabet, show_progress=False)
    made.train_from_iterator(CORPUS, trainer)
    made.add_tokens(["<tool>", "naïve"])  # which are not spelled in letters that stand for bytes
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 0)])
    return save(folder, made)


def sentencepiece(folder: Path) -> Tokenizer:
    """As Llama 2 has it: spaces are a letter, what is unknown is spelled in bytes, a space is put before the text."""
    trained = Fast(models.BPE(unk_token="<unk>", byte_fallback=True))
    trained.pre_tokenizer = pre_tokenizers.Metaspace()
    head = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    trained.train_from_iterator(CORPUS[-1:], trainers.BpeTrainer(vocab_size=340, special_tokens=head, show_progress=False))
    model = json.loads(trained.to_str())["model"]
    made = Fast(models.BPE(model["vocab"], [tuple(m) for m in model["merges"]], unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.add_special_tokens(["<unk>", "<s>", "</s>"])
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    made.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(content=" ", left=1, right=0)]
    )
    made.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return save(folder, made)


def joined(tokenizer: Tokenizer, text: str) -> bytes:
    return b"".join(tokenizer.bytes_of(token) for token in tokenizer.encode(text, special=False))


@pytest.mark.parametrize("text", TEXTS)
def test_bytes_of_a_byte_level_text(tmp_path: Path, text: str) -> None:
    tokenizer = byte_level(tmp_path)
    assert joined(tokenizer, text) == text.encode()
    assert joined(tokenizer, "<tool>naïve</s>" + text) == ("<tool>naïve</s>" + text).encode()


@pytest.mark.parametrize("text", [text for text in TEXTS if "▁" not in text])  # which spells a space there
def test_bytes_of_a_sentencepiece_text(tmp_path: Path, text: str) -> None:
    tokenizer = sentencepiece(tmp_path)
    assert joined(tokenizer, text) == b" " + text.encode(), "with the space that is put before it"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.bytes_of(3 + 0x0A) == b"\n" and tokenizer.bytes_of(2) == b"</s>"


@pytest.mark.parametrize("folder", ["embedded", *map(str, SHARED)])
def test_bytes_of_models(folder: str) -> None:
    tokenizer = Tokenizer(loader.resolve(folder))
    for text in TEXTS:
        ids = tokenizer.encode(text, special=False)
        decoded = tokenizer.decode_all(ids)
        assert joined(tokenizer, text).decode() in (decoded, " " + decoded), "a decoder may strip the space that was put before"


def test_an_id_that_the_tokenizer_lacks_is_nothing(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    assert tokenizer.bytes_of(len(tokenizer.hf) + 7) == b""


def test_a_text_begins_once(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    first = tokenizer.hf.bos_token_id
    assert tokenizer.encode("a")[0] == first != tokenizer.encode("a")[1]
    assert tokenizer.encode("<s>a") == tokenizer.encode("a")
    assert tokenizer.encode("<s><s>a") == [first, *tokenizer.encode("a")], "what the user wrote twice stays"
    assert tokenizer.encode("<s><s>a", special=False) == [first, first, *tokenizer.encode("a", special=False)]
    assert tokenizer.encode("") == [first]


def test_where_nothing_is_put_before_a_text_nothing_is_taken_away(tmp_path: Path) -> None:
    tokenizer = byte_level(tmp_path)
    made = Fast.from_file(str(tmp_path / "tokenizer.json"))
    made.post_processor = processors.ByteLevel()
    tokenizer = save(tmp_path, made)
    first = tokenizer.hf.bos_token_id
    assert tokenizer.encode("<s><s>a")[:2] == [first, first] and tokenizer.encode("a")[0] != first


def test_a_template_that_writes_the_first_token(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_llama(tmp_path))
    template = "<s>{% for m in messages %}{{ m['content'] }}{% endfor %}{% if shout %}!{% endif %}"
    said = [{"role": "user", "content": "hi"}]
    ids = tokenizer.encode_chat(said, template=template)
    assert ids == tokenizer.encode("hi") == tokenizer.encode(tokenizer.render(said, template=template))
    assert tokenizer.render(said, template=template, shout=True) == "<s>hi!"
    assert tokenizer.render(said, add_generation_prompt=False) == "[user] hi\n"


def test_what_a_template_refuses(tmp_path: Path) -> None:
    tokenizer = Tokenizer(tiny_llama(tmp_path, chat=False))
    with pytest.raises(InvalidInput, match="no chat template"):
        tokenizer.render([{"role": "user", "content": "hi"}])
    with pytest.raises(InvalidInput, match="role and content are needed"):
        tokenizer.render([{"role": "user"}], template="x")
    with pytest.raises(InvalidInput, match="refuses them"):
        tokenizer.render([{"role": "user", "content": "hi"}], template="{{ raise_exception('no') }}")
    with pytest.raises(InvalidInput, match="refuses them"):
        tokenizer.render([{"role": "user", "content": "hi"}], template="{% for %}")
