"""Prompts and conversations of requests as tokens. They are tokenized in a thread, so that long texts do not block the server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from time import monotonic
from typing import Any, cast

from redraft.errors import RedraftError
from redraft.llm import LLM
from redraft.models import chat_template
from redraft.serve import schema
from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, refused

SLACK = 2  # a tokenizer may normalize a text to fewer characters before it reads it
INPUTS = 2048  # texts of one request for embeddings
FOREIGN = frozenset({"chat_template", "conversation", "tokenize", "return_dict"})  # of transformers' call; here they would do nothing
LATE = "the request took longer than this server allows"


@dataclass(frozen=True)
class Prompt:
    """text: as given, or as rendered by the template."""

    tokens: list[int]
    text: str


class Prompts:
    """Reads for a server of `llm`. All methods raise Refused (400) that names the field, and 504 after the deadline, which is a time
    of time.monotonic."""

    def __init__(self, llm: LLM, config: ServeConfig) -> None:
        self.tokenizer, self.config = llm.tokenizer, config
        self.context, self.vocab = llm.max_model_len, llm.runner.spec.vocab
        self._longest = max(len(self.tokenizer.bytes_of(token)) for token in range(self.vocab))
        self._thread = ThreadPoolExecutor(1, "redraft-tokenizer")
        self._arguments = _arguments(self.tokenizer.render) | _arguments(chat_template.render) | FOREIGN

    async def read(
        self,
        given: str | Seq[str] | Seq[int] | Seq[Seq[int]],
        deadline: float,
        *,
        special: bool = True,
        texts: bool = False,
        field: str = "prompt",
    ) -> list[Prompt]:
        """One text or list of tokens, or several, of this field; texts: whether the texts of token lists are needed too."""
        if isinstance(given, str):
            many: list[Any] = [given]
        elif given and isinstance(given[0], int):
            many = [given]
        else:
            many = list(given)
        if not many:
            raise Refused(400, "no prompt was given", field)
        limit = INPUTS if field == "input" else self.config.max_queue
        if len(many) > limit:
            raise Refused(400, f"{field} has {len(many)} texts: at most {limit} are allowed", field)
        return [await self._run(partial(self._prompt, one, special, texts, field), deadline) for one in many]

    async def prediction(self, text: str, deadline: float) -> list[int]:
        """Tokens of the text that a reply may resemble."""
        encode = partial(self.tokenizer.encode, self._fitting(text, "prediction"), special=False)
        return cast(list[int], await self._run(encode, deadline))

    async def conversation(self, body: schema.ChatRequest | schema.TokenizeRequest, deadline: float) -> Prompt:
        """The messages as the chat template renders them."""
        assert body.messages is not None
        variables = dict(body.chat_template_kwargs or {})
        if taken := next((name for name in variables if name in self._arguments or not name.isidentifier()), None):
            raise Refused(400, f"chat_template_kwargs: {taken!r} is not a variable that a request can set", "chat_template_kwargs")
        continued = bool(body.continue_final_message)
        prompting = not continued if body.add_generation_prompt is None else body.add_generation_prompt
        if continued and prompting:
            raise Refused(400, "add_generation_prompt and continue_final_message exclude each other", "continue_final_message")
        messages = [message.plain() for message in body.messages]
        options = {"add_generation_prompt": prompting, "template": self.config.chat_template, **variables}
        if continued:
            options["continue_final_message"] = True
        return cast(Prompt, await self._run(partial(self._render, messages, options), deadline))

    async def _run(self, task: Any, deadline: float) -> Any:
        """Runs it in the thread. After the deadline, a waiting task is dropped, and so is the result of a running one."""
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic()) if deadline < float("inf") else None):
                return await asyncio.get_running_loop().run_in_executor(self._thread, task)
        except TimeoutError:
            raise Refused(504, LATE) from None

    def _prompt(self, one: str | list[int], special: bool, texts: bool, field: str) -> Prompt:
        if isinstance(one, str):
            return Prompt(self.tokenizer.encode(self._fitting(one, field), special=special), one)
        if (outside := next((token for token in one if token >= self.vocab), None)) is not None:
            raise Refused(400, f"token {outside}: not in 0..{self.vocab - 1}", field)
        return Prompt(list(one), self.tokenizer.decode_all(list(one)) if texts else "")

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Prompt:
        try:
            text = self.tokenizer.render(messages, **options)
        except RedraftError as error:
            raise refused(error, self.config.chat_template or "", *self.tokenizer.vocabulary.templates.values()) from None
        except RecursionError:
            raise Refused(400, "messages: the arguments of a tool call are nested too deeply", "messages") from None
        return Prompt(self.tokenizer.encode(self._fitting(text, "messages"), special=False), text)

    def _fitting(self, text: str, field: str) -> str:
        """Refuses a text that cannot fit before it is tokenized, because megabytes take seconds and other requests would wait."""
        limit = SLACK * self.context * self._longest
        if len(text) > limit:
            message = f"the text has {len(text)} characters: max_model_len = {self.context} tokens cannot hold them"
            raise Refused(400, message, field, "context_length_exceeded")
        return text


def _arguments(function: Any) -> frozenset[str]:
    """The names of its parameters, including `self`."""
    return frozenset(inspect.signature(getattr(function, "__func__", function)).parameters)
