"""Offline batches: a file of prompts in, a file of results out."""

from __future__ import annotations

import json
import secrets
from collections import deque
from collections.abc import Iterable, Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import typer

from redraft.bench import files, report
from redraft.cli import rows
from redraft.cli.options import Given
from redraft.cli.prompting import Prompting
from redraft.cli.rows import Prompts
from redraft.config import SamplingParams
from redraft.errors import InvalidInput, did_you_mean

if TYPE_CHECKING:
    from redraft.llm import LLM
    from redraft.outputs import Delta

BLOCK = 1024  # lines that are submitted together, of which --max-seqs run at once
FORMS = ("prompt", "messages", "prompt_token_ids")
ABSENT = ("n", "logprobs", "prompt_logprobs", "provenance")  # fields of SamplingParams that a line of results has no place for
FIELDS = tuple(name for name in SamplingParams.model_fields if name not in ABSENT)
ALLOWED = ("id", *FORMS, *FIELDS)


@dataclass
class Result:
    """One row of results: the index of its prompt in the file (0 the first), and its text or its error. name: as errors call it."""

    index: int
    name: str
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
        self.error = f"{self.name}: {str(error).removeprefix('SamplingParams.')}"

    def add(self, delta: Delta) -> None:
        if delta.error is not None:
            self.fail(delta.error)
        else:
            self.text += delta.text
            self.token_ids += delta.token_ids
            self.finish_reason = delta.finish_reason

    def row(self) -> dict[str, Any]:
        usage = {"prompt_tokens": len(self.prompt), "completion_tokens": len(self.token_ids)}
        return {
            "index": self.index,
            "id": self.id,
            "text": None if self.error else self.text,
            "token_ids": None if self.error else self.token_ids,
            "finish_reason": self.finish_reason,
            "usage": {**usage, "total_tokens": sum(usage.values())},
            "seed": None if self.error else self.params.seed,
            "error": self.error,
        }


def check(prompts: Path, output: Path | None, sampling: Given, *, overwrite: bool) -> Prompts:
    """The prompts. InvalidInput where the files or the options cannot be used."""
    one_text(sampling)
    if output is not None:
        files.check_writable(output, "--output")
        if output.exists() and prompts.exists() and output.samefile(prompts):
            raise InvalidInput(f"--output = {output}: is the file of --prompts")
        if output.exists() and not overwrite:
            raise InvalidInput(f"--output = {output}: exists; --overwrite replaces it")
    return rows.prompts(prompts, ALLOWED)


def one_text(sampling: Given) -> None:
    if sampling.get("n", 1) != 1:
        raise InvalidInput("--n and --prompts: a line has one text; repeat the line for more")


def run(llm: LLM, prompting: Prompting, prompts: Prompts, output: Path | None, sampling: Given) -> int:
    """Writes one row of results for each prompt, in order. The exit code: 1 if any row has an error, 130 after Ctrl-C."""
    from rich.console import Console

    written = failed = 0
    code = 0
    with ExitStack() as stack:
        target = stack.enter_context(closing(rows.results(output, prompts.ids)))
        tick = stack.enter_context(report.bar(Console(stderr=True), prompts.count))
        try:
            for start in range(0, prompts.count, BLOCK):
                for result in results(llm, prompting, named(prompts, start, start + BLOCK), sampling):
                    target.write(result.row())
                    written, failed = written + 1, failed + (result.error is not None)
                    tick("prompts")
        except KeyboardInterrupt:
            code = 130
    summary = f"{written} of {prompts.count} {prompts.word}s written to {output or 'stdout'}, {failed} with an error"
    typer.echo(summary, err=True)
    return code or int(failed > 0)


def named(prompts: Prompts, start: int, stop: int) -> list[tuple[Result, bytes]]:
    """Each row from `start` on, with the result that will be its own."""
    lines = prompts.lines(start, stop)
    return [(Result(start + i, f"{prompts.word} {prompts.first + start + i}"), line) for i, line in enumerate(lines)]


def results(llm: LLM, prompting: Prompting, prompts: Iterable[tuple[Result, bytes]], sampling: Given) -> Iterator[Result]:
    """Yields rows in order, each as soon as it and all before it are done."""
    block = deque(_read(result, line, prompting, sampling) for result, line in prompts)
    sent = [result for result in block if not result.done]
    yield from _ready(block)
    with closing(llm.stream([{"prompt_token_ids": one.prompt} for one in sent], [one.params for one in sent])) as deltas:
        for delta in deltas:
            sent[delta.prompt].add(delta)
            yield from _ready(block)


def _ready(block: deque[Result]) -> Iterator[Result]:
    while block and block[0].done:
        yield block.popleft()


def _read(result: Result, line: bytes, prompting: Prompting, sampling: Given) -> Result:
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
