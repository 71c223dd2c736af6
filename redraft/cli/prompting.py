"""Prompts as token ids: as they are, or through a chat template."""

from __future__ import annotations

from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from redraft.llm import LLM
    from redraft.models.tokenizer import Tokenizer

CONTINUES = ("embedded", "embedded-draft")  # models that continue text, though they have a chat template for `chat`


@dataclass(frozen=True)
class Prompting:
    """chat: a plain prompt is a user's message; template: used instead of the checkpoint's."""

    tokenizer: Tokenizer
    chat: bool
    template: str | None = None

    @classmethod
    def of(cls, llm: LLM, template: str | None, *, raw: bool) -> Prompting:
        instruct = llm.tokenizer.has_template and llm.name not in CONTINUES
        return cls(llm.tokenizer, not raw and (template is not None or instruct), template)

    def text(self, prompt: str) -> list[int]:
        if self.chat and prompt:
            return self.messages([{"role": "user", "content": prompt}])
        return self.tokenizer.encode(prompt) if prompt else []

    def messages(self, messages: Seq[Mapping[str, Any]]) -> list[int]:
        """InvalidInput if there is no template or it refuses the messages."""
        return self.tokenizer.encode_chat(messages, template=self.template)
