"""In which formats the model writes reasoning and tool calls: the parsers of its replies, and the grammars that force calls."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Any

from redraft import registry
from redraft.config import Grammar, closed
from redraft.errors import InvalidInput, RedraftError, shown
from redraft.models.tokenizer import Tokenizer, knows_tools
from redraft.sample.grammars.form import one_of
from redraft.sample.grammars.json_schema import checked
from redraft.serve import schema
from redraft.serve.errors import Refused
from redraft.serve.parsers.chain import Chain, Single
from redraft.serve.parsers.grammar import TEXT, Calls, Words, json_rule
from redraft.serve.parsers.parser import Parser, Plain
from redraft.serve.parsers.reasoning import ReasoningScanner
from redraft.serve.parsers.scanner import CallScanner

GENERIC = "hermes"  # the parser of calls where tools are shown as text


@dataclass(frozen=True)
class Reading:
    """How the reply to one request is read and constrained. hidden: special tokens that are taken out of the text before it is parsed,
    None if the text has none; structure: what the text must be; needed: the reply would be wrong without it;
    of_tools: it is made of the request's tools."""

    parser: Callable[[], Parser] = Plain
    hidden: Mapping[int, str] | None = None
    structure: Grammar | None = None
    needed: bool = True
    of_tools: bool = False


class Formats:
    """Those of a model. tool_parser, reasoning_parser: names of the registry, or none; None: chosen by the marks in the template.
    tools_as_text: as in Tokenizer.render."""

    def __init__(self, tokenizer: Tokenizer, template: str | None, tool_parser: str | None, reasoning_parser: str | None) -> None:
        self.words = Words(_source(tokenizer, template), {spelling: token for token, spelling in tokenizer.left_out.items()})
        source = self.words.template
        knows = knows_tools(source)
        self.tools = _chosen(registry.TOOL_PARSERS, tool_parser, source if knows else "")
        self.tools_as_text = knows and tool_parser is None and self.tools is None  # the template's form is not known here
        if tool_parser is None and self.tools is None:
            self.tools = registry.load(registry.TOOL_PARSERS[GENERIC])
        self.reasoning = _chosen(registry.REASONING_PARSERS, reasoning_parser, source)

    @property
    def names(self) -> dict[str, str | None]:
        """The names of both parsers; None for none."""
        return {"tool_calls": _name(registry.TOOL_PARSERS, self.tools), "reasoning": _name(registry.REASONING_PARSERS, self.reasoning)}

    def reading(self, body: schema.ChatRequest, prompt: str, structure: Grammar | None) -> Reading:
        """For a request with this prompt. structure: what the request wants its answer to be. Refused (400) if a tool must be called
        and cannot be."""
        forced = body.tool_choice not in (None, "none", "auto")
        tools = None if body.tool_choice == "none" or not body.tools else self.tools
        if forced and tools is None:
            raise Refused(400, "tool_choice: this server reads no tool calls (its --tool-call-parser is none)", "tool_choice")
        if forced and structure is not None:
            raise Refused(400, "tool_choice: a call cannot be required together with response_format or structured_outputs", "tool_choice")
        if forced and body.min_tokens:
            raise Refused(400, f"min_tokens = {body.min_tokens}: not where a call is required, which decides where it ends", "min_tokens")
        if tools is not None and structure is not None and not tools.begin(self.words):
            why = "not together with tools: in this model's format an answer in JSON and a call begin alike"
            raise Refused(400, f"response_format: {why}", "response_format")
        opened = None if self.reasoning is None else self.reasoning.opened(prompt)
        reasoning = None if opened is None else self.reasoning
        if (structure is not None and structure.kind == "grammar") or (tools is None and reasoning is None):
            return Reading(structure=structure)
        marks = {mark for one in (tools, reasoning) if one is not None for mark in one.MARKS}
        hidden = None
        if marks & self.words.special.keys():
            kept = self.words.special if body.skip_special_tokens is False else marks
            hidden = {token: spelling for spelling, token in self.words.special.items() if spelling not in kept}
        parallel = body.parallel_tool_calls is not False
        parser = partial(_parser, tools, reasoning, opened=bool(opened), parallel=parallel)
        if structure is None and not forced and (tools is None or not tools.ANYWHERE or self._ends_elsewhere(body)):
            return Reading(parser, hidden)
        calls = None if tools is None else Calls(_schemas(body, forced), parallel and not isinstance(body.tool_choice, schema.ToolChoice))
        answer = None if forced else TEXT if structure is None else _answer(structure)
        text = grammar(self.words, answer, tools, calls, reasoning, opened=bool(opened))
        return Reading(parser, hidden, Grammar("grammar", text), needed=forced or structure is not None, of_tools=tools is not None)

    def _ends_elsewhere(self, body: schema.ChatRequest) -> bool:
        """Whether the request has an end of its own, which a grammar for any text would not allow: such a text ends only with the
        end-of-text token, and has no other special token."""
        stops = [body.stop] if isinstance(body.stop, str) else body.stop or []
        special = any(mark in stop for mark in self.words.special for stop in stops)
        return bool(body.min_tokens or body.ignore_eos or body.stop_token_ids or special)


def grammar(
    words: Words,
    answer: str | None = None,
    tools: type[CallScanner] | None = None,
    calls: Calls | None = None,
    reasoning: type[ReasoningScanner] | None = None,
    *,
    opened: bool = False,
) -> str:
    """Reasoning if there may be any (or, if the prompt has opened it, must be), then either an answer of this form or calls. A form is
    the body of a rule of Lark."""
    ways, rules = [], []
    unless = "" if reasoning is None or opened else reasoning.OPEN
    if answer is not None:
        before = "" if reasoning is None else reasoning.answer()
        ways.append(f"{words.spell(before) if before else ''} answer")
        rules.append(words.text("answer", unless) if answer == TEXT else f"answer: {answer}")
    if tools is not None and calls is not None:
        begin = tools.begin(words)
        if answer == TEXT:
            ways.append("before rest")
            rules.append(words.up_to("before", begin, unless))
        else:
            ways.append(f"{words.spell(begin) if begin else ''} rest")
        rules.append(tools.grammar(calls, words))
    first = ""
    if reasoning is not None:
        first = "reasoning" if opened else "reasoning?"
        rules.append(reasoning.grammar(words, opened))
    return "\n".join(["%llguidance {}", f"start: {first} ({' | '.join(ways)})", *rules])


def _source(tokenizer: Tokenizer, given: str | None) -> str:
    """The template of chats with tools; empty if there is none."""
    try:
        return tokenizer.template(given, tools=[])
    except RedraftError:
        return ""


def _chosen(parsers: Mapping[str, str], name: str | None, template: str) -> Any:
    """The class of this name; without a name, the first that fits the template; None if there is none."""
    if name is not None:
        return None if name == registry.NO_PARSER else registry.load(parsers[name])
    return next((one for one in map(registry.load, parsers.values()) if one.fits(template)), None)


def _name(parsers: Mapping[str, str], chosen: type | None) -> str | None:
    return next((name for name, target in parsers.items() if chosen is not None and target.endswith(f":{chosen.__name__}")), None)


def _parser(tools: type[CallScanner] | None, reasoning: type[ReasoningScanner] | None, *, opened: bool, parallel: bool) -> Parser:
    made: Parser = Plain() if tools is None else tools() if parallel else Single(tools())
    return made if reasoning is None else Chain(reasoning(opened), made)


def _schemas(body: schema.ChatRequest, forced: bool) -> dict[str, Any]:
    """Function that may be called -> schema of its arguments. Refused (400) for a schema that cannot be enforced and must be."""
    found = {}
    for i, tool in enumerate(body.tools or ()):
        function = tool.function
        if isinstance(body.tool_choice, schema.ToolChoice) and function.name != body.tool_choice.function.name:
            continue
        given = closed({"type": "object"} | (function.parameters or {"additionalProperties": False}))
        try:
            if given["type"] != "object":
                raise InvalidInput(f"type = {shown(given['type'])}: arguments are an object")
            found[function.name] = _checked(json.dumps(given))
        except RedraftError as error:
            if forced:
                place = f"tools.{i}.function.parameters"
                raise Refused(400, f"{place}: {str(error).removeprefix('structured_outputs.json: ')}", place) from None
            found[function.name] = {"type": "object"}
    return found


@lru_cache(maxsize=128)
def _checked(text: str) -> dict[str, Any]:
    """The schema of this JSON text, checked. Kept, because a conversation sends its tools again with every turn."""
    return checked(json.loads(text))


def _answer(structure: Grammar) -> str:
    """What an answer must be, as the body of a rule."""
    kind, text = structure
    if kind in ("json", "json_object"):
        return json_rule({"type": "object"} if kind == "json_object" else checked(json.loads(text)))
    if kind == "regex":
        return f"/{text.replace('/', chr(92) + '/')}/"
    if kind == "choice":
        return one_of(json.loads(text))
    raise AssertionError(kind)
