"""The checkpoint's tokenizer and chat template, by transformers; nothing from the checkpoint is executed."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from redraft.errors import CheckpointError, InvalidInput

Message = Mapping[str, Any]


class Tokenizer:
    """Text to ids and back. CheckpointError where the folder has none."""

    def __init__(self, path: Path) -> None:
        from transformers import AutoTokenizer
        from transformers.utils import logging

        logging.set_verbosity_error()
        try:
            self.hf: Any = AutoTokenizer.from_pretrained(path, trust_remote_code=False, local_files_only=True)
        except Exception as error:  # whatever the many formats raise
            raise CheckpointError(f"{path}: no tokenizer that can be read: {str(error).splitlines()[0]}") from None
        self._fast = getattr(self.hf, "backend_tokenizer", None)
        self.encode("")  # settles what the tokenizer's state still holds of its file, so that threads may share it

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; `special`: with the tokens that the checkpoint puts around every text (such as <s>, which is not put
        before a text that begins with it)."""
        try:
            ids: list[int] = list(self.hf(text, add_special_tokens=special)["input_ids"])
        except UnicodeEncodeError:
            raise InvalidInput("the text has half of a surrogate pair, which no UTF-8 can hold") from None
        return ids[1:] if special and self._first and ids[:2] == self._first * 2 else ids

    @cached_property
    def _first(self) -> list[int]:
        """The token that is put before every text, where there is one."""
        first = self.hf.bos_token_id
        return [first] if first is not None and list(self.hf("a")["input_ids"])[:1] == [first] else []

    def render(self, messages: Seq[Message], *, add_generation_prompt: bool = True, template: str | None = None, **variables: Any) -> str:
        """A conversation as text, by the checkpoint's template or by `template`; variables: what else it shall see, or an argument of
        transformers' apply_chat_template such as continue_final_message."""
        if not (template or self.hf.chat_template):
            raise InvalidInput("this checkpoint has no chat template: give plain prompts, or a template of your own")
        for i, message in enumerate(messages):
            if not {"role", "content"} <= set(message):
                raise InvalidInput(f"messages[{i}] has {', '.join(message) or 'nothing'}: role and content are needed")
        try:
            return str(
                self.hf.apply_chat_template(
                    list(messages), tokenize=False, add_generation_prompt=add_generation_prompt, chat_template=template, **variables
                )
            )
        except Exception as error:  # jinja's, or what a template raises itself
            raise InvalidInput(f"messages: the chat template refuses them: {error}") from None

    def encode_chat(self, messages: Seq[Message], **options: Any) -> list[int]:
        """Ids of a conversation by its template, which writes <s> itself where it wants one; options: see render."""
        return self.encode(self.render(messages, **options), special=False)

    def decode(self, ids: list[int]) -> str:
        return self._text(ids, skip=True)

    def decode_all(self, ids: list[int]) -> str:
        """With special tokens written out."""
        return self._text(ids, skip=False)

    def _text(self, ids: list[int], *, skip: bool) -> str:
        decoder = self.hf if self._fast is None else self._fast  # the Rust tokenizer itself: ten times quicker
        return str(decoder.decode(ids, skip_special_tokens=skip))

    def bytes_of(self, token: int) -> bytes:
        """What a token adds to a text; a token may hold a part of a character."""
        piece: str | None = self.hf.convert_ids_to_tokens(token)
        if piece is None:  # the model has more ids than the tokenizer
            return b""
        if token in self._whole or self._fast is None:
            return piece.encode()
        if self._byte_level:
            table = _byte_table()
            return bytes(table[letter] for letter in piece) if all(letter in table for letter in piece) else piece.encode()
        byte = re.fullmatch("<0x([0-9A-F]{2})>", piece)
        return piece.replace("\u2581", " ").encode() if byte is None else bytes.fromhex(byte[1])

    @cached_property
    def _whole(self) -> frozenset[int]:
        """Tokens that stand for themselves, letter by letter."""
        return frozenset({*self.hf.all_special_ids, *self.hf.added_tokens_decoder})

    @cached_property
    def _byte_level(self) -> bool:
        """Whether letters of the vocabulary stand for bytes, as in GPT-2's."""
        return self._fast is not None and '"ByteLevel"' in json.dumps(json.loads(self._fast.to_str()).get("decoder"))

    def spellings(self, word: str) -> list[list[int]]:
        """The ids of a word at the start of a text and after a space, to ban both."""
        found = [self.encode(text, special=False) for text in (word, " " + word.lstrip())]
        return [ids for i, ids in enumerate(found) if ids and ids not in found[:i]]


@cache
def _byte_table() -> dict[str, int]:
    """The letter that stands for each byte in vocabularies of bytes: itself where it can be printed, else one from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
