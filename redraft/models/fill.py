"""Filling in the middle: the tokens by which a model's vocabulary marks the text before a gap and the text after it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise

from redraft.config import SamplingParams
from redraft.errors import Unsupported
from redraft.models.tokenizer import Tokenizer

LACKS = "suffix: this model has no tokens that mark the text before and after a gap"

# (prefix, suffix, middle); "" for middle: the suffix comes first, and the middle follows the prefix without a mark
FORMS = (
    ("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>"),  # Qwen2.5-Coder, CodeGemma
    ("<fim_prefix>", "<fim_suffix>", "<fim_middle>"),  # StarCoder, StarCoder2, Granite
    ("<fim-prefix>", "<fim-suffix>", "<fim-middle>"),  # SantaCoder
    ("<\uff5cfim\u2581begin\uff5c>", "<\uff5cfim\u2581hole\uff5c>", "<\uff5cfim\u2581end\uff5c>"),  # DeepSeek
    ("\u2581<PRE>", "\u2581<SUF>", "\u2581<MID>"),  # CodeLlama
    ("<PRE>", "<SUF>", "<MID>"),
    ("<|code_prefix|>", "<|code_suffix|>", "<|code_middle|>"),  # GLM
    ("<|prefix|>", "<|suffix|>", "<|middle|>"),  # Falcon-H1
    ("[PREFIX]", "[SUFFIX]", ""),  # Codestral
)
REPOSITORY = ("<|repo_name|>", "<|fim_repo|>", "<repo_name>", "<reponame>")  # begins the name of a repository
FILE = ("<|file_sep|>", "<file_sep>", "<|file_separator|>", "<filename>")  # begins the name of a file
ENDS = ("<|fim_pad|>", "<fim_pad>", "<fim-pad>", "\u2581<EOT>", "<EOT>")  # end a filled text, as do all marks
NAMES = "project", "current"  # of the repository and of the file with the gap, which callers do not name

_SPACE, _ANCHOR = "\u2581", "\u263a"  # no vocabulary merges the second with what follows it


@dataclass(frozen=True)
class Fill:
    """Ids of the marks. middle: None if the suffix comes first; repository, file: begin names, None without such a mark; others: further
    ids that end a filled text."""

    tokenizer: Tokenizer
    prefix: int
    suffix: int
    middle: int | None = None
    repository: int | None = None
    file: int | None = None
    others: tuple[int, ...] = ()

    def tokens(
        self, before: str, after: str, files: Seq[tuple[str, str]] = (), *, special: bool = True, limit: int | None = None
    ) -> list[int]:
        """Ids of a prompt whose continuation is what stands between `before` and `after`. special: with the token that the checkpoint
        puts before every text. files: names and texts of other files; the first of them are left out if there would be more than
        `limit` ids. A mark that the texts spell is text. InvalidInput for half of a surrogate pair."""
        head = self.tokenizer.first if special else []
        prefix, suffix = [self.prefix, *self._plain(before)], [self.suffix, *self._inside(after)]
        gap = [*suffix, *prefix] if self.middle is None else [*prefix, *suffix, self.middle]
        context = self._context(files, None if limit is None else limit - len(head) - len(gap)) if files else []
        return [*head, *context, *gap]

    def params(self, params: SamplingParams) -> SamplingParams:
        """The same parameters for a filled text, which also ends before any mark."""
        marks = (self.prefix, self.suffix, self.middle, self.repository, self.file, *self.others)
        ends = {token: self.tokenizer.decode([token]) for token in marks if token is not None}
        hidden = tuple(token for token, text in ends.items() if not text)
        shown = tuple(text for text in ends.values() if text)  # not special tokens, so that only a stop string keeps them out
        return params.but(stop_token_ids=(*params.stop_token_ids, *hidden), stop=(*params.stop, *shown))

    def _context(self, files: Seq[tuple[str, str]], room: int | None) -> list[int]:
        """Other files and the name of the one with the gap, if there are marks for these; else their texts alone."""
        head, tail = [], []
        if self.file is not None:
            tail = [self.file, *self._inside(f"{NAMES[1]}\n")]
            head = [] if self.repository is None else [self.repository, *self._inside(f"{NAMES[0]}\n")]
        mark = [] if self.file is None else [self.file]
        found: list[int] = []
        for name, text in reversed(files):
            one = [*mark, *self._inside(f"{name}\n{text}" if mark else f"{name}\n{text}\n\n")]
            if room is not None and len(head) + len(one) + len(found) + len(tail) > room:
                break
            found = one + found
        return [*head, *found, *tail] if found else []

    def _plain(self, text: str) -> list[int]:
        """Ids of a text."""
        first, *rest = self._cut(text)
        return [*(self.tokenizer.encode(first, special=False) if first else []), *(token for one in rest for token in self._after(one))]

    def _inside(self, text: str) -> list[int]:
        """Ids of a text that follows another: without the space that some tokenizers put before every text."""
        return [token for one in self._cut(text) for token in self._after(one)]

    def _after(self, text: str) -> list[int]:
        if not self._spaced:
            return self.tokenizer.encode(text, special=False) if text else []
        anchor = self.tokenizer.encode(_ANCHOR, special=False)
        whole = self.tokenizer.encode(_ANCHOR + text, special=False)
        return whole[len(anchor) :] if whole[: len(anchor)] == anchor else self.tokenizer.encode(text, special=False)

    def _cut(self, text: str) -> list[str]:
        """The text in pieces, so that no piece spells a mark."""
        at = [0, *(found.start() + 1 for found in self._spelled.finditer(text)), len(text)]
        return [text[begin:end] for begin, end in pairwise(at)]

    @cached_property
    def _spaced(self) -> bool:
        return str(self.tokenizer.vocabulary.spelling(self.tokenizer.encode("a", special=False)[0])).startswith(_SPACE)

    @cached_property
    def _spelled(self) -> re.Pattern[str]:
        marks = (self.prefix, self.suffix, self.middle, self.repository, self.file, *self.others)
        words = {str(self.tokenizer.vocabulary.spelling(token)) for token in marks if token is not None}
        return re.compile("|".join(re.escape(word) for word in sorted(words | {word.replace(_SPACE, " ") for word in words})))


def find(tokenizer: Tokenizer) -> Fill:
    """The marks of a vocabulary: those that its file names, else those that are spelled as a known form. Unsupported if there are none."""
    ids, named = tokenizer.vocabulary.ids(), tokenizer.vocabulary.marks
    form = next((form for form in FORMS if all(word in ids for word in form if word)), None)
    marks = {} if form is None else {name: ids[word] for name, word in zip(("prefix", "suffix", "middle"), form, strict=True) if word}
    marks = {**_found(ids, repository=REPOSITORY, file=FILE), **marks, **named}
    if not {"prefix", "suffix"} <= marks.keys():
        raise Unsupported(LACKS)
    others = {ids[word] for word in ENDS if word in ids} | ({marks.pop("pad")} if "pad" in marks else set())
    return Fill(tokenizer, **marks, others=tuple(sorted(others)))


def _found(ids: Mapping[str, int], **words: Seq[str]) -> dict[str, int]:
    """The first of the spellings of each mark that is in the vocabulary."""
    return {name: next(ids[word] for word in several if word in ids) for name, several in words.items() if any(w in ids for w in several)}
