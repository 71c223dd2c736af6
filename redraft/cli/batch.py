"""Offline batches: a file of prompts in, a file of results out, both JSON lines."""

from __future__ import annotations

import json
import secrets
import sys
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO, cast

import typer

from redraft.bench import files, report
from redraft.cli.options import Given
from redraft.cli.prompting import Prompting
from redraft.config import SamplingParams
from redraft.errors import InvalidInput, RedraftError, did_you_mean

if TYPE_CHECKING:
    from redraft.llm import LLM
    from redraft.outputs import Delta

BLOCK = 1024  # lines that are submitted together, of which --max-seqs run at once
FORMS = ("prompt", "messages", "prompt_token_ids")
ABSENT = ("n", "logprobs", "prompt_logprobs", "provenance")  # fields of SamplingParams that a line of results has no place for
FIELDS = tuple(name for name in SamplingParams.model_fields if name not in ABSENT)


@dataclass
class Result:
    """One line of results: the number of its input line, and its text or its error."""

    line: int
    id: str | int | None = None
    prompt: list[int] = field(default_factory=list)
    params: SamplingParams = field(default_factory=SamplingParams)
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    finish_reason: str | None = None
    error: str | None = None

    @property
    def done(self) -> bool:
        return self.error is not None or self.finish_reason is not None

    def fail(self, error: Exception | str) -> None:
        self.error = f"line {self.line}: {str(error).removeprefix('SamplingParams.')}"

    def add(self, delta: Delta) -> None:
        if delta.error is not None:
            self.fail(delta.error)
        else:
            self.text += delta.text
            self.token_ids += delta.token_ids
            self.finish_reason = delta.finish_reason

    def json(self) -> str:
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.token_ids)}
        found = {
            "id": self.id,
            "text": None if self.error else self.text,
            "token_ids": None if self.error else self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {**usage, "total_tokens": sum(usage.values())},
            "seed": None if self.error else self.params.seed,
            "error": self.error,
        }
        return json.dumps(found, ensure_ascii=False)


def check(prompts: Path, output: Path | None, sampling: Given, *, overwrite: bool) -> int:
    """The number of lines of `prompts`. InvalidInput where the files or the options cannot be used."""
    if sampling.get("n", 1) != 1:
        raise InvalidInput("--n and --prompts: a line has one text; repeat the line for more")
    if output is not None:
        files.check_writable(output, "--output")
        if output.exists() and prompts.exists() and output.samefile(prompts):
            raise InvalidInput(f"--output = {output}: is the file of --prompts")
        if output.exists() and not overwrite:
            raise InvalidInput(f"--output = {output}: exists; --overwrite replaces it")
    try:
        with prompts.open("rb") as file:
            return sum(1 for _ in file)
    except OSError as error:
        raise InvalidInput(f"--prompts = {prompts}: {error.strerror}") from None


def run(llm: LLM, prompting: Prompting, prompts: Path, output: Path | None, sampling: Given, count: int) -> int:
    """Writes one line of results for each input line, in order. The exit code: 1 if any line has an error, 130 after Ctrl-C."""
    from rich.console import Console

    written = failed = 0
    code = 0
    with ExitStack() as stack:
        source = stack.enter_context(prompts.open("rb"))
        target = sys.stdout if output is None else stack.enter_context(output.open("w", encoding="utf-8"))
        tick = stack.enter_context(report.bar(Console(stderr=True), count))
        try:
            for result in _results(llm, prompting, source, sampling):
                _write(target, result)
                written, failed = written + 1, failed + (result.error is not None)
                tick("prompts")
        except KeyboardInterrupt:
            code = 130
    typer.echo(f"{written} of {count} lines written to {output or 'stdout'}, {failed} with an error", err=True)
    return code or int(failed > 0)


def _write(target: TextIO, result: Result) -> None:
    """A whole line."""
    try:
        target.write(result.json() + "\n")
        target.flush()
    except OSError as error:
        raise RedraftError(f"the results cannot be written: {error.strerror}") from None


def _results(llm: LLM, prompting: Prompting, source: Iterable[bytes], sampling: Given) -> Iterator[Result]:
    """Yields lines in order, each as soon as it and all before it are done."""
    lines = enumerate(source, 1)
    while block := deque(_read(number, line, prompting, sampling) for number, line in islice(lines, BLOCK)):
        sent = [result for result in block if not result.done]
        yield from _ready(block)
        with closing(llm.stream([{"prompt_token_ids": one.prompt} for one in sent], [one.params for one in sent])) as deltas:
            for delta in deltas:
                sent[delta.prompt].add(delta)
                yield from _ready(block)


def _ready(block: deque[Result]) -> Iterator[Result]:
    while block and block[0].done:
        yield block.popleft()


def _read(number: int, line: bytes, prompting: Prompting, sampling: Given) -> Result:
    result = Result(number)
    try:
        given = _parse(line)
        result.id = _id(given.pop("id", None))
        own = {name: given.pop(name) for name in FORMS if name in given}
        result.params = _params(given, sampling)
        result.prompt = _prompt(own, prompting)
    except InvalidInput as error:
        result.fail(error)
    return result


def _parse(line: bytes) -> dict[str, Any]:
    try:
        given = json.loads(line)
        json.dumps(given, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise InvalidInput("half of a surrogate pair, which UTF-8 cannot encode") from None
    except (ValueError, RecursionError) as error:
        where = f" at column {error.colno}: {error.msg}" if isinstance(error, json.JSONDecodeError) else ""
        raise InvalidInput(f"not JSON{where}") from None
    if isinstance(given, str):
        return {"prompt": given}
    if not isinstance(given, dict):
        raise InvalidInput(f"a string or an object is needed, not {json.dumps(given)[:40]}")
    return {name: value for name, value in given.items() if value is not None or name == "lora"}  # null: without an adapter


def _id(value: Any) -> str | int | None:
    if value is not None and type(value) not in (str, int):
        raise InvalidInput("id: a string or a whole number is needed")
    return cast("str | int | None", value)


def _params(given: dict[str, Any], sampling: Given) -> SamplingParams:
    for name, value in given.items():
        if name not in FIELDS:
            raise InvalidInput(f"unknown field {name!r}: {did_you_mean(name, ('id', *FORMS, *FIELDS))}")
        if isinstance(value, bool) and SamplingParams.model_fields[name].annotation is not bool:
            raise InvalidInput(f"{name} = {json.dumps(value)}: true and false are not allowed here")
    return SamplingParams(**{"seed": secrets.randbits(32), **sampling, **given})


def _prompt(own: dict[str, Any], prompting: Prompting) -> list[int]:
    """The token ids of the one form that a line has."""
    if len(own) != 1:
        raise InvalidInput(f"one of {', '.join(FORMS)} is needed" + (f", not {' and '.join(own)}" if own else ""))
    ((form, value),) = own.items()
    if form == "prompt" and isinstance(value, str):
        return prompting.text(value)
    if form == "prompt" or not isinstance(value, list):
        raise InvalidInput(f"{form}: {'a string' if form == 'prompt' else 'a list'} is needed")
    if form == "prompt_token_ids":
        return value
    if not value or not all(isinstance(message, dict) for message in value):
        raise InvalidInput("messages: a list of objects with role and content is needed")
    return prompting.messages(cast(list[Mapping[str, Any]], value))
