"""Configuration of the server; that of its engine is EngineConfig."""

from __future__ import annotations

import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, Literal, Self

from pydantic import Field, ValidationInfo, field_validator, model_validator

from redraft import registry
from redraft.config import Settings
from redraft.errors import InvalidInput

WEEK = 7 * 24 * 3600.0
ORIGIN = re.compile(r"\*|[a-z][a-z0-9+.-]*://[^/\s]+")
MARK = re.compile(r"\{\{|\{%")  # of a template
SOCKET = 107  # bytes of a unix socket's path, on Linux


class ServeConfig(Settings):
    """Who may use the server, how much, and how long an answer may take. Methods, files and the template are checked."""

    host: str = Field("127.0.0.1", min_length=1, description="address to listen on; 0.0.0.0: all of IPv4")
    port: int = Field(8000, ge=0, le=65535, description="0: any free one")
    uds: Path | None = Field(None, description="listen on this unix socket instead of host and port")
    root_path: str = Field("", pattern=r"^(/[^/\s]+)*$", description="path under which a proxy shows the server, such as /llm")
    ssl_keyfile: Path | None = Field(None, description="private key (PEM); with the certificate the server speaks HTTPS")
    ssl_certfile: Path | None = Field(None, description="certificate chain (PEM)")
    api_key: tuple[str, ...] = Field(
        (),
        repr=False,
        exclude=True,
        description="a key that clients must send, repeated for more; none: no key is needed. The list of processes shows it to others:"
        " prefer the environment or a file",
    )
    lora_dir: Path | None = Field(None, description="folder whose subfolders, LoRA adapters, may be loaded at run time with the admin key")
    admin_key: str | None = Field(
        None,
        repr=False,
        exclude=True,
        description="the key that loads and unloads adapters of --lora-dir, and nothing else; prefer the environment or a file",
    )
    allow_origins: tuple[str, ...] = Field((), description="origin of web pages that may use the server (CORS), repeated for more; *: all")
    served_model_name: tuple[str, ...] = Field((), description="what clients call the model, repeated for more; none: the model's name")
    chat_template: str | None = Field(None, description="a Jinja file, or the template itself; None: the checkpoint's")
    tool_call_parser: str | None = Field(None, description="format of tool calls, or none; not given: chosen by the template")
    reasoning_parser: str | None = Field(None, description="format of reasoning, or none; not given: chosen by the template")
    response_role: str = Field("assistant", min_length=1, description="role of the replies of a chat")
    keep: str | None = Field(None, description="name:option=value of a method that evicts from the cache, if a request names none")
    codec: str | None = Field(None, description="name:option=value of a method that quantizes the cache, likewise")
    read: str | None = Field(None, description="name:option=value of a sparse attention method, likewise")
    depth: str | None = Field(None, description="name:option=value of a method that skips layers after the prompt, likewise")
    steer: str | None = Field(None, description="name:option=value of a method that changes hidden states between layers, likewise")
    replicas: int = Field(1, ge=1, le=1024, description="workers, processes that each load the model and share the requests")
    instances: str | None = Field(
        None, description="workers that each do a part of a request, such as prefill=1,decode=2: prompts here, the rest there"
    )
    ray: bool = Field(False, description="workers as actors of a Ray cluster, which is started if RAY_ADDRESS names none")
    ray_address: str | None = Field(None, description="HOST:PORT of the Ray cluster for the workers, with a node on this machine")
    router: str = Field("prefix-affinity", description="name:option=value of the method that chooses the worker of a request")
    max_queue: int = Field(256, ge=1, le=1_000_000, description="requests that may wait; further ones are refused (429)")
    request_timeout: float = Field(600.0, ge=0, le=WEEK, description="seconds from a request's arrival to its end; 0: no limit")
    idle_timeout: float = Field(60.0, gt=0, le=WEEK, description="seconds for which a client may neither read nor send")
    keep_alive: float = Field(10.0, gt=0, le=3600, description="seconds between comments in a stream without new text")
    step_timeout: float = Field(300.0, ge=0, le=WEEK, description="seconds that a step may take before /health fails; 0: no limit")
    shutdown_timeout: float = Field(30.0, ge=0, le=WEEK, description="seconds in which requests may end after SIGTERM")
    max_body: int = Field(4 << 20, ge=1024, le=1 << 30, description="bytes of a request's body")
    max_n: int = Field(16, ge=1, le=1024, description="texts of one request")
    max_logprobs: int = Field(20, ge=0, le=1024, description="likeliest tokens that a request may get at each position")
    max_stop: int = Field(16, ge=0, le=1024, description="stop strings of one request")
    stored_responses: int = Field(1024, ge=0, le=1_000_000, description="responses of /v1/responses kept in memory; 0: none")
    stored_bytes: int = Field(64 << 20, ge=0, le=1 << 40, description="bytes of all these; those unused for longest are dropped first")
    metrics_prefix: str = Field(
        "redraft:",
        pattern=r"^([a-zA-Z_:][a-zA-Z0-9_:]*)?$",
        description="prefix of the names of the metrics, for dashboards of other servers",
    )
    log_level: Literal["critical", "error", "warning", "info", "debug"] = Field("info", description="critical, error, warning, info, debug")
    access_log: bool = Field(True, description="a line for each request")

    @field_validator("api_key", "allow_origins", "served_model_name", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else value

    @field_validator("api_key", "allow_origins", "served_model_name")
    @classmethod
    def _listed(cls, value: tuple[str, ...], info: ValidationInfo) -> tuple[str, ...]:
        for text in value:
            if not text.strip():
                raise ValueError("an empty string is not allowed")
            if info.field_name == "api_key":
                _check_key(text)
            if info.field_name == "allow_origins" and not ORIGIN.fullmatch(text):
                raise ValueError(f"{text!r} is neither * nor scheme://host[:port]")
        return value

    @field_validator("admin_key")
    @classmethod
    def _key(cls, value: str | None) -> str | None:
        if value is not None:
            _check_key(value)
        return value

    @field_validator("lora_dir")
    @classmethod
    def _folder(cls, value: Path | None) -> Path | None:
        if value is None:
            return None
        path = _home(value)
        try:
            next(path.iterdir(), None)
        except OSError as error:
            raise ValueError(_reason(error)) from None
        return path

    @field_validator("keep", "codec", "read", "depth", "steer")
    @classmethod
    def _method(cls, value: str | None, info: ValidationInfo) -> str | None:
        if value is None or value == "none":
            return None
        registry.create(str(info.field_name), value)
        return value

    @field_validator("instances")
    @classmethod
    def _instances(cls, value: str | None) -> str | None:
        if value is not None and not re.fullmatch(r"prefill=[1-9]\d{0,2},decode=[1-9]\d{0,2}", value, re.ASCII):
            raise ValueError("prefill=N,decode=M is allowed, with numbers from 1 to 999")
        return value

    @field_validator("router")
    @classmethod
    def _router(cls, value: str) -> str:
        registry.create("route", value)
        return value

    @field_validator("tool_call_parser", "reasoning_parser")
    @classmethod
    def _parser(cls, value: str | None, info: ValidationInfo) -> str | None:
        known = [*(registry.TOOL_PARSERS if info.field_name == "tool_call_parser" else registry.REASONING_PARSERS), registry.NO_PARSER]
        if value is not None and value not in known:
            raise ValueError(f"{', '.join(known)} are allowed")
        return value

    @field_validator("ssl_keyfile", "ssl_certfile", "uds")
    @classmethod
    def _path(cls, value: Path | None, info: ValidationInfo) -> Path | None:
        if value is None:
            return None
        path = _home(value)
        if info.field_name != "uds":
            try:
                path.read_bytes()
            except OSError as error:
                raise ValueError(_reason(error)) from None
        elif not path.parent.is_dir():
            raise ValueError("the folder does not exist")
        elif len(os.fsencode(path)) > SOCKET:
            raise ValueError(f"a socket's path has at most {SOCKET} bytes")
        return path

    @field_validator("chat_template")
    @classmethod
    def _template(cls, value: str | None) -> str | None:
        """Its text, read from the file."""
        if value is None:
            return None
        text = value
        if not MARK.search(text):
            try:
                text = _home(value).read_text(encoding="utf-8")
            except (OSError, ValueError) as error:
                raise ValueError(f"neither a template nor a file that can be read: {_reason(error)}") from None
            if not MARK.search(text):
                raise ValueError("the file is not a template: it has neither {{ nor {%")
        from jinja2 import TemplateError, TemplateSyntaxError
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        try:
            ImmutableSandboxedEnvironment(extensions=["jinja2.ext.loopcontrols", _generation()]).from_string(text)
        except TemplateError as error:
            line = f", line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
            raise ValueError(f"the template does not parse{line}: {error.message}") from None
        return text

    @model_validator(mode="after")
    def _pair(self) -> Self:
        if (self.ssl_keyfile is None) != (self.ssl_certfile is None):
            raise ValueError("ssl_keyfile and ssl_certfile must be given together or not at all")
        if self.instances is not None and self.replicas > 1:
            raise ValueError("replicas and instances exclude each other: instances gives the number of both kinds")
        if self.instances is None and registry.create("route", self.router).open().any_stage:
            raise ValueError(f"router = {self.router!r} splits requests: it needs instances, such as prefill=1,decode=1")
        if self.admin_key is not None and self.admin_key in self.api_key:
            raise ValueError("admin_key is an api_key too: clients could load adapters")
        return self

    @property
    def stages(self) -> dict[str, tuple[int, ...]]:
        """The workers by name, each with the stages of a request that it runs: 0, or prompts 0 and the rest 1."""
        if self.instances is None:
            return {str(i): (0,) for i in range(self.replicas)}
        counts = [int(part.partition("=")[2]) for part in self.instances.split(",")]
        kinds = zip(("prefill", "decode"), counts, strict=True)
        return {f"{kind}-{i}": (stage,) for stage, (kind, count) in enumerate(kinds) for i in range(count)}

    @property
    def on_ray(self) -> bool:
        return self.ray or self.ray_address is not None

    @property
    def loads(self) -> bool:
        """Whether adapters can be loaded at run time."""
        return self.lora_dir is not None and self.admin_key is not None

    def names(self, model: str) -> tuple[str, ...]:
        """What clients call the model."""
        name = model.rstrip("/").rsplit("/", 1)[-1] if model.startswith(("/", ".", "~")) else model
        return self.served_model_name or (name,)

    def check_names(self, model: str, adapters: Iterable[str]) -> None:
        """InvalidInput if an adapter has a name of the model."""
        if name := next((name for name in adapters if name in self.names(model)), None):
            raise InvalidInput(f"ModelConfig.lora = {name!r}: is a name of the model too; choose another, or another --served-model-name")


def _check_key(text: str) -> None:
    if not text.strip():
        raise ValueError("an empty string is not allowed")
    if not re.fullmatch(r"[!-~]+", text):
        raise ValueError("a key has visible ASCII characters only, without spaces")


def _home(path: str | Path) -> Path:
    return Path(os.path.expanduser(path))


def _reason(error: OSError | ValueError) -> str:
    return (error.strerror or str(error)) if isinstance(error, OSError) else "it is not UTF-8"


def _generation() -> Any:
    """{% generation %}, by which templates mark the text of the model."""
    from jinja2.ext import Extension
    from jinja2.nodes import Node
    from jinja2.parser import Parser

    class Generation(Extension):
        tags = {"generation"}  # noqa: RUF012 - as jinja2 types it

        def parse(self, parser: Parser) -> list[Node]:
            next(parser.stream)
            return parser.parse_statements(("name:endgeneration",), drop_needle=True)

    return Generation
