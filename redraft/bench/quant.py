"""What each way to store the weights takes and keeps: bytes, perplexity, the divergence from 16 bits, tokens a second.

Texts are cut into windows of `length` tokens, of which all but the first are scored. KL is the mean over these tokens of the divergence of
a way's distribution from that of 16 bits, in nats; agreement is the share of tokens whose likeliest token is the same. Speed is that of the
plain loop, of all ways in turns.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from rich.console import Console
from rich.table import Table

from redraft import registry
from redraft.bench.divergence import rows
from redraft.bench.page import Section, whole
from redraft.bench.svg import Dot, dots
from redraft.bench.tasks import read
from redraft.config import SamplingParams
from redraft.errors import InvalidInput
from redraft.llm import LLM
from redraft.models import loader
from redraft.models.memory import size

PLAIN = "16 bit"
ROOM = 128  # tokens beyond a window, for the measurement of speed
Tick = Callable[[str], None]


@dataclass(frozen=True)
class QuantOptions:
    """tokens: scored at most; length: of a window; decoded: new tokens of each turn; rounds: turns of each way; threads: None for all."""

    texts: tuple[Path, ...]
    tokens: int = 8192
    length: int = 512
    decoded: int = 64
    rounds: int = 3
    threads: int | None = None


@dataclass(frozen=True)
class Way:
    """speeds: tokens/s of each round."""

    name: str
    bytes: int
    perplexity: float
    kl: float
    agreement: float
    speeds: list[float] = field(default_factory=list)


def ways(model: str) -> dict[str, dict[str, Any]]:
    """The name of each way -> options of LLM. Weights that a file stores quantized are a way of their own."""
    codes = loader.inspect(loader.resolve(model)).stores_codes()
    names = (name for name in sorted(registry.METHODS["quant"]) if codes or not getattr(registry.method("quant", name), "keeps", False))
    return {PLAIN: {"quant": "none"}} | {name: {"quant": name} for name in names}


def windows(llm: LLM, options: QuantOptions) -> list[list[int]]:
    """Windows of all texts, evenly, as many as `tokens` allows. InvalidInput if no text fills one."""
    every: list[list[int]] = []
    for path in options.texts:
        tokens = llm.tokenizer.encode(read(path))
        every += [tokens[at : at + options.length] for at in range(0, len(tokens) - options.length + 1, options.length)]
    if not every:
        raise InvalidInput(f"--texts: no text has {options.length} tokens")
    count = max(1, min(len(every), options.tokens // (options.length - 1)))
    return [every[i * len(every) // count] for i in range(count)]


def measure(model: str, options: QuantOptions, tick: Tick = lambda name: None) -> list[Way]:
    """One way after another beside that of 16 bits, then the speeds of all in turns."""
    context = loader.inspect(loader.resolve(model)).context
    needed = max(options.length, options.decoded + 2)
    if needed > context:
        raise InvalidInput(f"--length {options.length}, --decoded {options.decoded}: the model's context is {context}")
    common = {"draft": "none", "max_model_len": min(context, needed + ROOM), "threads": options.threads, "cache_memory": 1 << 28}
    llms = {name: LLM(model, **{**common, **own}) for name, own in ways(model).items()}
    texts = windows(llms[PLAIN], options)
    found = []
    for name, llm in llms.items():
        tick(name)
        found.append(Way(name, llm.runner.weights.bytes, *_scores(llms[PLAIN], llm, texts)))
    for _ in range(options.rounds):
        for way in found:
            tick(f"{way.name}, speed")
            llm = llms[way.name]
            way.speeds.append(_speed(llm, texts[0][: min(ROOM, llm.max_model_len - options.decoded - 1)], options.decoded))
    return found


def _scores(plain: LLM, llm: LLM, texts: list[list[int]]) -> tuple[float, float, float]:
    """Perplexity, KL, agreement."""
    loss, kl, same, count = 0.0, 0.0, 0, 0
    for tokens in texts:
        pairs = zip(rows(plain, tokens), rows(llm, tokens), strict=True) if llm is not plain else ((row, row) for row in rows(llm, tokens))
        for (own, other), token in zip(pairs, tokens[1:], strict=False):
            p, q = _log_softmax(own), _log_softmax(other)
            loss, kl = loss - q[token], kl + float((np.exp(p) * (p - q)).sum())
            same, count = same + int(own.argmax() == other.argmax()), count + 1
    return float(np.exp(loss / count)), kl / count, same / count


def _log_softmax(x: Any) -> Any:
    shifted = x - x.max()
    return shifted - np.log(np.exp(shifted).sum())


def _speed(llm: LLM, prompt: list[int], count: int) -> float:
    """Tokens/s after the first one, of one text."""
    params = SamplingParams(temperature=0, max_tokens=count + 1, ignore_eos=True)
    stamps = [time.perf_counter() for delta in llm.stream({"prompt_token_ids": prompt}, params) if delta.token_ids]
    return count / (stamps[-1] - stamps[0])


def show(console: Console, options: QuantOptions, found: list[Way]) -> None:
    table = Table(box=None, title=None)
    for name in ("", "weights", "perplexity", "KL", "same token", "tokens/s", "min-max"):
        table.add_column(name, justify="left" if not name else "right")
    for way in found:
        speeds = f"{min(way.speeds):.1f}-{max(way.speeds):.1f}"
        agreement = "" if way.name == PLAIN else f"{100 * way.agreement:.1f} %"
        kl = "" if way.name == PLAIN else f"{way.kl:.4f}"
        table.add_row(way.name, size(way.bytes), f"{way.perplexity:.3f}", kl, agreement, f"{statistics.median(way.speeds):.1f}", speeds)
    console.print(table)
    console.print()
    console.print(f"- KL, same token: against {PLAIN}, over windows of {options.length} tokens")
    console.print("- tokens/s: the plain loop, median of the rounds")


def document(model: str, options: QuantOptions, found: list[Way]) -> dict[str, Any]:
    return {
        "model": model,
        "options": {**asdict(options), "texts": [str(path) for path in options.texts]},
        "ways": [asdict(way) for way in found],
    }


def page(model: str, found: list[Way]) -> str:
    """Speed, divergence and bytes of each way, as plots and tables."""

    def section(title: str, text: str, unit: str, value: Callable[[Way], list[float]], shown: str) -> Section:
        marks = [Dot(way.name, statistics.median(value(way)), min(value(way)), max(value(way))) for way in found]
        cells = [[way.name, shown.format(statistics.median(value(way)))] for way in found]
        return Section(title, text, dots({"": marks}, unit), ["weights", unit], cells)

    return whole(
        f"Ways to store the weights: {model}",
        [],
        [
            section(
                "Speed", "The plain loop; lines go from the slowest round to the fastest.", "tokens/s", lambda way: way.speeds, "{:.1f}"
            ),
            section("Divergence", f"From {PLAIN}, mean over all tokens.", "KL, nats", lambda way: [way.kl], "{:.4f}"),
            section("Memory", "All weights.", "MiB", lambda way: [way.bytes / (1 << 20)], "{:.1f}"),
        ],
    )
