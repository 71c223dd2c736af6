"""What quantized weights cost in quality: perplexity, divergence of the distribution, greedy agreement, and bytes.

Each form of the weights scores the same texts as the float32 model, token by token after the first 32 of a text: perplexity, the
change of the mean log-probability, the mean divergence KL(float32 || form) of the next token's distribution, and how often the
likeliest token is the same. Intervals are bootstraps over texts (95 %), those of differences over the same texts. Bytes are those of
the weights as the backend holds them, including embeddings and norms.

Texts: wikitext-2 and word problems are not in the training data of the pilots; parts of the standard library were held out of that of
the embedded model. --text names others.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Sequence as Seq
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from rich.console import Console
from rich.table import Table

from redraft import LLM
from redraft.bench.cache import bootstrap
from redraft.bench.tasks import pieces, sources
from redraft.core.batch import Batch
from redraft.core.plan import Accepted, Work
from redraft.core.taps import Taps
from redraft.core.testing import sequence
from redraft.core.tree import EMPTY
from redraft.engine.curves import Interval

FORMS = (
    "int8", "int8:outliers=4", "int4:group=32", "int4:group=64", "int4:group=128", "int4:group=adaptive", "int4:group=64,head=int4",
    "int4:group=64,head=none",
)  # fmt: skip
GIVEN = 32  # tokens at the start of a text that are not scored
PROBLEMS = Path(__file__).resolve().parents[3] / "shared" / "data" / "gsm8k" / "test.jsonl"

F64 = NDArray[np.float64]


@dataclass(frozen=True)
class Form:
    """How the weights are stored: dtype and quant, as LLM accepts them."""

    dtype: str
    quant: str | None = None

    @property
    def label(self) -> str:
        return self.dtype if self.quant is None else f"{self.quant} ({self.dtype})"


@dataclass(frozen=True)
class Scored:
    """f64[texts]: means over the scored tokens of each text."""

    form: Form
    bytes: int
    logprob: F64
    divergence: F64
    agreement: F64
    seconds: float


def distributions(llm: LLM, ids: list[int]) -> torch.Tensor:
    """Log-probabilities f32[tokens - GIVEN, V] at the place of every scored token."""
    runner, seq = llm.runner, sequence(ids, prompt_logprobs=0)  # so the logits of every row are computed
    runner.memory.open(seq)
    try:
        work = [Work(seq, len(ids))]
        pages = runner.memory.reserve(work, [EMPTY])
        out = runner.forward(Batch.pack(work, [EMPTY], pages), Taps(logits=True))
        runner.memory.paged.table.commit(work, [Accepted()])
    finally:
        runner.memory.free(seq)
    assert out.logits is not None
    return out.logits[GIVEN - 1 : -1].float().log_softmax(-1)


def score(
    model: str, form: Form, texts: Seq[list[int]], base: Seq[torch.Tensor], backend: str = "auto"
) -> tuple[Scored, list[torch.Tensor]]:
    """base: the result of `distributions` in float32; empty: this is that run."""
    llm = LLM(model, dtype=form.dtype, quant=form.quant, backend=backend, draft="none", prefix_sharing=False)
    began, found, rows = time.perf_counter(), [], []
    for i, ids in enumerate(texts):
        distribution = distributions(llm, ids)
        exact = base[i] if base else distribution
        right = distribution.gather(1, torch.tensor(ids[GIVEN:])[:, None])
        same = distribution.argmax(-1) == exact.argmax(-1)
        rows.append((right.double().mean(), (exact.exp() * (exact - distribution)).double().sum(-1).mean(), same.double().mean()))
        found.append(distribution)
    logprob, divergence, agreement = np.array(rows, np.float64).T
    return Scored(form, llm.runner.weights.bytes, logprob, divergence, agreement, time.perf_counter() - began), found


def material(llm: LLM, paths: Seq[Path], length: int, count: int) -> dict[str, list[list[int]]]:
    """Name of a source -> pieces of `length` tokens."""
    found = dict(sources(paths))
    if not paths and PROBLEMS.exists():
        lines = map(json.loads, PROBLEMS.read_text(encoding="utf-8").splitlines())
        found["word problems"] = ["\n\n".join(f"{line['question']}\n{line['answer']}" for line in lines)]
    start = llm.tokenizer.encode("")
    cut = {
        name: pieces([llm.tokenizer.encode(text, special=False) for text in some], length - len(start), count)
        for name, some in found.items()
    }
    return {name: [start + ids for ids in some] for name, some in cut.items()}


def span(found: Interval, digits: int) -> str:
    return f"{found.mean:.{digits}f} ({found.low:.{digits}f} to {found.high:.{digits}f})"


def table(title: str, every: Seq[Scored]) -> Table:
    shown = Table(title=title, box=None, title_justify="left")
    for i, heading in enumerate(("weights", "MiB", "perplexity", "change, nats a token", "KL, nats", "same greedy token", "s")):
        shown.add_column(heading, justify="right" if i else "left", no_wrap=True)
    for one in every:
        log = bootstrap(one.logprob)
        perplexity = Interval(*(float(np.exp(-x)) for x in (log.mean, log.high, log.low)))
        change = bootstrap(every[0].logprob - one.logprob)
        shown.add_row(
            one.form.label, f"{one.bytes / 2**20:.1f}", span(perplexity, 2), span(change, 4), span(bootstrap(one.divergence), 4),
            f"{one.agreement.mean():.1%}", f"{one.seconds:.1f}",
        )  # fmt: skip
    return shown


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove quant", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", help="a folder or 'embedded', may be repeated; default: embedded")
    parser.add_argument(
        "--quant", action="append", help=f"a form besides float32 and bfloat16, may be repeated; default: {', '.join(FORMS)}"
    )
    parser.add_argument("--dtype", default="float32", help="dtype of weights that are not quantized")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--text", type=Path, action="append", default=[], help="a text file, also .gz, may be repeated")
    parser.add_argument("--length", type=int, default=256, help="tokens of a text")
    parser.add_argument("--limit", type=int, default=32, help="texts of each source")
    options = parser.parse_args()
    console = Console(width=None if sys.stdout.isatty() else 200, highlight=False)
    for model in options.model or ["embedded"]:
        forms = [Form("float32"), Form("bfloat16"), *(Form(options.dtype, quant) for quant in options.quant or FORMS)]
        tasks = material(LLM(model, draft="none"), options.text, options.length, options.limit)
        for name, texts in tasks.items():
            base: list[torch.Tensor] = []
            every = []
            for form in forms:
                scored, found = score(model, form, texts, base, options.backend)
                base = base or found
                every.append(scored)
            console.print(table(f"{model}: {name}, {len(texts)} texts of {options.length} tokens", every))
            console.print()


if __name__ == "__main__":
    main()
