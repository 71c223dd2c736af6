"""The tokenizer in a GGUF file's metadata.

transformers can read a GGUF tokenizer itself. That is not used: it takes GPT-2's words for pre-tokenizers that it does not know, among
them SmolLM2's, so texts with numbers may get other ids than in llama.cpp, and versions of it differ.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from redraft.errors import CheckpointError, Unsupported, shown
from redraft.models.gguf.file import Contents
from redraft.models.vocabulary import Vocabulary

NORMAL, UNKNOWN, CONTROL, USER_DEFINED = 1, 2, 3, 4  # tokenizer.ggml.token_type
_SPACE = "\u2581"

# How text is cut into words before bytes are merged. llama.cpp names the cuts after models; models may share them.
_LETTERS = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+"
_REST = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_TEKKEN = (
    rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*"
    r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = ("llama-bpe", "llama3", "llama-v3", "falcon3", "pixtral", "midm-2.0")
CUTS: dict[str, tuple[str, ...]] = {
    **dict.fromkeys(("gpt-2", "phi-2", "mpt", "olmo", "a.x-4.0", "mellum"), (_GPT2,)),
    **dict.fromkeys((*_LLAMA3, "smaug-bpe"), (rf"{_LETTERS}|\p{{N}}{{1,3}}|{_REST}",)),
    **dict.fromkeys(("qwen2", "deepseek-r1-qwen", "stablelm2", "megrez", "hunyuan", "kormo"), (rf"{_LETTERS}|\p{{N}}|{_REST}",)),
    **dict.fromkeys(("smollm", "starcoder", "refact", "command-r", "codeshell", "minerva-7b"), (r"\p{N}", _GPT2)),
    "tekken": (_TEKKEN,),
}
_WHOLE_WORDS = (*_LLAMA3, "tekken")  # a word that is a token is not merged from bytes; and a text begins with bos
_MARKS = {  # for filling in the middle -> names in the file, the older ones last
    "prefix": ("fim_pre", "prefix"), "suffix": ("fim_suf", "suffix"), "middle": ("fim_mid", "middle"),
    "repository": ("fim_rep",), "file": ("fim_sep",), "pad": ("fim_pad",),
}  # fmt: skip
_COMPOSED = ("qwen2",)  # the models' own tokenizers compose letters and accents first (NFC)

# control tokens that end a text, as in llama.cpp; files name only one of them
_ENDS = {
    "<|eot_id|>", "<|im_end|>", "<|end|>", "<end_of_turn>", "<|endoftext|>", "<|eom_id|>", "<EOT>", "</s>", "<|end_of_text|>",
    "<\uff5cend\u2581of\u2581sentence\uff5c>",
}  # fmt: skip


def ends(found: Contents) -> Iterator[int]:
    """The ids of the tokens that end a text: those that the file names, and control tokens that are spelled as one."""
    ids = {found.fields.get(f"tokenizer.ggml.{name}_token_id") for name in ("eos", "eot", "eom")}
    tokens, kinds = found.fields.get("tokenizer.ggml.tokens"), found.fields.get("tokenizer.ggml.token_type")
    if isinstance(tokens, list) and kinds is not None and len(kinds) == len(tokens):
        ids |= {id for id, (token, kind) in enumerate(zip(tokens, kinds, strict=True)) if kind == CONTROL and token in _ENDS}
    yield from sorted(id for id in ids if type(id) is int)


def read(found: Contents) -> Vocabulary:
    """CheckpointError or Unsupported names what is missing, damaged or unknown."""
    return _Reader(found).made()


class _Reader:
    def __init__(self, found: Contents) -> None:
        self.found, self.path = found, found.path
        self.model = self.get("model")
        if self.model in (None, "none"):
            raise CheckpointError(f"{self.path}: holds no tokenizer")
        self.tokens: list[str] = self._list("tokens")
        kinds = self.get("token_type")
        self.kinds = [NORMAL] * len(self.tokens) if kinds is None else self._numbers("token_type", kinds)
        self.ids = {token: id for id, token in enumerate(self.tokens)}
        if len(self.ids) < len(self.tokens):
            twice = next(token for id, token in enumerate(self.tokens) if self.ids[token] != id)
            raise CheckpointError(f"{self.path}: tokenizer.ggml.tokens: {shown(twice)} is there twice")

    def get(self, name: str, default: Any = None) -> Any:
        return self.found.fields.get(f"tokenizer.ggml.{name}", default)

    def _list(self, name: str) -> list[str]:
        value = self.get(name)
        if not isinstance(value, list) or not value:
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name}: a list of strings is needed")
        return value

    def _numbers(self, name: str, value: Any) -> list[Any]:
        found = value.tolist() if hasattr(value, "tolist") else None
        if found is None or len(found) != len(self.tokens):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name}: one number for each of the {len(self.tokens)} tokens is needed")
        return list(found)

    def made(self) -> Vocabulary:
        build = {"gpt2": self._byte_level, "llama": self._sentencepiece}.get(self.model)
        if build is None:
            raise Unsupported(f"{self.path}: tokenizer.ggml.model = {shown(self.model)}; known: gpt2, llama")
        made = build()
        self._add(made)
        spm = self.model == "llama"
        named = {"bos": self._id("bos", 1 if spm else None), "eos": self._id("eos", 2 if spm else None)}
        named |= {"unk": self._id("unknown", 0 if spm else None), "pad": self._id("padding", None)}
        begins = self.get("add_bos_token", spm or self.get("pre") in _WHOLE_WORDS)
        self._surround(made, named["bos"] if begins else None, named["eos"] if self.get("add_eos_token", False) else None)
        spelled = {f"{name}_token": self.tokens[id] for name, id in named.items() if id is not None}
        return Vocabulary(made, spelled, templates=self._templates(), marks=self._marks())

    def _marks(self) -> dict[str, int]:
        found = {mark: [self._id(name, None) for name in names] for mark, names in _MARKS.items()}
        return {mark: next(id for id in ids if id is not None) for mark, ids in found.items() if any(id is not None for id in ids)}

    def _id(self, name: str, otherwise: int | None) -> int | None:
        id = self.get(f"{name}_token_id", otherwise)
        if id is not None and (type(id) is not int or not 0 <= id < len(self.tokens)):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{name}_token_id = {shown(id)}: 0 to {len(self.tokens) - 1} is allowed")
        return id

    def _byte_level(self) -> Any:
        from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers

        pre = self.get("pre")
        if pre not in CUTS:
            raise Unsupported(f"{self.path}: tokenizer.ggml.pre = {shown(pre)}; known: {', '.join(CUTS)}")
        letters = all(len(token) == 1 for token, kind in zip(self.tokens, self.kinds, strict=True) if kind == NORMAL)
        merges = [self._pair(merge) for merge in ([] if letters and not self.get("merges") else self._list("merges"))]
        made = Tokenizer(self._bpe(models.BPE, merges, ignore_merges=pre in _WHOLE_WORDS))
        cuts = [pre_tokenizers.Split(Regex(cut), "isolated") for cut in CUTS[pre]]
        made.pre_tokenizer = pre_tokenizers.Sequence([*cuts, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
        if pre in _COMPOSED:
            made.normalizer = normalizers.NFC()
        made.decoder = decoders.ByteLevel()
        return made

    def _pair(self, merge: str) -> tuple[str, str]:
        at = merge.find(" ", 1)
        if not 0 < at < len(merge) - 1:
            raise CheckpointError(f"{self.path}: tokenizer.ggml.merges: {shown(merge)} is not two tokens")
        return merge[:at], merge[at + 1 :]

    def _sentencepiece(self) -> Any:
        from tokenizers import Tokenizer, decoders, models, normalizers

        unknown = self._id("unknown", 0)
        assert unknown is not None
        merges = [self._pair(merge) for merge in self._list("merges")] if self.get("merges") else self._merges()
        made = Tokenizer(self._bpe(models.BPE, merges, unk_token=self.tokens[unknown], fuse_unk=True, byte_fallback=True))
        spaced = bool(self.get("add_space_prefix", True))
        made.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE)] * spaced + [normalizers.Replace(" ", _SPACE)])
        made.decoder = decoders.Sequence(
            [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()] + [decoders.Strip(" ", 1, 0)] * spaced
        )
        return made

    def _merges(self) -> list[tuple[str, str]]:
        """The pairs of tokens that give a token, the token with the highest score first."""
        scores = self._numbers("scores", self.get("scores"))
        parts = {token for token, kind in zip(self.tokens, self.kinds, strict=True) if kind == NORMAL}
        found = []
        for id in sorted(range(len(self.tokens)), key=lambda id: -scores[id]):
            token = self.tokens[id]
            if token in parts:
                cuts = ((token[:at], token[at:]) for at in range(1, len(token)))
                found += sorted((pair for pair in cuts if parts.issuperset(pair)), key=lambda pair: (self.ids[pair[0]], self.ids[pair[1]]))
        return found

    def _bpe(self, kind: Any, merges: list[tuple[str, str]], **options: Any) -> Any:
        try:
            return kind(self.ids, merges, **options)
        except Exception as error:  # from tokenizers in Rust
            raise CheckpointError(f"{self.path}: tokenizer.ggml.merges: {str(error).splitlines()[0]}") from None

    def _add(self, made: Any) -> None:
        from tokenizers import AddedToken

        added = [
            AddedToken(token, normalized=False, special=kind != USER_DEFINED)
            for token, kind in zip(self.tokens, self.kinds, strict=True)
            if kind in (UNKNOWN, CONTROL, USER_DEFINED) and token
        ]
        made.add_tokens(added)

    def _surround(self, made: Any, bos: int | None, eos: int | None) -> None:
        from tokenizers import processors

        if bos is None and eos is None:
            return
        before, after = ([self.tokens[id]] if id is not None else [] for id in (bos, eos))
        named = [(self.tokens[id], id) for id in {bos, eos} - {None} if id is not None]
        made.post_processor = processors.TemplateProcessing(single=[*before, "$A", *after], special_tokens=named)

    def _templates(self) -> dict[str, str]:
        """The chat templates by name."""
        start, fields = "tokenizer.chat_template", self.found.fields
        found = {key.removeprefix(start).removeprefix(".") or "default": value for key, value in fields.items() if key.startswith(start)}
        return {name: value for name, value in found.items() if isinstance(value, str) and name != "s"}
