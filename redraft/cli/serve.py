"""`redraft serve`: a model with the interface of OpenAI, configured by options, the environment and a file."""

from __future__ import annotations

import os
import re
import typing
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import typer
from pydantic.fields import FieldInfo

from redraft import __version__, registry
from redraft.cli.options import ENGINE, MODEL, Given, OptionGroup, engine_config, takes
from redraft.config import EngineConfig, ModelConfig
from redraft.errors import InvalidInput, did_you_mean
from redraft.serve.config import ServeConfig
from redraft.serve.listen import listen

SERVER = OptionGroup("Server", dict(ServeConfig.model_fields))
ALIASES = {"max_num_seqs": "max_seqs", "max_num_batched_tokens": "token_budget"}
ALSO = OptionGroup(
    "Engine",
    {name: FieldInfo(annotation=int, default=None, description=f"the same as {field}") for name, field in ALIASES.items()},
    hidden=True,
)
FIELDS = {"model": ModelConfig.model_fields["model"], **ENGINE.fields, **SERVER.fields}
NAMES = (*FIELDS, *ALIASES)  # of every setting, on the command line, in the environment and in a file

PREFIX = "REDRAFT_"
CONFIG = "config"
OTHERS = {"REDRAFT_CACHE", "REDRAFT_ISA"}  # variables that are read elsewhere


class Setting(NamedTuple):
    """A value and its source. spelled: its name there, for errors."""

    value: Any
    layer: str
    spelled: str


Layer = dict[str, Setting]  # by field


@takes(server=SERVER, engine=ENGINE, also=ALSO)
def serve(
    model: Annotated[str | None, MODEL] = None,
    config: Annotated[
        Path | None, typer.Option(help="A YAML file whose keys are these options, without the dashes in front.", metavar="FILE")
    ] = None,
    *,
    server: Given,
    engine: Given,
    also: Given,
) -> None:
    """Serve a model to clients of OpenAI's interface.

    Options may also be in a file (--config) and in the environment, such as REDRAFT_PORT for --port, with commas between several
    values. The command line overrides the environment, which overrides the file.
    """
    given = {"model": model, CONFIG: config, **also, **engine, **server}
    layers = read({name: value for name, value in given.items() if value is not None}, os.environ)
    settings = merge(*layers)
    configs = build(settings)
    show(*configs, settings)
    sockets = listen(configs[1])  # before the imports and the model, which take seconds to minutes
    code = registry.load("redraft.serve.run:run")(*configs, sockets)
    if code:
        raise typer.Exit(code)


def read(given: Mapping[str, Any], environment: Mapping[str, str]) -> tuple[Layer, Layer, Layer]:
    """File, environment and command line. The file is named by one of the other two."""
    variables = {}
    for variable, text in environment.items():
        if not variable.startswith(PREFIX) or variable in OTHERS:
            continue
        if variable in VARIABLES:
            variables[VARIABLES[variable]] = text
        else:
            typer.echo(f"warning: {variable} in the environment is not a setting: {did_you_mean(variable, VARIABLES)}", err=True)
    exported = layer("environment", variables, _variable)
    typed = layer("command line", given, _flag)
    named = typed.pop(CONFIG, exported.get(CONFIG))
    exported.pop(CONFIG, None)
    for name, setting in exported.items():
        if _repeats(name):
            exported[name] = setting._replace(value=[part.strip() for part in setting.value.split(",")])
    return {} if named is None else load(Path(os.path.expanduser(named.value)), named.spelled), exported, typed


def load(path: Path, source: str) -> Layer:
    """The settings of a YAML file."""
    import yaml

    source = f"{source} {path}"
    try:
        loader = yaml.SafeLoader(path.read_text(encoding="utf-8"))
        top = loader.get_single_node()
        whole = top is None or isinstance(top, yaml.MappingNode)  # None: nothing but comments
        pairs = [(str(key.value), loader.construct_object(value, deep=True)) for key, value in top.value] if top and whole else []
    except OSError as error:
        raise InvalidInput(f"{source}: {error.strerror}") from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:  # their own texts quote the line, which may contain a key
        mark = getattr(error, "problem_mark", None)
        raise InvalidInput(f"{source}: not YAML in UTF-8{f', line {mark.line + 1}' if mark else ''}") from None
    if not whole:
        raise InvalidInput(f"{source}: not a mapping of options to values")
    found: dict[str, Any] = {}
    for key, value in pairs:
        name = key.replace("-", "_")
        if name not in NAMES:
            raise InvalidInput(f"{source}: unknown option {key!r}: {did_you_mean(key, map(_key, NAMES))}")
        if name in found:
            raise InvalidInput(f"{source}: {key} is given twice")
        if isinstance(value, dict) or (isinstance(value, list) and not _repeats(name)):
            raise InvalidInput(f"{source}: {key} takes one value, not a {'list' if isinstance(value, list) else 'mapping'}")
        if isinstance(value, bool) and _field(name).annotation is not bool:
            raise InvalidInput(f"{source}: {key} = {value}: YAML reads words such as on and no like this; put them in quotes")
        found[name] = value
    return layer("file", found, lambda name: f"{source}: {_key(name)}")


def layer(called: str, values: Mapping[str, Any], spell: Callable[[str], str]) -> Layer:
    """Values of one origin by field; one field under two names is an error."""
    found: Layer = {}
    for name, value in values.items():
        field = ALIASES.get(name, name)
        if field in found:
            raise InvalidInput(f"{found[field].spelled} and {spell(name)} are one option: give one of them")
        found[field] = Setting(value, called, spell(name))
    return found


def merge(*layers: Layer) -> Layer:
    """Settings merged; later ones override earlier ones."""
    return {field: setting for one in layers for field, setting in one.items()}


def build(settings: Layer) -> tuple[EngineConfig, ServeConfig]:
    """InvalidInput names the setting as the user wrote it."""
    values = {field: setting.value for field, setting in settings.items()}
    model = values.pop("model", "embedded")
    try:
        engine = engine_config(model, {field: value for field, value in values.items() if field in ENGINE.fields})
        server = ServeConfig(**{field: value for field, value in values.items() if field in SERVER.fields})
        server.check_names(model, engine.model.adapters)
        return engine, server
    except InvalidInput as error:
        named = re.match(r"\w+\.(\w+)", str(error))
        if named is None:  # about several
            raise
        flat = {field: name for name, (_, field) in EngineConfig._homes().items()}
        raise InvalidInput(settings[flat.get(named[1], named[1])].spelled + str(error)[named.end() :]) from None


def engine_of(path: Path, given: Mapping[str, Any]) -> EngineConfig:
    """The engine that a file describes, with what the command line overrides. Options of the server are checked and not used."""
    named = {name: value for name, value in given.items() if value is not None}
    return build(merge(load(path, f"--{CONFIG}"), layer("command line", named, _flag)))[0]


def show(engine: EngineConfig, server: ServeConfig, settings: Layer) -> None:
    """Writes the model, its quantization, the address and what is no default to stderr, one field on each line."""
    typer.echo(f"redraft {__version__} serves with the defaults and", err=True)
    defaults, always = build({}), ("model", "quant", *(("host", "port") if server.uds is None else ()))
    for name in FIELDS:
        value = _value(engine, server, name)
        if name not in always and value == _value(*defaults, name):
            continue
        if name == "api_key":
            value = f"({len(value)} key{'' if len(value) == 1 else 's'})"
        elif name == "admin_key" and value is not None:
            value = "(a key)"
        elif name == "chat_template" and value is not None:
            value = settings[name].value  # the name of the file instead of its text
        text = ", ".join(value) if isinstance(value, tuple) else "" if value is None else str(value)
        text = text or "none" if text.isprintable() else f"({len(text)} characters)"
        typer.echo(f"  {_key(name):18} {text:24} {settings[name].layer if name in settings else 'default'}", err=True)


def _value(engine: EngineConfig, server: ServeConfig, name: str) -> Any:
    part, field = EngineConfig._homes().get(name, ("", name))
    holder: Any = server if name in SERVER.fields else getattr(engine, part) if part else engine
    return getattr(holder, field)


def _field(name: str) -> FieldInfo:
    return FIELDS[ALIASES.get(name, name)]


def _repeats(name: str) -> bool:
    return typing.get_origin(_field(name).annotation) is tuple


def _key(name: str) -> str:
    return name.replace("_", "-")


def _flag(name: str) -> str:
    return "MODEL" if name == "model" else f"--{_key(name)}"


def _variable(name: str) -> str:
    return PREFIX + name.upper()


VARIABLES = {_variable(name): name for name in (CONFIG, *NAMES)}
