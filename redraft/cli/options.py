"""Options of the verbs, made from the fields of config.py: name, type, limits and help are written once, there."""

from __future__ import annotations

import functools
import inspect
import types
import typing
from collections.abc import Callable
from typing import Annotated, Any, Literal, NamedTuple, Union

import typer
from pydantic.fields import FieldInfo

from redraft.config import CacheConfig, EngineConfig, ModelConfig, SamplingParams, SchedulerConfig

MODEL = typer.Argument(help="A folder, a hub id (repo@revision), or 'embedded', the default.", metavar="MODEL", show_default=False)
Model = Annotated[str, MODEL]
Given = dict[str, Any]  # the options of a group that the user gave, by field name


class Group(NamedTuple):
    """Fields that become options: --field-name, under one heading of the help."""

    heading: str
    fields: dict[str, FieldInfo]

    def without(self, *names: str) -> Group:
        return Group(self.heading, {name: field for name, field in self.fields.items() if name not in names})


NOT_OFFERED = ("logit_bias", "logprobs", "prompt_logprobs", "draft", "verify", "draft_rows", "provenance")  # the engine's own are
SAMPLING = Group(
    "Sampling",
    {name: field for name, field in SamplingParams.model_fields.items() if name not in NOT_OFFERED},
)
ENGINE = Group(
    "Engine",
    {name: EngineConfig.model_fields[name] for name in ("draft", "draft_model", "verify")}
    | {name: field for name, field in ModelConfig.model_fields.items() if name != "model"}
    | dict(SchedulerConfig.model_fields)
    | {"cache_memory": CacheConfig.model_fields["memory"], "cache_fraction": CacheConfig.model_fields["fraction"]}
    | {"prefix_sharing": CacheConfig.model_fields["prefix_sharing"]},
)
_OPTIONS = {id(field): name for group in (SAMPLING, ENGINE) for name, field in group.fields.items()}
FLAGS = {  # "Class.field", as errors name it -> its option
    f"{kind.__name__}.{name}": f"--{_OPTIONS[id(field)].replace('_', '-')}"
    for kind in (SamplingParams, EngineConfig, ModelConfig, SchedulerConfig, CacheConfig)
    for name, field in kind.model_fields.items()
    if id(field) in _OPTIONS
}
DEFAULTS: Given = {"draft": "token-recycling"}  # where the command line differs from the Python interface


def engine_config(model: str, given: Given) -> EngineConfig:
    return EngineConfig.of(model=model, **{**DEFAULTS, **given})


def as_flag(message: str) -> str:
    """An error about a field, by the name that the command line has for it."""
    name, equals, rest = message.partition(" = ")
    return f"{FLAGS.get(name, name)}{equals}{rest}"


def takes(**groups: Group) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Gives a verb the options of each group. The verb gets, under the group's name, a dict of those that were given."""

    def wrap(verb: Callable[..., None]) -> Callable[..., None]:
        own = [p for p in inspect.signature(verb, eval_str=True).parameters.values() if p.name not in groups]
        added = [_parameter(name, field, group.heading) for group in groups.values() for name, field in group.fields.items()]

        @functools.wraps(verb)
        def run(**values: Any) -> None:
            given = {key: {name: values[name] for name in group.fields if values[name] not in (None, [])} for key, group in groups.items()}
            verb(**{p.name: values[p.name] for p in own}, **given)

        signature = inspect.Signature([p.replace(kind=inspect.Parameter.KEYWORD_ONLY) for p in own] + added)
        run.__signature__ = signature  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in signature.parameters.values()}
        del run.__dict__["__wrapped__"]  # or typing would read the verb's own annotations
        return run

    return wrap


def _parameter(name: str, field: FieldInfo, heading: str) -> inspect.Parameter:
    default = DEFAULTS.get(name, field.default)
    text = field.description or ""
    if default not in (None, (), "") and not isinstance(default, bool):
        text = f"{text} (default: {default})".strip()
    flags = [f"--{name.replace('_', '-')}"] if default is False else []  # else typer adds a --no- form
    option = typer.Option(*flags, help=text, rich_help_panel=heading, show_default=False)
    kind: Any = _type(field.annotation)
    return inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option])


def _type(annotation: Any) -> Any:
    """The type that typer parses. Ranges, choices and units are checked by the field itself, so that all errors read alike."""
    origin, parts = typing.get_origin(annotation), [part for part in typing.get_args(annotation) if part is not type(None)]
    if origin in (Union, types.UnionType):
        return _type(parts[0])
    if origin is tuple:
        return list[parts[0]]  # type: ignore[valid-type]
    return str if origin in (Literal, Annotated) else annotation
