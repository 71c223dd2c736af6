"""The checkpoint's tokenizer and chat template, by transformers; nothing from the checkpoint is executed."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
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

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text; `special`: with the tokens that the checkpoint puts around every text (such as <s>)."""
        return list(self.hf(text, add_special_tokens=special)["input_ids"])

    def encode_chat(self, messages: Seq[Message], *, add_generation_prompt: bool = True) -> list[int]:
        """Ids of a conversation by the checkpoint's template, which writes <s> itself where it wants one."""
        if not self.hf.chat_template:
            raise InvalidInput("this checkpoint has no chat template: use generate with a prompt instead")
        for i, message in enumerate(messages):
            if not {"role", "content"} <= set(message):
                raise InvalidInput(f"messages[{i}] has {', '.join(message) or 'nothing'}: role and content are needed")
        try:
            text = self.hf.apply_chat_template(list(messages), tokenize=False, add_generation_prompt=add_generation_prompt)
        except Exception as error:  # jinja's, or what a template raises itself
            raise InvalidInput(f"messages: the chat template refuses them: {error}") from None
        return self.encode(text, special=False)

    def decode(self, ids: list[int]) -> str:
        return self._text(ids, skip=True)

    def decode_all(self, ids: list[int]) -> str:
        """With special tokens written out."""
        return self._text(ids, skip=False)

    def _text(self, ids: list[int], *, skip: bool) -> str:
        decoder = self.hf if self._fast is None else self._fast  # the Rust tokenizer itself: ten times quicker
        return str(decoder.decode(ids, skip_special_tokens=skip))

    def spellings(self, word: str) -> list[list[int]]:
        """The ids of a word at the start of a text and after a space, to ban both."""
        found = [self.encode(text, special=False) for text in (word, " " + word.lstrip())]
        return [ids for i, ids in enumerate(found) if ids and ids not in found[:i]]
