"""Bytes of tokens, chat templates and the token that begins a text, with tokenizers built here and the embedded one."""

from __future__ import annotations

from pathlib import Path

import pytest
from tokenizers import Tokenizer as Fast
from tokenizers import processors

from redraft.errors import InvalidInput
from redraft.models import loader
from redraft.models.tokenizer import Tokenizer
from tests.checkpoints import tiny_llama
from tests.models.kinds import TEXTS, byte_level, save, sentencepiece


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


def test_bytes_of_the_embedded_model() -> None:
    tokenizer = Tokenizer(loader.resolve("embedded"))
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
