"""Writes docs/one-step.md: one real step of the engine, recorded from outside. Run: python scripts/one_step.py

The suite runs it and compares the result with the page. The `reference` backend computes in float64, so every machine prints the same.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from redraft import LLM, SamplingParams
from redraft.core.sequence import Request

PAGE = Path(__file__).resolve().parent.parent / "docs" / "one-step.md"
PROMPT = "class Stack:\n    def __init__(self):\n        self.items = []\n\n    def push(self, item):\n        self.items"
STEPS = 40  # steps before the one that is shown: the drafter learns in them


class Watched:
    """Forwards every call to a part of the engine and records the result."""

    def __init__(self, part: Any, seen: dict[str, Any]) -> None:
        self._part, self._seen = part, seen

    def __getattr__(self, name: str) -> Any:
        value = getattr(self._part, name)
        if not callable(value):
            return value

        def call(*args: Any, **kwargs: Any) -> Any:
            self._seen[name] = value(*args, **kwargs)
            return self._seen[name]

        return call


def page() -> str:
    """The page. It shows a step that accepted drafts and moved keys."""
    llm = LLM("embedded", backend="reference", draft="token-recycling", draft_rows=8, cache_memory=1 << 28)
    engine, decode = llm.engine, llm.tokenizer.decode
    seq = None
    engine.add(Request("r", llm.tokenizer.encode(PROMPT), SamplingParams(temperature=0, max_tokens=400, ignore_eos=True)))
    seen: dict[str, Any] = {}
    for name in ("scheduler", "drafter", "verifier", "memory", "runner"):
        setattr(engine, name, Watched(getattr(engine, name), seen))
    for number in range(1, 200):
        before = len(engine.running[0].tokens) if engine.running else 0
        seen.clear()
        engine.step()
        seq = engine.running[0]
        if number >= STEPS and seen["commit"]:
            break
    assert seq is not None
    work, (tree,), view = seen["plan"].work[0], seen["propose"], seen["reserve"]
    out, (accepted,), (move,) = seen["forward"], seen["accept"], seen["commit"]
    root = before - 1
    lines = [
        "# One step, with real tensors",
        "",
        "`python scripts/one_step.py` writes this page, and the suite checks it. The embedded model runs in float64",
        "with the drafter `token-recycling` and 8 nodes.",
        "Each line of `Engine.step` is shown with its result. The prompt:",
        "",
        "```python",
        PROMPT,
        "```",
        "",
        f"This is step {number}. The text now ends in `{decode(seq.tokens[before - 8 : before])!r}`.",
        "Only its last token is *pending*: its keys are not stored yet.",
        "",
        "```",
        "plan = scheduler.plan(waiting, running, memory)",
        f"    work    {work.rows} row of sequence {seq.id}        budget  {tuple(seen['plan'].budgets[0])}  (nodes, depth)",
        "",
        "trees = drafter.propose(plan.seqs, plan.budgets)",
        f"    pending {seq.tokens[root]:5d} {decode([seq.tokens[root]])!r}",
    ]
    for i, (token, parent, depth) in enumerate(zip(tree.tokens.tolist(), tree.parents.tolist(), tree.depths().tolist(), strict=True)):
        kept = "   accepted" if i in accepted.path else ""
        lines.append(
            f"    node {i}  {token:5d} {'  ' * depth}{decode([token])!r:12s} under {'pending' if parent < 0 else f'node {parent}'}{kept}"
        )
    length = int(view.lengths[0][0])
    n = view.pages[0].shape[1]
    lines += [
        "",
        "pages = memory.reserve(plan.work, trees)",
        f"    pages   {view.pages[0][0].tolist()}   {n} of 32 slots; {length} are committed, the tail is {length}..{length + len(tree)}",
        f"    fresh   {[page for _, page in view.fresh]}   zeroed before use",
        "",
        "batch = Batch.pack(plan.work, trees, pages)",
    ]
    positions = [root, *(root + d for d in tree.depths().tolist())]
    lines.append(f"    tokens     {[seq.tokens[root], *tree.tokens.tolist()]}")
    lines.append(f"    positions  {positions}      by depth, not by row")
    bits = [format(int(row[0]), f"0{len(tree)}b")[::-1] for row in tree.ancestors()]
    lines.append("    ancestors  . " + " ".join(bits) + "      bit j: node j is on the row's path")
    lines += [
        "",
        "out = runner.forward(batch, taps)",
        f"    argmax     {out.argmax.tolist()}      the model's likeliest token after the pending token and after each node",
        "",
        "accepted = finish(verifier.accept(trees, distribution))",
        f"    path       {list(accepted.path)}      the nodes whose token is the model's",
        f"    tokens     {list(accepted.tokens)}  {decode(list(accepted.tokens))!r}      the path's and the bonus",
        "",
        "memory.move(memory.commit(plan.work, accepted))",
    ]
    for src, dst in zip(move.src.tolist(), move.dst.tolist(), strict=True):
        lines.append(f"    move       page {src // 32} slot {src % 32}  ->  page {dst // 32} slot {dst % 32}")
    lines += [
        f"    stored     {seq.stored} of {len(seq.tokens)} tokens: one is pending again",
        "```",
        "",
        f"One pass over the weights, {len(accepted.tokens)} tokens.",
        "",
    ]
    return "\n".join(lines)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
