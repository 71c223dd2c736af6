"""The vocabulary of a checkpoint: ids and spellings, special tokens, and chat templates.

transformers takes a second to import, and is not needed where the tokenizer in tokenizer.json is what it would make of the folder. That is
known for two ways of writing: folders that name no class of their own, and classes that build the pipeline that the file has. All other
folders are read through transformers.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from redraft.models.config import read_json

NAMES = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")  # in the order of templates
PLAIN = ("TokenizersBackend", "PreTrainedTokenizer")  # the file as it is

_BYTE_LEVEL = {"type": "ByteLevel", "trim_offsets": True}
_QWEN2 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)  # fmt: skip
_PIECES = {"unk_token": None, "continuing_subword_prefix": "", "end_of_word_suffix": "", "fuse_unk": False, "byte_fallback": False}
_SPACE = "\u2581"

# class -> what it builds whatever the file says: normalizer, pre_tokenizer, decoder, and fields of the model
BUILT: dict[str, tuple[Any, Any, Any, dict[str, Any]]] = {
    "GPT2Tokenizer": (
        None,
        {**_BYTE_LEVEL, "add_prefix_space": False, "use_regex": True},
        {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        _PIECES,
    ),
    "Qwen2Tokenizer": (
        {"type": "NFC"},
        {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": _QWEN2}, "behavior": "Isolated", "invert": False},
                {**_BYTE_LEVEL, "add_prefix_space": False, "use_regex": False},
            ],
        },
        {**_BYTE_LEVEL, "add_prefix_space": True, "use_regex": True},
        _PIECES,
    ),
    "GemmaTokenizer": (
        {"type": "Replace", "pattern": {"String": " "}, "content": _SPACE},
        {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False},
        {
            "type": "Sequence",
            "decoders": [{"type": "Replace", "pattern": {"String": _SPACE}, "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"}],
        },
        {"unk_token": "<unk>", "continuing_subword_prefix": None, "end_of_word_suffix": None, "fuse_unk": True, "byte_fallback": True},
    ),
}  # fmt: skip
OWN = {"qwen2": "Qwen2Tokenizer"}  # model types with this class whatever the folder names
MISTRAL = ("mistral", "mixtral", "ministral", "ministral3")  # transformers may repair their pipeline or read another file

# fields of tokenizer_config.json that change no id and no text here
IGNORED = {
    "model_max_length", "clean_up_tokenization_spaces", "backend", "is_local", "local_files_only", "errors", "padding_side",
    "truncation_side", "legacy", "use_default_system_prompt", "spaces_between_special_tokens", "name_or_path", "processor_class",
    "tokenizer_file", "model_input_names", "tokenizer_class", "chat_template", "added_tokens_decoder", "_commit_hash", "use_fast",
    "tokenize_chinese_chars", "max_length", "stride", "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id",
    "add_bos_token", "add_eos_token",  # transformers 5 goes by the file
}  # fmt: skip
NEUTRAL: dict[str, Any] = {"add_prefix_space": False, "split_special_tokens": False, "sp_model_kwargs": {}, "extra_special_tokens": {}}
EXTRA = ("additional_special_tokens", "extra_special_tokens")


@dataclass(frozen=True)
class Vocabulary:
    """fast: a tokenizer of the library tokenizers; named: bos_token, eos_token, ... and their spellings, variables of chat templates;
    extra: further special tokens; templates: chat templates, of which "default" is used where none is named; marks: ids for filling in the
    middle, as the file names them: prefix, suffix, middle, repository, file, pad."""

    fast: Any
    named: Mapping[str, str] = field(default_factory=dict)
    extra: tuple[str, ...] = ()
    templates: Mapping[str, str] = field(default_factory=dict)
    marks: Mapping[str, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        self.fast.no_truncation()
        self.fast.no_padding()

    def __len__(self) -> int:
        return int(self.fast.get_vocab_size())

    def encode(self, text: str, special: bool) -> list[int]:
        """UnicodeEncodeError or TypeError for half of a surrogate pair."""
        return list(self.fast.encode(text, add_special_tokens=special).ids)

    def decode(self, ids: list[int], skip: bool) -> str:
        return str(self.fast.decode(ids, skip_special_tokens=skip))

    def spelling(self, token: int) -> str | None:
        """As in the vocabulary; None for an id that it lacks."""
        found: str | None = self.fast.id_to_token(token)
        return found

    def id(self, name: str) -> int | None:
        """Of a named token, such as bos_token."""
        found: int | None = self.fast.token_to_id(self.named[name]) if name in self.named else None
        return found

    def ids(self) -> dict[str, int]:
        """Spelling -> id."""
        return dict(self.fast.get_vocab())

    @cached_property
    def special_ids(self) -> list[int]:
        """Of the named and further special tokens."""
        found = (self.fast.token_to_id(token) for token in (*self.named.values(), *self.extra))
        return list(dict.fromkeys(token for token in found if token is not None))

    @cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        """Tokens that are spelled in plain text, and whether they are special."""
        return {id: (token.content, token.special) for id, token in self.fast.get_added_tokens_decoder().items()}

    @cached_property
    def decoder(self) -> str:
        """The steps of decoding, as JSON."""
        return "" if self.fast.decoder is None else self.fast.decoder.__getstate__().decode()


class Slow(Vocabulary):
    """A tokenizer of transformers that is written in Python."""

    def __post_init__(self) -> None:
        pass

    def __len__(self) -> int:
        return len(self.fast)

    def encode(self, text: str, special: bool) -> list[int]:
        return list(self.fast(text, add_special_tokens=special)["input_ids"])

    def decode(self, ids: list[int], skip: bool) -> str:
        return str(self.fast.decode(ids, skip_special_tokens=skip))

    def spelling(self, token: int) -> str | None:
        found: str | None = self.fast.convert_ids_to_tokens(token)
        return found

    def id(self, name: str) -> int | None:
        found: int | None = getattr(self.fast, f"{name}_id")
        return found

    @cached_property
    def special_ids(self) -> list[int]:
        return list(self.fast.all_special_ids)

    @cached_property
    def added(self) -> dict[int, tuple[str, bool]]:
        return {id: (token.content, token.special) for id, token in self.fast.added_tokens_decoder.items()}

    decoder = ""


def read(folder: Path) -> Vocabulary:
    """The vocabulary in a folder. Raises anything for what cannot be read."""
    return known(folder) or _through_transformers(folder)


def known(folder: Path) -> Vocabulary | None:
    """What transformers would read, without it; None if that is not sure."""
    file, own, config = folder / "tokenizer.json", folder / "tokenizer_config.json", folder / "config.json"
    if not file.exists() or not own.exists() or (folder / "additional_chat_templates").exists() or (folder / "added_tokens.json").exists():
        return None
    raw, kind = read_json(own), str(read_json(config).get("model_type", "")) if config.exists() else ""
    name = OWN.get(kind, str(raw.get("tokenizer_class") or "").removesuffix("Fast"))
    if (name not in PLAIN and name not in BUILT) or kind in MISTRAL:
        return None
    named = {key: _spelled(raw[key]) for key in NAMES if raw.get(key) is not None}
    extra = tuple(_spelled(token) for key in EXTRA if isinstance(raw.get(key), list) for token in raw[key])
    if any(isinstance(raw[key], dict) and raw[key].get("__type") != "AddedToken" for key in named):
        return None
    others = {key: value for key, value in raw.items() if key not in IGNORED and key not in named and value is not None}
    for key, value in others.items():
        if not (key in EXTRA and isinstance(value, list)) and not (key in NEUTRAL and value == NEUTRAL[key]):
            return None
    legacy = folder / "special_tokens_map.json"
    if legacy.exists() and any(key in NAMES and _spelled(value) != named.get(key) for key, value in read_json(legacy).items()):
        return None
    from tokenizers import Tokenizer

    fast = Tokenizer.from_file(str(file))
    if name in BUILT and (not {"bos_token", "eos_token", "unk_token", "pad_token"} <= {*raw} or not _builds(fast, *BUILT[name])):
        return None  # the classes have defaults for these tokens
    held = fast.get_added_tokens_decoder()
    if not {*named.values(), *extra} <= {token.content for token in held.values()}:
        return None
    for id, given in (raw.get("added_tokens_decoder") or {}).items():
        token = held.get(int(id))
        if token is None or any(getattr(token, part) != value for part, value in given.items() if part != "__type"):
            return None
    found = folder / "chat_template.jinja"
    return Vocabulary(fast, named, extra, _templates(found.read_text(encoding="utf-8") if found.exists() else raw.get("chat_template")))


def _spelled(token: Any) -> str:
    return str(token["content"]) if isinstance(token, dict) else str(token)


def _templates(given: Any) -> dict[str, str]:
    """From a text, several with names, or None."""
    if isinstance(given, list):
        return {one["name"]: one["template"] for one in given}
    return dict(given) if isinstance(given, Mapping) else {} if given is None else {"default": given}


def _builds(fast: Any, normalizer: Any, pre_tokenizer: Any, decoder: Any, model: dict[str, Any]) -> bool:
    """Whether a tokenizer has these parts."""

    def state(part: Any) -> Any:
        return None if part is None else json.loads(part.__getstate__())

    parts = [state(fast.normalizer), state(fast.pre_tokenizer), state(fast.decoder)]
    same = type(fast.model).__name__ == "BPE" and all(getattr(fast.model, name) == value for name, value in model.items())
    return same and parts == [normalizer, pre_tokenizer, decoder] and fast.model.dropout is None and not fast.model.ignore_merges


def _through_transformers(folder: Path) -> Vocabulary:
    from transformers import AutoTokenizer, PretrainedConfig
    from transformers.utils import logging

    logging.set_verbosity_error()
    config, own, named = folder / "config.json", folder / "tokenizer_config.json", None
    if config.exists() and own.exists() and read_json(own).get("tokenizer_class"):
        # a config with the name of the model's type alone, because the configuration classes load PyTorch's compiler, which takes seconds
        raw = read_json(config)
        kind = type("Named", (PretrainedConfig,), {"model_type": str(raw.get("model_type", ""))})
        named = kind(name_or_path=str(folder), **{name: raw[name] for name in ("tokenizer_class", "model_name") if name in raw})
    made: Any = AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True, config=named)
    fast = getattr(made, "backend_tokenizer", None)
    extra = tuple(map(str, getattr(made, "_extra_special_tokens", ())))
    rest = dict(made.special_tokens_map), extra, _templates(made.chat_template)
    return Slow(made, *rest) if fast is None else Vocabulary(fast, *rest)
