"""The checkpoint's tokenizer and chat template. Nothing from the checkpoint is executed, except its template, in a sandbox."""

from __future__ import annotations

import json
import re
import reprlib
from collections.abc import Callable, Mapping
from collections.abc import Sequence as Seq
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache, cached_property
from pathlib import Path
from typing import Any

from redraft.errors import CheckpointError, InvalidInput, RedraftError
from redraft.models import chat_template, vocabulary
from redraft.models.config import first_line
from redraft.models.gguf import file
from redraft.models.gguf import vocabulary as gguf_vocabulary
from redraft.models.tool_text import as_text

Message = Mapping[str, Any]

_BYTE = re.compile("<0x([0-9A-Fa-f]{2})>")  # how vocabularies with byte fallback spell a byte


@dataclass(frozen=True)
class Decoder:
    """Token ids to text. byte_tokens: ids of single bytes, which become text together with their neighbours; skips: whether an id has no
    text, such as a special token that is left out; special: the spellings of left-out special tokens."""

    decode: Callable[[list[int]], str]
    byte_tokens: frozenset[int] = frozenset()
    skips: Callable[[int], bool] = lambda token: False
    special: frozenset[str] = frozenset()
    alone: dict[int, str] = field(default_factory=dict, compare=False, repr=False)  # texts of single ids, as they are asked for

    def __call__(self, ids: list[int]) -> str:
        if len(ids) != 1:
            return self.decode(ids)
        if (text := self.alone.get(ids[0])) is None:
            text = self.alone[ids[0]] = self.decode(ids)
        return text

    def ends_in_bytes(self, ids: Seq[int]) -> bool:
        """Whether the last id with a text is a byte token, so that the next id may change the text of these."""
        return bool(self.byte_tokens) and next((one for one in reversed(ids) if not self.skips(one)), None) in self.byte_tokens


class Tokenizer:
    """Text to ids and back. CheckpointError if the folder or GGUF file has no tokenizer that can be read."""

    def __init__(self, path: Path) -> None:
        try:
            self.vocabulary = gguf_vocabulary.read(file.read(path)) if path.is_file() else vocabulary.read(path)
        except RedraftError:
            raise
        except Exception as error:  # the many formats raise anything
            raise CheckpointError(f"{path}: no tokenizer that can be read: {first_line(error)}") from None
        self.encode("")  # the first call completes the tokenizer's state, after which threads may share it

    def __len__(self) -> int:
        return len(self.vocabulary)

    @property
    def special_ids(self) -> list[int]:
        return self.vocabulary.special_ids

    @property
    def has_template(self) -> bool:
        """Whether the checkpoint has a chat template."""
        return bool(self.vocabulary.templates)

    def encode(self, text: str, *, special: bool = True) -> list[int]:
        """Ids of a text. `special`: with the tokens that the checkpoint puts around every text. A text that begins with <s> gets no
        second <s>."""
        try:
            ids = self.vocabulary.encode(text, special)
        except (UnicodeEncodeError, TypeError):  # the second from tokenizers in Rust
            raise InvalidInput("the text has half of a surrogate pair, which UTF-8 cannot encode") from None
        return ids[1:] if special and self.first and ids[:2] == self.first * 2 else ids

    @cached_property
    def first(self) -> list[int]:
        """The token that the checkpoint puts before every text, as a list; empty if there is none."""
        first = self.vocabulary.id("bos_token")
        return [first] if first is not None and self.vocabulary.encode("a", True)[:1] == [first] else []

    def template(self, given: str | None = None, tools: Any = None) -> str:
        """The source of a chat template: `given`, the checkpoint's of that name, or its own for conversations with or without tools."""
        own = self.vocabulary.templates
        if given is not None:
            return own.get(given, given)
        if not own:
            raise InvalidInput("this checkpoint has no chat template: give plain prompts, or a template of your own")
        found = own.get("tool_use" if tools is not None and "tool_use" in own else "default")
        if found is None:
            raise InvalidInput(f"chat template: the checkpoint has several and no default: {', '.join(sorted(own))}; name one")
        return found

    def render(
        self,
        messages: Seq[Message],
        *,
        add_generation_prompt: bool = True,
        template: str | None = None,
        tools_as_text: bool = False,
        **variables: Any,
    ) -> str:
        """A conversation as text, by the checkpoint's template or by `template`. variables: further variables of the template, or
        arguments of chat_template.render such as continue_final_message and tools.

        A message has a role and a content. Other fields that are None or empty count as not given. The role developer becomes system
        if the template does not know it. Tools, tool calls and tool results go to the template as transformers documents them, so
        arguments are objects, or text if the template can add them to text only. If the template lacks what the conversation needs of
        them, or with tools_as_text, all of them become text (tool_text.py). InvalidInput names a message that is malformed or that the
        template refuses.
        """
        tools = variables.get("tools")
        source = self.template(template, tools)
        prepared = [_message(i, message, source) for i, message in enumerate(messages)]
        if tools_as_text or _lacks_tools(source, prepared, tools):
            prepared, variables = as_text(prepared, tools), variables | {"tools": None}
        given = {**self.vocabulary.named, **variables, "add_generation_prompt": add_generation_prompt}
        try:
            try:
                return chat_template.render(source, prepared, **given)
            except TypeError:  # as if text and an object were added
                return chat_template.render(source, _with_arguments_as_text(prepared), **given)
        except Exception as error:  # from jinja, or from the template itself
            raise InvalidInput(f"messages: the chat template refuses them: {error}") from None

    def encode_chat(self, messages: Seq[Message], **options: Any) -> list[int]:
        """Ids of a conversation by its template. Adds no <s>, because the template writes it. options: see render."""
        return self.encode(self.render(messages, **options), special=False)

    def decode(self, ids: list[int]) -> str:
        return self.vocabulary.decode(ids, skip=True)

    def decode_all(self, ids: list[int]) -> str:
        """Text with special tokens."""
        return self.vocabulary.decode(ids, skip=False)

    @cached_property
    def decoder(self) -> Decoder:
        """`decode`, with the facts that decoding token by token needs."""
        special = self.left_out
        return Decoder(self.decode, self._byte_tokens, lambda token: token in special or self._lacks(token), frozenset(special.values()))

    @cached_property
    def left_out(self) -> dict[int, str]:
        """The ids of special tokens, which `decode` leaves out, and their spellings."""
        words = self.vocabulary
        found = {token: words.spelling(token) or "" for token in words.special_ids}
        return found | {token: spelling for token, (spelling, left_out) in words.added.items() if left_out}

    @cached_property
    def decoder_all(self) -> Decoder:
        """`decode_all`, with the facts that decoding token by token needs."""
        return Decoder(self.decode_all, self._byte_tokens, self._lacks)

    def _lacks(self, token: int) -> bool:
        """Whether the vocabulary lacks an id. Models may have more ids than their tokenizer."""
        return self.vocabulary.spelling(token) is None

    @cached_property
    def _byte_tokens(self) -> frozenset[int]:
        if '"ByteFallback"' not in self.vocabulary.decoder:
            return frozenset()
        return frozenset(token for piece, token in self.vocabulary.ids().items() if _BYTE.fullmatch(piece))

    def bytes_of(self, token: int) -> bytes:
        """The bytes that a token adds to a text. They may be a part of a character."""
        piece = self.vocabulary.spelling(token)
        if piece is None:  # the model has more ids than the tokenizer
            return b""
        if token in self._whole or not self.vocabulary.decoder:
            return piece.encode()
        if self._byte_level:
            table = _byte_table()
            return bytes(table[letter] for letter in piece) if all(letter in table for letter in piece) else piece.encode()
        byte = _BYTE.fullmatch(piece)
        return piece.replace("\u2581", " ").encode() if byte is None else bytes.fromhex(byte[1])

    @cached_property
    def _whole(self) -> frozenset[int]:
        """Tokens that are spelled in plain text in the vocabulary."""
        return frozenset({*self.special_ids, *self.vocabulary.added})

    @cached_property
    def _byte_level(self) -> bool:
        """Whether letters of the vocabulary stand for bytes, as in GPT-2."""
        return '"ByteLevel"' in self.vocabulary.decoder

    def spellings(self, word: str) -> list[list[int]]:
        """The ids of a word at the start of a text and after a space, to ban both."""
        texts = (word, " " + word.lstrip()) if word.strip() else (word,)
        found = [self.encode(text, special=False) for text in texts]
        return [ids for i, ids in enumerate(found) if ids and ids not in found[:i]]


def _neutral(value: Any) -> bool:
    """Whether a field counts as not given."""
    return value is None or (isinstance(value, (str, list, tuple, dict)) and not value)


def _message(i: int, message: Message, template: str) -> dict[str, Any]:
    """A message as the template needs it. Templates do not declare what they support, so their source is searched."""
    if not isinstance(message, Mapping):
        raise InvalidInput(f"messages[{i}] is a {type(message).__name__}: an object with role and content is needed")
    found = {name: value for name, value in message.items() if name == "content" or not _neutral(value)}
    calls = found.get("tool_calls")
    if calls and found.get("content") is None:
        found["content"] = ""
    if not {"role", "content"} <= set(found):
        raise InvalidInput(f"messages[{i}] has {', '.join(found) or 'nothing'}: role and content are needed")
    if not isinstance(found["role"], str):
        raise InvalidInput(f"messages[{i}].role is a {type(found['role']).__name__}: a string is needed")
    if found["content"] is None:
        raise InvalidInput(f"messages[{i}].content = None: only an assistant message with tool_calls has no content")
    if found["role"] == "developer" and not _knows(template, "developer"):
        found["role"] = "system"
    if calls:
        found["tool_calls"] = _tool_calls(f"messages[{i}].tool_calls", calls)
    return found


def _lacks_tools(template: str, messages: Seq[Message], tools: Any) -> bool:
    """Whether the template lacks something of tools that this conversation has."""
    return (
        (bool(tools) and not knows_tools(template))
        or (any(message["role"] == "tool" for message in messages) and not _knows(template, "tool"))
        or (any("tool_calls" in message for message in messages) and "tool_calls" not in _without_comments(template))
    )


def knows_tools(template: str) -> bool:
    """Whether a chat template describes the tools that it is given."""
    return re.search(r"\btools\b", _without_comments(template)) is not None


def _knows(template: str, role: str) -> bool:
    return re.search(f"[\"']{role}[\"']", _without_comments(template)) is not None


def _without_comments(template: str) -> str:
    return re.sub(r"\{#.*?#\}", "", template, flags=re.DOTALL)


def _tool_calls(place: str, calls: Any) -> list[dict[str, Any]]:
    """Tool calls with arguments as objects, as templates expect. In OpenAI's API they are JSON text."""
    found = []
    for i, call in enumerate(calls if isinstance(calls, list) else [calls]):
        function = call.get("function") if isinstance(call, Mapping) else None
        if not isinstance(function, Mapping) or not isinstance(function.get("name"), str):
            raise InvalidInput(f"{place}[{i}] = {reprlib.repr(call)}: an object with function.name and function.arguments is needed")
        arguments = function.get("arguments") or {}
        if isinstance(arguments, str):
            with suppress(ValueError):
                arguments = json.loads(arguments)
        if not isinstance(arguments, Mapping):
            raise InvalidInput(f"{place}[{i}].function.arguments = {reprlib.repr(arguments)}: a JSON object is needed")
        found.append({**call, "function": {**function, "arguments": dict(arguments)}})
    return found


def _with_arguments_as_text(messages: Seq[dict[str, Any]]) -> list[dict[str, Any]]:
    def changed(call: Any) -> Any:
        function = call["function"]
        return call | {"function": function | {"arguments": json.dumps(function["arguments"], ensure_ascii=False)}}

    return [
        message | {"tool_calls": [*map(changed, message["tool_calls"])]} if "tool_calls" in message else message for message in messages
    ]


@cache
def _byte_table() -> dict[str, int]:
    """Letter -> byte in byte-level vocabularies. Printable bytes stand for themselves, the others are letters from 256 on."""
    printed = [*range(ord("!"), ord("~") + 1), *range(ord("\u00a1"), ord("\u00ac") + 1), *range(ord("\u00ae"), ord("\u00ff") + 1)]
    others = [byte for byte in range(256) if byte not in printed]
    return {chr(byte): byte for byte in printed} | {chr(256 + i): byte for i, byte in enumerate(others)}
