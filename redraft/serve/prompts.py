"""Prompts and conversations of requests as tokens. They are tokenized in a thread, so that long texts do not block the server."""

from __future__ import annotations

import asyncio
import inspect
from collections.abc import Sequence as Seq
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from functools import partial
from itertools import groupby, pairwise
from time import monotonic
from typing import Any, cast

from redraft.config import SamplingParams
from redraft.core.tree import F32
from redraft.errors import RedraftError
from redraft.front import Front
from redraft.models import chat_template
from redraft.serve import schema
from redraft.serve.config import ServeConfig
from redraft.serve.errors import Refused, refused
from redraft.serve.formats import Formats, Reading

SLACK = 2  # a tokenizer may normalize a text to fewer characters before it reads it
INPUTS = 2048  # texts of one request for embeddings
FOREIGN = frozenset({"chat_template", "conversation", "tokenize", "return_dict"})  # of transformers' call; here they would do nothing
LATE = "the request took longer than this server allows"


@dataclass(frozen=True)
class Prompt:
    """text: as given, or as rendered by the template; field: of the request that has it; scored: the first token whose log-probability
    is wanted, None for none; vectors: [tokens, hidden], that take the place of the tokens; chunks: (first, end) of segments between the
    first and the last."""

    tokens: list[int]
    text: str
    field: str = "prompt"
    scored: int | None = None
    vectors: F32 | None = None
    chunks: tuple[tuple[int, int], ...] = ()


class Prompts:
    """Reads for a server of `llm`. All methods raise Refused (400) that names the field, and 504 after the deadline, which is a time
    of time.monotonic."""

    def __init__(self, llm: Front, config: ServeConfig) -> None:
        self.llm, self.tokenizer, self.config, self._sampler = llm, llm.tokenizer, config, llm.sampler
        self.context, self.vocab = llm.max_model_len, llm.spec.vocab
        self.formats = Formats(llm.tokenizer, config.chat_template, config.tool_call_parser, config.reasoning_parser)
        self._longest = max(len(self.tokenizer.bytes_of(token)) for token in range(self.vocab))
        self._thread = ThreadPoolExecutor(1, "redraft-tokenizer")
        self._builder = ThreadPoolExecutor(1, "redraft-grammar")
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
        self._few(many, field, INPUTS if field == "input" else self.config.max_queue)
        return [await self._run(partial(self._prompt, one, special, texts, field), deadline) for one in many]

    async def mixed(self, many: Seq[str | Seq[int | str]], deadline: float, *, field: str = "prompt") -> list[Prompt]:
        """Prompts that are texts, or parts of which each is a token or a text. A text at the start gets the tokens that the checkpoint puts
        around every text."""
        if not many:
            raise Refused(400, "no prompt was given", field)
        self._few(many, field, self.config.max_queue)
        found = []
        for one in many:
            tokens: list[int] = []
            for run in [list(same) for _, same in groupby([one] if isinstance(one, str) else one, type)]:
                given: Any = ["".join(map(str, run)) if isinstance(run[0], str) else run]
                (prompt,) = await self.read(given, deadline, special=not tokens, field=field)
                tokens += prompt.tokens
            found.append(Prompt(tokens, "", field))
        return found

    async def joined(self, segments: Seq[str | list[int]], deadline: float, *, special: bool = True) -> Prompt:
        """A prompt of segments, of which the first gets the tokens that the checkpoint puts around every text."""
        tokens: list[int] = []
        ends: list[int] = []
        for i, segment in enumerate(segments):
            name = f"segments[{i}]"
            tokens += (await self._run(partial(self._prompt, segment, special and not i, False, name), deadline)).tokens
            if len(tokens) == (ends[-1] if ends else 0):
                raise Refused(400, f"{name} is empty: at least one token is needed", "segments")
            ends.append(len(tokens))
        return Prompt(tokens, "", "segments", chunks=tuple(pairwise(ends[:-1])))

    async def filled(
        self, given: Any, suffix: str, deadline: float, *, special: bool = True, files: Seq[tuple[str, str]] = (), room: int = 1
    ) -> list[Prompt]:
        """Prompts whose continuation is what is between a text and `suffix`. files: names and texts of other files, of which the first are
        left out if they leave no room for `room` new tokens."""
        texts = [given] if isinstance(given, str) else list(given)
        if not texts or not all(isinstance(text, str) for text in texts):
            raise Refused(400, "suffix: only a prompt that is a text has one", "suffix")
        self._few(texts, "prompt", self.config.max_queue)
        options = {"special": special, "files": files, "limit": self.context - room}
        return [await self._run(partial(self._filled, text, suffix, options), deadline) for text in texts]

    async def continued(self, pairs: Seq[tuple[str, str]], deadline: float, field: str) -> list[Prompt]:
        """Each context with its continuation, whose log-probabilities are wanted: of the tokens after those that the whole text and the
        context begin with. field: that of the continuations."""
        return [await self._run(partial(self._continued, *pair, field, i), deadline) for i, pair in enumerate(pairs)]

    async def prediction(self, text: str, deadline: float) -> list[int]:
        """Tokens of the text that a reply may resemble."""
        encode = partial(self.tokenizer.encode, self._fitting(text, "prediction"), special=False)
        return cast(list[int], await self._run(encode, deadline))

    async def compiled(self, params: SamplingParams, deadline: float) -> None:
        """Builds what the engine will need to sample with these parameters, such as a grammar, so that no other request waits for it."""
        await self._run(partial(self._sampler.check, params), deadline, self._builder)

    async def reading(
        self, body: schema.ChatRequest, prompt: Prompt, params: SamplingParams, deadline: float
    ) -> tuple[Reading, SamplingParams]:
        """How the reply to a conversation is read, and the parameters for it. A grammar that cannot be compiled is left out if the reply
        need not follow it."""
        read = partial(self.formats.reading, body, prompt.text, params.structured_outputs)
        if params.structured_outputs is None and not body.tools:
            found: Reading = read()
        else:
            try:
                await self.compiled(params, deadline)
            except RedraftError:
                return Reading(), params  # what is wrong with the client's own is said where it is submitted
            found = await self._run(read, deadline, self._builder)
        if found.hidden is not None:
            params = params.but(skip_special_tokens=False)
        bound = params.but(structured_outputs=found.structure)
        if found.of_tools:
            try:
                await self.compiled(bound, deadline)
            except RedraftError as error:
                if found.needed:
                    raise Refused(400, f"tools: no grammar can be made of them: {error}", "tools") from None
                return found, params
        return found, bound

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
        segments: list[str] = getattr(body, "segments", None) or []
        if segments:
            asked = next((message for message in reversed(messages) if message["role"] == "user"), None)
            if asked is None:
                raise Refused(400, "segments: no message has the role user", "segments")
            asked["content"] = "".join([*segments, asked["content"]])
        options = {"add_generation_prompt": prompting, "template": self.config.chat_template, **variables}
        if body.tools:
            options["tools"] = [tool.plain() for tool in body.tools]
        if self.formats.tools_as_text:
            options["tools_as_text"] = True
        if continued:
            options["continue_final_message"] = True
        prompt = cast(Prompt, await self._run(partial(self._render, messages, options), deadline))
        if not segments:
            return prompt
        if (at := prompt.text.rfind("".join(segments))) < 1:
            segments = [segments[0].lstrip(), *segments[1:]]  # many templates trim messages
            at = prompt.text.rfind("".join(segments))
        if at < 1:
            raise Refused(400, "segments: the chat template of this model changes their text, or nothing is before it", "segments")
        rest = prompt.text[at + len("".join(segments)) :]
        return replace(await self.joined([prompt.text[:at], *segments, rest], deadline, special=False), text=prompt.text)

    async def _run(self, task: Any, deadline: float, thread: ThreadPoolExecutor | None = None) -> Any:
        """Runs it in a thread, by default the tokenizer's. After the deadline, a waiting task is dropped, and so is the result of a
        running one."""
        try:
            async with asyncio.timeout(max(0.0, deadline - monotonic()) if deadline < float("inf") else None):
                return await asyncio.get_running_loop().run_in_executor(thread or self._thread, task)
        except TimeoutError:
            raise Refused(504, LATE) from None

    @staticmethod
    def _few(many: Seq[Any], field: str, limit: int) -> None:
        if len(many) > limit:
            raise Refused(400, f"{field} has {len(many)} texts: at most {limit} are allowed", field)

    def _prompt(self, one: str | list[int], special: bool, texts: bool, field: str) -> Prompt:
        if isinstance(one, str):
            return Prompt(self.tokenizer.encode(self._fitting(one, field), special=special), one, field)
        if (outside := next((token for token in one if token >= self.vocab), None)) is not None:
            raise Refused(400, f"token {outside}: not in 0..{self.vocab - 1}", field)
        return Prompt(list(one), self.tokenizer.decode_all(list(one)) if texts else "", field)

    def _continued(self, context: str, continuation: str, field: str, number: int) -> Prompt:
        text = self._fitting(context + continuation, field)
        before, tokens = self.tokenizer.encode(context), self.tokenizer.encode(text)
        same = next((i for i, (one, other) in enumerate(zip(before, tokens)) if one != other), min(len(before), len(tokens)))
        begin = max(same, 1)  # nothing precedes a first token, so it has no probability
        if begin >= len(tokens):
            raise Refused(400, f"{field}: text {number} adds no token to the one before it, so it has no probability", field)
        if len(tokens) >= self.context:
            message = f"{field}: text {number} and the one before it have {len(tokens)} tokens: max_model_len = {self.context} is too few"
            raise Refused(400, message, field, "context_length_exceeded")
        return Prompt(tokens, text, field, begin)

    def _filled(self, text: str, suffix: str, options: dict[str, Any]) -> Prompt:
        fill = self.llm.fill
        for _, other in options["files"]:
            self._fitting(other, "input_extra")
        return Prompt(fill.tokens(self._fitting(text, "prompt"), self._fitting(suffix, "suffix"), **options), text, "prompt")

    def _render(self, messages: list[dict[str, Any]], options: dict[str, Any]) -> Prompt:
        try:
            text = self.tokenizer.render(messages, **options)
        except RedraftError as error:
            raise refused(error, self.config.chat_template or "", *self.tokenizer.vocabulary.templates.values()) from None
        except RecursionError:
            raise Refused(400, "messages: the arguments of a tool call are nested too deeply", "messages") from None
        return Prompt(self.tokenizer.encode(self._fitting(text, "messages"), special=False), text, "messages")

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
