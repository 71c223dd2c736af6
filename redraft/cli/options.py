"""Options of the verbs. They are made from the fields of config.py, which define name, type, limits and help once."""

from __future__ import annotations

import functools
import inspect
import re
import types
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Union

import typer
from pydantic.fields import FieldInfo

from redraft.config import CacheConfig, EngineConfig, ModelConfig, SamplingParams, SchedulerConfig
from redraft.errors import InvalidInput, shown

MODEL = typer.Argument(help="A folder, a GGUF file, a hub id (repo@revision) or 'embedded' (default).", metavar="MODEL", show_default=False)
Model = Annotated[str, MODEL]
Template = Annotated[
    str | None,
    typer.Option("--chat-template", help="A Jinja file, or the template itself; else the checkpoint's.", show_default=False),
]
FORM_FLAGS = {
    "structured_outputs.json": "--json-schema", "structured_outputs.regex": "--regex", "structured_outputs.choice": "--choice",
    "structured_outputs.grammar": "--grammar",
}  # fmt: skip
WRITTEN_OUT = re.compile(r"^\s*\{|::=|^\s*\??start\s*:|\n")  # a schema or a grammar, and no path of a file
Given = dict[str, Any]  # the options of a group that the user gave, by field name


class OptionGroup(NamedTuple):
    """Fields that become options: --field-name, under one heading of the help.

    pairs: a switch that is on by default has --name and --no-name, because a file may set it too; else only --no-name. hidden: other
    spellings, which the help leaves out.
    """

    heading: str
    fields: dict[str, FieldInfo]
    pairs: bool = True
    hidden: bool = False

    def without(self, *names: str) -> OptionGroup:
        return self._replace(fields={name: field for name, field in self.fields.items() if name not in names})

    def only(self, *names: str) -> OptionGroup:
        return self._replace(fields={name: self.fields[name] for name in names})


NOT_OFFERED = (  # of draft, verify and draft_rows the engine's own are; STRUCTURE has structured_outputs
    "logit_bias", "logprobs", "prompt_logprobs", "draft", "verify", "draft_rows", "provenance", "lora", "structured_outputs",
)  # fmt: skip
SAMPLING = OptionGroup(
    "Sampling",
    {name: field for name, field in SamplingParams.model_fields.items() if name not in NOT_OFFERED},
    pairs=False,  # the longer column of names would cut some of them in 80 columns
)
STRUCTURE = OptionGroup(
    "What the text must be",
    {
        "json_schema": FieldInfo(annotation=str, default=None, description="file of a JSON schema that the text matches, or the schema"),
        "regex": FieldInfo(annotation=str, default=None, description="regular expression that the whole text matches"),
        "choice": FieldInfo(annotation=tuple[str, ...], default=(), description="a text that is allowed, repeated for more"),
        "grammar": FieldInfo(annotation=str, default=None, description="file of a grammar, in Lark's form or GBNF, or the grammar"),
    },
)
KEPT = "prefix_cache_dir", "prefix_cache_size"
SHARING = "prefix_sharing", *KEPT  # verbs that measure have none of these
ENGINE = OptionGroup(
    "Engine",
    {name: EngineConfig.model_fields[name] for name in ("draft", "draft_model", "verify")}
    | {name: field for name, field in ModelConfig.model_fields.items() if name != "model"}
    | dict(SchedulerConfig.model_fields)
    | {"cache_memory": CacheConfig.model_fields["memory"], "cache_fraction": CacheConfig.model_fields["fraction"]}
    | {"cache_policy": CacheConfig.model_fields["policy"]}
    | {name: CacheConfig.model_fields[name] for name in SHARING},
)
_OPTIONS = {id(field): name for group in (SAMPLING, ENGINE) for name, field in group.fields.items()}
FLAGS = {  # "Class.field", as errors name it -> its option
    f"{kind.__name__}.{name}": f"--{_OPTIONS[id(field)].replace('_', '-')}"
    for kind in (SamplingParams, EngineConfig, ModelConfig, SchedulerConfig, CacheConfig)
    for name, field in kind.model_fields.items()
    if id(field) in _OPTIONS
}
DEFAULTS: Given = {"draft": "auto"}  # help texts of the command line that differ from the Python interface


def engine_config(model: str, given: Given) -> EngineConfig:
    return EngineConfig.of(model=model, **{**DEFAULTS, **given})


def adapted(sampling: Given, config: EngineConfig) -> Given:
    """The sampling options of requests of a verb that serves nobody else: they choose the first adapter."""
    return {"lora": next(iter(config.model.adapters)), **sampling} if config.model.lora else sampling


def structured(given: Given) -> Given:
    """The sampling option for what the text must be. InvalidInput if the file of a schema or grammar cannot be read."""
    if not given:
        return {}
    if len(given) > 1:
        raise InvalidInput(f"{' and '.join(f'--{name}'.replace('_', '-') for name in given)} exclude each other")
    ((name, value),) = given.items()
    if name in ("json_schema", "grammar") and not WRITTEN_OUT.search(value):
        try:
            value = Path(value).read_text(encoding="utf-8-sig")
        except (OSError, ValueError) as error:
            why = error.strerror if isinstance(error, OSError) else "not UTF-8"
            raise InvalidInput(f"--{name.replace('_', '-')} = {shown(value)}: cannot be read: {why}") from None
    return {"structured_outputs": {"json" if name == "json_schema" else name: value}}


def measured(sampling: Given, config: EngineConfig) -> Given:
    """The sampling options of requests of a measurement: all choose the adapter, of which there may be only one."""
    name = config.model.only_adapter()
    return sampling if name is None else {**sampling, "lora": name}


def names(text: str | None) -> tuple[str, ...]:
    """Names with commas between them; "none" is no name."""
    return tuple(name.strip() for name in (text or "").split(",") if name.strip() not in ("", "none"))


def chat_template(value: str | None) -> str | None:
    """The text of --chat-template. InvalidInput if it is neither a template nor a file with one."""
    if value is None:
        return None
    from redraft.serve.config import ServeConfig

    try:
        return ServeConfig(chat_template=value).chat_template
    except InvalidInput as error:
        raise InvalidInput(f"--chat-template{str(error).removeprefix('ServeConfig.chat_template')}") from None


def as_flag(message: str) -> str:
    """An error about a field, with the field's option in place of its name."""
    for kind, flag in FORM_FLAGS.items():
        if message.startswith(kind):
            return flag + message.removeprefix(kind)
    name, equals, rest = message.partition(" = ")
    return f"{FLAGS.get(name, name)}{equals}{rest}"


def takes(**groups: OptionGroup) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb the options of each group. The verb gets, under the group's name, a dict of those that were given."""

    def wrap(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name not in groups]
        added = [_parameter(name, field, group) for group in groups.values() for name, field in group.fields.items()]

        @functools.wraps(verb)
        def run(**values: Any) -> None:
            verb(**{p.name: values[p.name] for p in own}, **{key: _given(group, values) for key, group in groups.items()})

        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added)
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        run.__doc__ = "\n\n".join(" ".join(part.split()) for part in (verb.__doc__ or "").split("\n\n"))  # typer keeps line ends
        del run.__dict__["__wrapped__"]  # else typing would read the verb's own annotations
        return run

    return wrap


def _given(group: OptionGroup, values: Given) -> Given:
    """The values of a group's options that the user gave."""
    found = {name: values[name] for name in group.fields if values[name] not in (None, [])}
    return {name: not value if _negated(group.fields[name], group) else value for name, value in found.items()}


def _negated(field: FieldInfo, group: OptionGroup) -> bool:
    """Whether the only option of a field is --no-name."""
    return field.default is True and not group.pairs


def _parameter(name: str, field: FieldInfo, group: OptionGroup) -> inspect.Parameter:
    default = DEFAULTS.get(name, field.default)
    text, flag = field.description or "", f"--{name.replace('_', '-')}"
    if _negated(field, group):
        text, flag = f"not: {text}", f"--no-{flag[2:]}"
    elif default is True:
        flag = f"{flag}/--no-{flag[2:]}"
    elif default not in (None, (), "", False):
        text = f"{text} (default: {default})".strip()
    kind: Any = _type(field.annotation)
    each = typing.get_args(kind)  # of an option that is repeated
    shown = f"<{each[0].__name__}>" if each else None  # typer's own <list[str]> makes a column so wide that names are cut
    option = typer.Option(flag, help=text, rich_help_panel=group.heading, show_default=False, hidden=group.hidden, metavar=shown)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _type(annotation: Any) -> Any:
    """The type that typer parses. The field itself checks ranges, choices and units, so that all errors have the same form."""
    origin, parts = typing.get_origin(annotation), [part for part in typing.get_args(annotation) if part is not type(None)]
    if origin in (Union, types.UnionType):
        return _type(parts[0])
    if origin is tuple:
        return list[parts[0]]  # type: ignore[valid-type]
    return str if origin in (Literal, Annotated) else annotation
