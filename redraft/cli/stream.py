"""Streamed text: plain in a pipe; in a terminal, tokens that were accepted drafts are green."""

from __future__ import annotations

import sys
import textwrap
import time
from collections import defaultdict
from collections.abc import Iterable
from contextlib import closing
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from redraft.config import SamplingParams
    from redraft.llm import LLM
    from redraft.models.tokenizer import Decoder
    from redraft.outputs import Delta

Part = tuple[str, bool]  # a piece of text and whether an accepted draft brought it

DRAFTED = "green"
COLUMNS = 80
# Control codes in a model's text must not reach the terminal: they are shown as pictures (from U+2400 on).
PICTURES = {code: 0x2400 + code for code in range(32) if chr(code) not in "\n\t"} | {0x7F: 0x2421}


class Colours:
    """Marks the characters of one text that came from accepted drafts. A character of several tokens counts as its last token."""

    def __init__(self, prompt: list[int], decode: Decoder) -> None:
        from redraft.engine.text import PartialText

        self.decode = decode
        self._tokens, self._text = list(prompt), PartialText.start(prompt, decode)
        self._ends: list[tuple[int, bool]] = []  # (end of the token's text, drafted) of tokens not wholly shown
        self._shown = 0

    def split(self, delta: Delta) -> list[Part]:
        """The text of `delta` in pieces of one colour. It may end before the text of its last tokens."""
        for token, drafted in zip(delta.token_ids, delta.drafted, strict=True):
            self._tokens.append(token)
            self._text = self._text.extend(self._tokens, self.decode)
            self._ends.append((len(self._text.done), drafted))
        parts, left = [], delta.text
        while left:
            end, drafted = self._ends[0]
            size = end - self._shown if len(self._ends) > 1 else len(left)
            piece, left = left[:size], left[size:]
            self._shown += len(piece)
            if piece:
                parts.append((piece, drafted))
            if left:
                self._ends.pop(0)
        return parts


class Screen:
    """Standard output."""

    def __init__(self) -> None:
        from rich.console import Console

        console = Console()
        self.terminal = console.is_terminal
        self.coloured = console.is_terminal and not console.no_color and console.color_system is not None
        self._line_open = False

    def write(self, parts: Iterable[Part]) -> None:
        for text, drafted in parts:
            shown = text.translate(PICTURES) if self.terminal else text
            sys.stdout.write(typer.style(shown, fg=DRAFTED) if drafted and self.coloured else shown)
            self._line_open = not text.endswith("\n")
        sys.stdout.flush()

    def end_line(self) -> None:
        if self.coloured:
            sys.stdout.write("\x1b[0m")  # Ctrl-C may have come in the middle of a colour
        if self._line_open:
            self.write([("\n", False)])
        sys.stdout.flush()


@dataclass
class Shown:
    """The generated texts, by sample, and figures for the summary. pieces: with the seconds until each, if tokens have a provenance.
    prompt_tokens: of the prompt."""

    prompt_tokens: int
    seconds: float = 0.0
    interrupted: bool = False
    texts: dict[int, str] = field(default_factory=lambda: defaultdict(str))
    tokens: int = 0
    steps: int = 0
    accepted: int = 0
    fault: str = ""
    stopped: dict[str, int] = field(default_factory=dict)
    pieces: dict[int, list[tuple[float, Delta]]] = field(default_factory=lambda: defaultdict(list))

    def summary(self, llm: LLM, params: SamplingParams, *notes: str) -> str:
        """Lines of at most COLUMNS characters: what was generated, how, and any `notes`."""
        from redraft.front import POLICIES

        length = f", mean acceptance length {1 + self.accepted / self.steps:.2f}" if self.steps else ""
        rate = f", {self.tokens / self.seconds:.1f} tokens/s" if self.tokens else ""
        draw = "greedy" if llm.params(params).greedy else f"seed {params.seed}"
        adapter = params.lora and f"lora {params.lora}"
        chosen = llm.cached(params, self.prompt_tokens)
        policies = [text for text in (adapter, *(getattr(chosen, seam) for seam in POLICIES)) if text]
        how = [llm.runner.backend.name, llm.config.draft, *policies, llm.promise(params, self.prompt_tokens), draw, *notes]
        lines = [f"{self.tokens} new tokens{rate}{length}", ", ".join(how)]
        if self.stopped:
            named = ", ".join(f"{name} in {count}" for name, count in self.stopped.items())
            lines.insert(1, f"stopped where drafts did not pay: {named} of {self.steps} steps")
        return folded([*lines, *([f"continued without drafts: {self.fault}"] if self.fault else [])])


def folded(lines: Iterable[str]) -> str:
    """Lines broken at spaces to COLUMNS characters. A longer word is not broken, so that it can be copied."""
    return "\n".join(textwrap.fill(line, COLUMNS, break_long_words=False, break_on_hyphens=False) for line in lines)


def show(llm: LLM, prompt: list[int], params: SamplingParams) -> Shown:
    """Generates the texts of one prompt and writes them one after the other, the first one as it is generated. Ctrl-C stops between
    two steps and sets `interrupted`."""
    screen, shown, n = Screen(), Shown(len(prompt)), params.n
    decode = llm.tokenizer.decoder if params.skip_special_tokens else llm.tokenizer.decoder_all
    colours = [Colours(prompt, decode) for _ in range(n)]
    held: dict[int, list[Part]] = defaultdict(list)
    ended: set[int] = set()
    stats = {}
    current = 0
    start = time.perf_counter()
    try:
        with closing(llm.stream({"prompt_token_ids": prompt}, params)) as deltas:
            if n > 1:
                screen.write([(f"[1/{n}]\n", False)])
            for delta in deltas:
                stats[delta.index] = delta.stats
                shown.tokens += len(delta.token_ids)
                shown.texts[delta.index] += delta.text
                held[delta.index] += colours[delta.index].split(delta)
                if delta.finish_reason is not None:
                    ended.add(delta.index)
                screen.write(held.pop(current, []))
                shown.seconds = time.perf_counter() - start
                if params.provenance:
                    shown.pieces[delta.index].append((shown.seconds, delta))
                while current in ended and current < n - 1:
                    current += 1
                    screen.end_line()
                    screen.write([(f"[{current + 1}/{n}]\n", False), *held.pop(current, [])])
    except KeyboardInterrupt:
        shown.interrupted = True
    screen.end_line()
    shown.steps = sum(one.steps for one in stats.values())
    shown.accepted = sum(one.accepted for one in stats.values())
    for one in stats.values():
        for name, count in one.stopped.items():
            shown.stopped[name] = shown.stopped.get(name, 0) + count
    shown.fault = next((one.fault for one in stats.values() if one.fault), "")
    return shown
