"""`redraft chat`: talk to a model that has a chat template."""

from __future__ import annotations

import json
import re
import secrets
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from redraft.cli import options
from redraft.cli.options import ENGINE, SAMPLING, STRUCTURE, Given, Model, Template, engine_config, takes
from redraft.cli.prompting import Prompting
from redraft.cli.stream import folded, show
from redraft.config import SamplingParams
from redraft.errors import InvalidInput, PromptTooLong

if TYPE_CHECKING:
    from redraft.llm import LLM

Message = dict[str, str]

SHARE = 4  # without --max-tokens a reply takes at most 1 / SHARE of the context, so that more turns fit, or the checkpoint's own limit
COMMAND = re.compile(r"(/\w*)(?:\s+(.*))?", re.DOTALL)  # a path such as /usr/bin is not a command
COMMANDS = {
    "/help": "this list",
    "/system TEXT": "set the system message; without TEXT, remove it",
    "/clear": "forget the conversation, keep the system message",
    "/save FILE": "write the conversation to a new file, as one line of JSON",
    "/exit": "leave, as Ctrl-D does; Ctrl-C stops a reply",
}


@takes(sampling=SAMPLING.without("n"), structure=STRUCTURE, engine=ENGINE)
def chat(
    model: Model = "embedded",
    system: Annotated[str | None, typer.Option(help="The system message.", show_default=False)] = None,
    chat_template: Template = None,
    *,
    sampling: Given,
    structure: Given,
    engine: Given,
) -> None:
    """Talk to a model that has a chat template.

    /help lists the commands. Ctrl-C stops a reply, Ctrl-D leaves. If input is piped in, each line is a turn. With --lora
    the first adapter replies. Unless --max-tokens says otherwise, a reply takes at most a quarter of the context.
    """
    template = options.chat_template(chat_template)
    config = engine_config(model, engine)
    sampling = {**sampling, **options.structured(structure)}
    SamplingParams(**sampling)
    sampling = options.adapted(sampling, config)
    from redraft.llm import LLM

    llm = LLM(config=config)
    share = max(1, llm.max_model_len // SHARE)
    params = SamplingParams(**{"max_tokens": min(share, llm.defaults.get("max_tokens", share)), "seed": secrets.randbits(32), **sampling})
    talk = Conversation(Prompting(llm.tokenizer, True, template))
    talk.set_system(system)
    if sys.stdin.isatty():
        _banner(llm)
    for line in _typed() if sys.stdin.isatty() else _piped():
        if line == "/exit":
            break
        try:
            if not _command(talk, line):
                _reply(llm, talk, line.strip(), params)
        except InvalidInput as error:
            if not sys.stdin.isatty():
                raise
            typer.echo(f"error: {error}{'; /clear starts anew' * isinstance(error, PromptTooLong)}", err=True)


@dataclass
class Conversation:
    """The messages so far. A message is added only with its reply."""

    prompting: Prompting
    system: list[Message] = field(default_factory=list)
    turns: list[Message] = field(default_factory=list)

    def set_system(self, text: str | None) -> None:
        """Sets the system message. If the chat template refuses it, InvalidInput is raised and the old message stays."""
        system = [{"role": "system", "content": text}] if text else []
        self.prompting.messages([*system, {"role": "user", "content": "?"}])
        self.system = system

    def prompt_with(self, text: str) -> list[int]:
        """The token ids of the conversation with one more message of the user."""
        return self.prompting.messages([*self.system, *self.turns, {"role": "user", "content": text}])

    def add(self, text: str, reply: str) -> None:
        self.turns += [{"role": "user", "content": text}, {"role": "assistant", "content": reply}]

    def save(self, path: Path) -> None:
        try:
            with path.expanduser().open("x", encoding="utf-8") as file:
                file.write(json.dumps({"messages": [*self.system, *self.turns]}, ensure_ascii=False) + "\n")
        except (OSError, ValueError) as error:
            raise InvalidInput(f"/save {path}: {getattr(error, 'strerror', None) or error}") from None


def _command(talk: Conversation, line: str) -> bool:
    """Whether the line was a command. InvalidInput names an unknown command."""
    found = COMMAND.fullmatch(line)
    if found is None:
        return False
    name, text = found[1], (found[2] or "").strip()
    if name == "/help":
        _note("\n".join(f"{form:13} {what}" for form, what in COMMANDS.items()))
    elif name == "/system":
        talk.set_system(text or None)
        _note("system message set" if text else "system message removed")
    elif name == "/clear":
        talk.turns.clear()
    elif name == "/save" and text:
        talk.save(Path(text))
        _note(f"saved to {text}")
    else:
        missing = "a FILE is needed" if name == "/save" else "unknown command; /help lists them"
        raise InvalidInput(f"{name}: {missing}")
    return True


def _reply(llm: LLM, talk: Conversation, text: str, params: SamplingParams) -> None:
    prompt = talk.prompt_with(text)
    adapter = None if params.lora is None else llm.runner.adapters[params.lora]
    cached = llm.runner.memory.match(prompt, "" if adapter is None else adapter.salted(""))
    shown = show(llm, prompt, params)
    _note(shown.summary(llm, params, f"{cached} of {len(prompt)} prompt tokens cached"))
    talk.add(text, shown.texts[0])
    if shown.interrupted and not sys.stdin.isatty():
        raise typer.Exit(130)


def _banner(llm: LLM) -> None:
    context = f"{llm.max_model_len} tokens of context"
    _note(folded([f"{llm.name}, drafts by {llm.config.draft}, {context}", "/help lists the commands; /exit or Ctrl-D leaves"]))


def _note(text: str) -> None:
    typer.secho(text, dim=True, err=True)


def _typed() -> Iterator[str]:
    """Lines from the terminal until Ctrl-D; Ctrl-C drops the line."""
    import readline  # noqa: F401 - gives input() its line editing and history

    while True:
        try:
            line = input("> ").rstrip()
        except EOFError:
            typer.echo()
            return
        except KeyboardInterrupt:
            typer.echo()
            continue
        if line.strip():
            yield line


def _piped() -> Iterator[str]:
    yield from (line.rstrip() for line in sys.stdin if line.strip())
