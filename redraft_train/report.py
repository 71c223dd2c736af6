"""The card of a trained head, and its comparison with drafters that need no training."""

from __future__ import annotations

from collections.abc import Sequence as Seq
from pathlib import Path
from typing import TYPE_CHECKING

from rich.console import Console

from redraft.bench import compare as bench
from redraft.bench import report, results
from redraft.bench.estimate import duration
from redraft.bench.prompts import Prompt
from redraft.config import SamplingParams
from redraft.draft.auto import Auto
from redraft_train.folder import MODEL, draft
from redraft_train.run import Made, Order

if TYPE_CHECKING:
    from redraft.llm import LLM

KINDS = (
    "A head that drafts tokens from the states of {model}. No other model can use it: it holds the model's hash.",
    "A small model that drafts tokens for {model}, whose tokenizer it has.",
)
PROMPTS, TOKENS, ROUNDS = 8, 128, 2  # of the comparison


def card(made: Made, order: Order, llm: LLM, prompts: str, command: str) -> str:
    """README.md of the folder."""
    measured, states, model = made.measured, made.states, llm.name
    depths = range(1, len(measured.accuracy) + 1)
    rows = "\n".join(
        f"| {depth} | {one:.3f} | {chain:.3f} |" for depth, one, chain in zip(depths, measured.accuracy, measured.chain, strict=True)
    )
    stages = ", ".join(f"{name} {duration(seconds)}" for name, seconds in made.seconds.items())
    held = int(states.held.sum())
    return f"""\
# {made.head.method} for {model}

    redraft generate {model} --draft {draft(made.head.method, order.out)}

{KINDS[made.head.method == MODEL].format(model=model)}

## What it was trained on

- Prompts: {prompts}. Held out, {len(made.held)} of them: {", ".join(prompt.id for prompt in made.held)}.
- Texts: {len(states.held):,} answers of the model, {held} of them held out; {len(states.tokens):,} tokens with the prompts, \
{int(states.answer.sum()):,} of them written by the model.
- Training read {made.read:,} tokens in {made.steps:,} steps. The best weights were those of step {measured.step:,}, and were kept.
- It drafts {len(made.head.head.kept):,} of {llm.runner.spec.vocab:,} tokens, the most frequent ones of these texts.
- Time: {stages}.

## Held-out accuracy

The share of the model's own tokens that the head guesses, on texts of held-out prompts, greedily; "chain": with all before it.
A step that drafts one chain of {len(measured.accuracy)} gives {measured.tokens:.2f} tokens.

| depth | alone | chain |
| --- | --- | --- |
{rows}

## Command

    {command}
"""


def compare(llm: LLM, made: Made, out: Path, console: Console, progress: Console) -> None:
    """Prints the table of `redraft compare` on held-out prompts: no drafts, auto, the head, and auto with the head. llm: has prefix sharing
    switched off."""
    own, parts = draft(made.head.method, out), f"parts={Auto.parts}+draft-model(model={out})"
    drafts = "auto", own, f"auto:{parts if made.head.method == MODEL else f'head={out}'}"
    options = bench.CompareOptions(drafts, SamplingParams(temperature=0, max_tokens=TOKENS, seed=0), ROUNDS, lenient=True)
    chosen = spread(made.held, PROMPTS)
    with report.bar(progress, bench.ticks(len(chosen), options)) as tick:
        comparison = bench.compare(llm, options, chosen, tick)
    report.show(console, comparison, options, results.rows(comparison))


def spread(prompts: Seq[Prompt], limit: int) -> list[Prompt]:
    """At most `limit`, evenly from the categories, the shortest of each first."""
    by_category: dict[str, list[Prompt]] = {}
    for prompt in sorted(prompts, key=lambda one: len(one.content)):
        by_category.setdefault(prompt.category, []).append(prompt)
    turns = max(map(len, by_category.values()))
    found = [members[i] for i in range(turns) for members in by_category.values() if i < len(members)]
    return found[:limit]
