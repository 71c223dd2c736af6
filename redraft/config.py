"""Parameters of a request and of an engine: frozen, checked, and built the same way by kwargs, YAML and the CLI."""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, ValidationError, WrapValidator, field_validator, model_validator
from pydantic.fields import FieldInfo

from redraft.errors import InvalidInput, did_you_mean, shown

ADAPTER_NAME = re.compile(r"(?!\.)[\w.-]{1,64}")


class Settings(BaseModel):
    """A frozen pydantic model whose errors are one line: field, value, what is allowed. Its checks are compiled when it is first made,
    so that --help, which reads the fields only, is fast."""

    model_config = ConfigDict(frozen=True, extra="forbid", protected_namespaces=(), arbitrary_types_allowed=False, defer_build=True)

    def __init__(self, **values: Any) -> None:
        try:
            super().__init__(**values)
        except ValidationError as error:
            raise InvalidInput(_one_line(type(self), error)) from None

    def but(self, **values: Any) -> Self:
        """A copy with some fields changed, checked again."""
        return type(self)(**{**{name: getattr(self, name) for name in self.model_fields_set}, **values})


def is_utf8(text: str) -> bool:
    """Whether UTF-8 can encode a text. It cannot encode half of a surrogate pair, which a Python string or JSON may hold."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _one_line(cls: type[BaseModel], error: ValidationError) -> str:
    first = error.errors()[0]
    name = ".".join(map(str, first["loc"])) or cls.__name__
    if first["type"] == "extra_forbidden":
        return f"unknown option {shown(name)} of {cls.__name__}: {did_you_mean(name, cls.model_fields)}"
    field = cls.model_fields.get(name)
    message = (
        _allowed(field) if field and first["type"].startswith(("greater_than", "less_than")) else first["msg"].removeprefix("Value error, ")
    )
    message = message[0].lower() + message[1:]
    if not first["loc"]:
        return f"{cls.__name__}: {message}"
    given = shown(first["input"]) if cls.model_fields[str(first["loc"][0])].repr else "(hidden)"
    return f"{cls.__name__}.{name} = {given}: {message}"


def _allowed(field: FieldInfo) -> str:
    """The whole range of a number, not only the bound that was exceeded."""
    words = {"ge": "at least", "gt": "more than", "le": "at most", "lt": "less than"}
    found = (f"{word} {getattr(rule, name):g}" for rule in field.metadata for name, word in words.items() if hasattr(rule, name))
    return f"must be {' and '.join(found)}"


class Grammar(NamedTuple):
    """What a text must be. kind: json (a schema), json_object, regex, choice or grammar (Lark or GBNF); text: of that form, of json and
    choice as JSON."""

    kind: str
    text: str


FORMS = ("json", "json_object", "regex", "choice", "grammar")  # of structured outputs


def _grammar(value: Any) -> Any:
    """From {"json": ...}, {"regex": ...} and so on: exactly one of them."""
    if value is None or isinstance(value, Grammar):
        return value
    if not isinstance(value, dict):
        raise ValueError(f"an object with one of {', '.join(FORMS)} is needed")
    if unknown := [name for name in value if name not in FORMS]:
        raise ValueError(f"unknown field {shown(unknown[0])}: {', '.join(FORMS)} are allowed")
    given = {name: one for name, one in value.items() if one is not None and one is not False}
    if len(given) != 1:
        raise ValueError(f"exactly one of {', '.join(FORMS)} is needed, not {', '.join(given) or 'none'}")
    ((kind, text),) = given.items()
    return Grammar(kind, _CHECKS[kind](text))


OPEN = {"additionalProperties", "patternProperties", "unevaluatedProperties", "$ref", "allOf", "anyOf", "oneOf"}


def closed(schema: Any) -> Any:
    """A JSON schema whose objects have no properties but those that are named. Objects that say themselves what else they may have, or
    that several schemas describe, stay as they are."""
    if isinstance(schema, list):
        return [closed(one) for one in schema]
    if not isinstance(schema, dict):
        return schema
    found = dict(schema)
    for name in ("properties", "$defs", "definitions"):
        if isinstance(found.get(name), dict):
            found[name] = {key: closed(one) for key, one in found[name].items()}
    for name in ("items", "prefixItems", "anyOf", "oneOf"):
        if name in found:
            found[name] = closed(found[name])
    return {**found, "additionalProperties": False} if isinstance(found.get("properties"), dict) and not OPEN & found.keys() else found


def _schema(value: Any) -> str:
    """A JSON schema as text: given as text, as an object or as a model of pydantic, whose objects are closed."""
    if isinstance(value, type) and issubclass(value, BaseModel):
        value = closed(value.model_json_schema())
    try:
        found = json.loads(value) if isinstance(value, str) else value
        if not isinstance(found, dict | bool):
            raise ValueError
        return json.dumps(found)
    except json.JSONDecodeError as error:
        raise ValueError(f"json: a JSON schema is needed, as an object or as its text, which is no JSON: {error}") from None
    except (ValueError, TypeError, RecursionError):
        raise ValueError("json: a JSON schema is needed, as an object or as its text") from None


def _text(value: Any) -> str:
    if not isinstance(value, str) or not value or not is_utf8(value):
        raise ValueError("regex, grammar: a text is needed")
    return value


def _choices(value: Any) -> str:
    if not isinstance(value, list | tuple) or not value or not all(isinstance(one, str) and one and is_utf8(one) for one in value):
        raise ValueError("choice: a list of texts is needed, none of them empty")
    return json.dumps(list(value))


def _true(value: Any) -> str:
    if value is not True:
        raise ValueError("json_object: true is needed")
    return ""


_CHECKS = {"json": _schema, "json_object": _true, "regex": _text, "choice": _choices, "grammar": _text}


def _control(value: Any, check: Any) -> Any:
    """Names in a text, an object with `open` and `card` (sample/controls/control.py), or several of both."""
    if isinstance(value, list | tuple):
        return tuple(found for one in value if (found := _control(one, check)) is not None) or None
    if value is None or isinstance(value, str):
        return None if value in (None, "", "none") else value
    if isinstance(value, type) or not (hasattr(value, "open") and hasattr(value, "card")):
        raise ValueError("names of controls or objects that are controls are needed")
    try:
        hash(value)
    except TypeError:
        raise ValueError("a control must be hashable, such as a frozen dataclass") from None
    return value


class SamplingParams(Settings):
    """How one request is sampled and when it ends. The order of the processors is fixed: bias, bad words, min tokens, penalties, DRY,
    temperature, controls of logits, grammar, top-n-sigma, top-k, top-p, min-p, typical-p, XTC, dynamic temperature, mirostat, other
    controls."""

    n: int = Field(1, ge=1, le=1024, description="how many texts for the prompt")
    temperature: float = Field(1.0, ge=0, allow_inf_nan=False, description="0 is greedy")
    top_k: int = Field(0, ge=-1, description="keep the k likeliest tokens; 0 or -1: all")
    top_p: float = Field(1.0, ge=0, le=1, description="keep the likeliest tokens that hold this probability; 0: the likeliest alone")
    min_p: float = Field(0.0, ge=0, le=1, description="drop tokens below this fraction of the likeliest one's probability")
    typical_p: float = Field(1.0, gt=0, le=1, description="keep the tokens nearest to the entropy that hold this probability")
    top_n_sigma: float = Field(
        0.0, ge=-1, le=1000, description="keep logits at most n standard deviations below the largest; 0 or less: all"
    )
    xtc_probability: float = Field(0.0, ge=0, le=1, description="chance that XTC drops the likeliest tokens before a token")
    xtc_threshold: float = Field(0.1, ge=0, le=1, description="XTC drops all but the least likely of the tokens this likely")
    dynatemp_range: float = Field(
        0.0, ge=0, le=100, description="temperature varies with the entropy by as much as this, after the filters; 0: it is fixed"
    )
    dynatemp_exponent: float = Field(1.0, ge=0, le=100, description="of the entropy's share of its largest value")
    mirostat: Literal[0, 2] = Field(0, description="2: mirostat 2.0 holds the surprise of the text's tokens near mirostat_tau")
    mirostat_tau: float = Field(5.0, ge=0, le=100, description="the surprise in bits that mirostat aims at")
    mirostat_eta: float = Field(0.1, ge=0, le=100, description="how fast mirostat reacts")
    repetition_penalty: float = Field(
        1.0, ge=0.01, le=100, description="divides (multiplies) positive (negative) logits of tokens seen in prompt and output"
    )
    presence_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted once from tokens seen in the output")
    frequency_penalty: float = Field(0.0, ge=-2, le=2, description="subtracted per occurrence in the output")
    dry_multiplier: float = Field(
        0.0, ge=0, le=1000, description="DRY subtracts this, times a power, from a token that would go on with a repetition; 0: off"
    )
    dry_base: float = Field(1.75, ge=1, le=100, description="base of that power, for each token that the repetition has beyond the allowed")
    dry_allowed_length: int = Field(2, ge=1, le=1 << 20, description="shortest repetition that DRY acts on, in tokens")
    dry_penalty_last_n: int = Field(-1, ge=-1, le=1 << 30, description="last tokens in which DRY looks; -1: the whole text; 0: off")
    dry_sequence_breakers: tuple[str, ...] = Field(("\n", ":", '"', "*"), description="texts that no repetition goes across")
    logit_bias: dict[int, float] = Field(default_factory=dict, description="added to the logits of token ids")
    bad_words: tuple[str, ...] = Field((), description="texts that must not be generated")
    min_tokens: int = Field(0, ge=0, description="new tokens before the text may end or stop")
    max_tokens: int | None = Field(None, ge=1, description="new tokens at most; None: the rest of the context")
    ignore_eos: bool = Field(False, description="the end-of-text token does not end the text")
    stop: tuple[str, ...] = Field((), description="texts that end the output")
    stop_token_ids: tuple[int, ...] = Field((), description="token ids that end the output")
    include_stop_str_in_output: bool = Field(False, description="the text keeps the stop string that ended it")
    seed: int | None = Field(None, ge=0, lt=1 << 64, description="None: chosen at admission and reported")
    logprobs: int | None = Field(
        None, ge=0, le=1024, description="log-probabilities of each token and of the k likeliest, of the raw logits"
    )
    prompt_logprobs: int | None = Field(None, ge=0, le=1024)
    prediction: str | tuple[int, ...] | None = Field(
        None, description="a text that the output may resemble, such as a text to edit: a hint for drafters that copy, not a constraint"
    )
    structured_outputs: Annotated[Grammar | None, BeforeValidator(_grammar)] = Field(
        None, description="what the text must be: one of json (a schema), json_object, regex, choice, grammar (Lark or GBNF), as a dict"
    )
    keep: str | None = Field(None, description="name:option=value of a method that evicts tokens from the cache")
    codec: str | None = Field(None, description="name:option=value of a method that quantizes the cache")
    read: str | None = Field(None, description="name:option=value of a sparse attention method")
    depth: str | None = Field(None, description="name:option=value of a method that skips layers after the prompt")
    steer: str | None = Field(None, description="name:option=value of a method that changes hidden states between layers")
    control: Annotated[str | None, WrapValidator(_control)] = Field(
        None, description="name:option=value of what decides beside the model how the text goes on, several with + between them"
    )
    draft: str | None = Field(None, description="name:option=value of this request's drafter; None: the engine's")
    verify: str | None = Field(None, description="name:option=value of this request's verifier; None: the engine's")
    draft_rows: int | None = Field(None, ge=0, description="maximum of drafted nodes in a step; None: the engine's")
    lora: str | None = Field(None, description="name of a loaded adapter; None: the model itself")
    provenance: bool = Field(False, description="return the drafter that proposed each token and the tree of each step")
    skip_special_tokens: bool = Field(True, description="special tokens such as <s> are left out of the text")

    @field_validator("keep", "codec", "read", "depth", "steer")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @field_validator("stop", "bad_words", "dry_sequence_breakers", mode="before")
    @classmethod
    def _one_or_many(cls, value: Any) -> Any:
        return (value,) if isinstance(value, str) else () if value is None else value

    @field_validator("stop", "bad_words", "dry_sequence_breakers")
    @classmethod
    def _not_empty(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        if any(not text for text in value):
            raise ValueError("an empty string is not allowed")
        return value

    @field_validator("stop", "bad_words", "dry_sequence_breakers", "prediction")
    @classmethod
    def _utf8(cls, value: Any) -> Any:
        if not all(is_utf8(text) for text in ([value] if isinstance(value, str) else value or ()) if isinstance(text, str)):
            raise ValueError("half of a surrogate pair is not allowed, UTF-8 cannot encode it")
        return value

    @model_validator(mode="after")
    def _min_below_max(self) -> Self:
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise ValueError(f"min_tokens = {self.min_tokens} is more than max_tokens = {self.max_tokens}")
        return self

    @property
    def greedy(self) -> bool:
        return self.temperature == 0


_UNITS = {"": 1, "b": 1} | {
    f"{letter}{unit}": base ** (i + 1) for unit, base in (("b", 1000), ("ib", 1024)) for i, letter in enumerate("kmgt")
}


def _bytes(value: Any) -> Any:
    """A size such as 2GB (10^9 bytes each), 1.5GiB (2^30) or a whole number of bytes, as an integer."""
    if value is None or (isinstance(value, int | float) and not isinstance(value, bool)):
        return value
    found = re.fullmatch(r"(\d{1,18}(?:\.\d{1,9})?) ?([a-z]*)", value.strip().lower(), re.ASCII) if isinstance(value, str) else None
    unit = _UNITS.get(found[2]) if found else None
    if found is None or unit is None or (unit == 1 and "." in found[1]):
        raise ValueError("a whole number of bytes, or a size in KB, MB, GB, TB, KiB, MiB, GiB or TiB is needed, such as 2GB")
    return int(found[1]) * unit if "." not in found[1] else int(float(found[1]) * unit)


Bytes = Annotated[int, BeforeValidator(_bytes)]  # int after validation; text may have a unit


class ModelConfig(Settings):
    """Which checkpoint, and how its weights are stored and computed."""

    model: str = Field("embedded", description="a folder, a GGUF file, a hub id (repo@revision), or 'embedded'")
    dtype: Literal["auto", "float16", "bfloat16", "float32", "float64"] = "auto"
    device: str = Field("auto", description="auto, cpu, cuda or cuda:N")
    quant: str | None = Field(
        "auto",
        description="name:option=value of a method that quantizes linear weights; auto: none, or as a quantized file stores them"
        " where native kernels multiply that form",
    )
    backend: str = Field(
        "auto",
        description="native (compiled, CPU), torch, numpy (CPU, slow) or reference (float64, the definition); auto: native if supported,"
        " else torch",
    )
    lora: tuple[str, ...] = Field((), description="NAME=FOLDER of a LoRA adapter (PEFT) that requests may choose, repeated for more")
    max_model_len: int | None = Field(None, ge=2, description="tokens of prompt and output; None: the checkpoint's context")
    generation_config: Literal["auto", "none"] = Field(
        "auto", description="auto: the checkpoint's own defaults of sampling; none: only its eos_token_id is used"
    )
    threads: int | None = Field(
        None, ge=1, le=1024, description="CPU threads of all engines of the process; None: as many as the process may use"
    )
    weight_cache: Bytes | None = Field(
        None,
        ge=0,
        description="most bytes of packed weights that are kept on disk, so that a model starts faster the next time; 0: none; None: "
        "REDRAFT_WEIGHT_CACHE, else 8GiB",
    )

    @field_validator("quant")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @field_validator("lora", mode="before")
    @classmethod
    def _pairs(cls, value: Any) -> Any:
        if isinstance(value, dict):
            return tuple(f"{name}={folder}" for name, folder in value.items())
        return (value,) if isinstance(value, str) else value

    @field_validator("lora")
    @classmethod
    def _named(cls, value: tuple[str, ...]) -> tuple[str, ...]:
        names = []
        for text in value:
            name, equals, folder = text.partition("=")
            if not (ADAPTER_NAME.fullmatch(name) and equals and folder):
                raise ValueError(f"{shown(text)} is not NAME=FOLDER, with a name of at most 64 letters, digits, '.', '-' and '_'")
            if name in names:
                raise ValueError(f"the name {name} is given twice")
            names.append(name)
        return value

    @property
    def adapters(self) -> dict[str, str]:
        """The folder of each adapter, by name."""
        return {name: folder for name, _, folder in (text.partition("=") for text in self.lora)}

    def only_adapter(self) -> str | None:
        """The name of the only adapter, which all requests of a measurement have; None without one. InvalidInput if there are several."""
        if len(self.lora) > 1:
            given = shown(list(self.lora))
            raise InvalidInput(f"ModelConfig.lora = {given}: one adapter is measured at a time, {len(self.lora)} are given")
        return next(iter(self.adapters), None)


AUTO = "auto"
PREFIX_CACHE_SIZE = 4_000_000_000  # bytes


class CacheConfig(Settings):
    """The pool of pages that all requests share, and the folder of those that outlive the process."""

    memory: Bytes | None = Field(
        None, ge=1, description="size of the pool, such as 2GB or 512MiB; None: `fraction` of what is free after the weights"
    )
    fraction: float = Field(0.3, gt=0, le=0.95, description="of what is free after the weights")
    prefix_sharing: bool = Field(True, description="pages of equal prefixes are computed once")
    prefix_cache_dir: str | None = Field(
        None, min_length=1, description="folder, for this user only, where prefixes are kept for later processes; None: nowhere"
    )
    prefix_cache_size: Bytes | None = Field(
        None, ge=1, description="most bytes of that folder; what was used longest ago leaves; None: 4GB"
    )
    policy: str | None = Field(
        None,
        description="keep=NAME, codec=NAME, read=NAME or several with + between them, for requests that choose none; auto:quality=0.02:"
        " the cheapest that loses at most 2 % of right answers and of perplexity, as `redraft bench cache` measured and kept",
    )

    @field_validator("policy")
    @classmethod
    def _none(cls, value: str | None) -> str | None:
        return None if value == "none" else value

    @field_validator("prefix_cache_dir")
    @classmethod
    def _absolute(cls, value: str | None) -> str | None:
        """Workers may have another working folder."""
        return value if value is None else os.path.abspath(os.path.expanduser(value))

    @model_validator(mode="after")
    def _kept(self) -> Self:
        if self.prefix_cache_dir is not None and not self.prefix_sharing:
            raise ValueError("prefix_cache_dir keeps shared prefixes: it needs prefix_sharing")
        if self.prefix_cache_size is not None and self.prefix_cache_dir is None:
            raise ValueError("prefix_cache_size is that of a folder: it needs prefix_cache_dir")
        return self

    @property
    def kept(self) -> Path | None:
        """The folder of prefixes that outlive the process."""
        return None if self.prefix_cache_dir is None else Path(self.prefix_cache_dir)


class SchedulerConfig(Settings):
    """Which sequences run and with how many rows: a registered scheduler and its budgets."""

    scheduler: str = Field("sarathi", description="name:option=value of a scheduler")
    token_budget: int = Field(512, ge=1, description="maximum of rows in a step, prompts and drafts together")
    max_seqs: int = Field(64, ge=1, description="maximum of sequences that run at once")
    draft_rows: int = Field(16, ge=0, description="maximum of drafted nodes of a sequence in a step; draft=auto: the drafter's own number")
    draft_total: int | None = Field(
        None, ge=0, description="maximum of drafted nodes in a step, shared evenly; None: 32 (CPU) or 128 (CUDA)"
    )
    draft_memory: Bytes | None = Field(
        None, ge=0, description="most bytes of the drafts of a step: logits, masks, pages of the cache; None: no limit of their own"
    )


class EngineConfig(Settings):
    """All of an engine's configuration. `EngineConfig.of(model=..., draft=..., token_budget=...)` takes flat names."""

    model: ModelConfig = Field(default_factory=ModelConfig)
    cache: CacheConfig = Field(default_factory=CacheConfig)
    schedule: SchedulerConfig = Field(default_factory=SchedulerConfig)
    draft: str = Field("none", description="name:option=value of a drafter; auto: one that speeds up this machine")
    draft_model: str | None = Field(
        None, description="the checkpoint of drafters with a draft model; with the embedded model the embedded draft model"
    )
    verify: str = Field("coupled", description="name:option=value of a verifier")

    @classmethod
    def of(cls, **flat: Any) -> EngineConfig:
        """From flat names: every field of ModelConfig, CacheConfig (`cache_memory`, `cache_fraction`, `cache_policy`, the others by their
        own names) and SchedulerConfig."""
        parts: dict[str, dict[str, Any]] = {"model": {}, "cache": {}, "schedule": {}, "": {}}
        homes = cls._homes()
        for name, value in flat.items():
            if name not in homes:
                raise InvalidInput(f"unknown option {shown(name)}: {did_you_mean(name, homes)}")
            part, field = homes[name]
            parts[part][field] = str(value) if isinstance(value, Path) else value
        return cls(
            model=ModelConfig(**parts["model"]),
            cache=CacheConfig(**parts["cache"]),
            schedule=SchedulerConfig(**parts["schedule"]),
            **parts[""],
        )

    @staticmethod
    def _homes() -> dict[str, tuple[str, str]]:
        homes = {name: ("model", name) for name in ModelConfig.model_fields}
        homes |= {name: ("schedule", name) for name in SchedulerConfig.model_fields}
        homes |= {"cache_memory": ("cache", "memory"), "cache_fraction": ("cache", "fraction"), "cache_policy": ("cache", "policy")}
        homes |= {name: ("cache", name) for name in ("prefix_sharing", "prefix_cache_dir", "prefix_cache_size")}
        homes |= {name: ("", name) for name in ("draft", "draft_model", "verify")}
        return homes
