"""Fewer layers: which of them draft best, whether an early exit pays, and what texts lose where rows run fewer layers for good."""

from __future__ import annotations

import sysconfig
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from redraft import LLM, SamplingParams, registry
from redraft.card import Card, Guarantee
from redraft.core.layers import Layers
from redraft.core.sequence import Request
from redraft.engine.output import checked
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab
from scripts.claims.methods.caches import running

SEARCHED, TOKENS, TRIALS = 12, 64, 160  # texts of the search, own tokens of a measurement, sets that are tried


@cache
def search(lab: Lab, skip: int) -> Any:
    """SWIFT's opened drafter after a search for a set of `skip` layers' worth of halves."""
    llm = lab.load(prefix_sharing=True)
    found = lab.opened(llm, f"swift:ratio={(skip + 0.01) / (len(llm.spec.layers) - 2)},trials={TRIALS},enough=1")
    drafter = found.engine.drafter.own.drafter
    for i, ids in enumerate(lab.prompts(llm, SEARCHED)):
        if drafter.search.active:
            lab.text(found, ids, i, 96)
    return drafter


def repeated(llm: LLM, drafter: Any, ids: list[int], sets: dict[str, Layers]) -> dict[str, float]:
    """The share of TOKENS own tokens to which each set gives the largest logit, over keys of the whole model before them."""
    drafter.options = drafter.options.__class__(window=TOKENS)
    request = Request("own", list(ids), llm.params(SamplingParams(temperature=0, max_tokens=TOKENS + 2, ignore_eos=True, seed=0)))
    llm.engine.add(request)
    while not request.sequences or request.sequences[0].generated < TOKENS + 1:
        checked(llm.engine.step())
    found = {name: drafter._score(request.sequences[0], layers) for name, layers in sets.items()}
    llm.engine.abort(request.id)
    while llm.engine.has_work:
        llm.engine.step()
    return found


@cache
def shares(lab: Lab, skip: int) -> dict[str, np.ndarray]:
    from redraft.draft.self_skip import SelfSkip

    llm = lab.load(prefix_sharing=True)
    prompts = lab.prompts(llm, SEARCHED + 16)
    drafter = search(lab, skip)
    whole = [chosen for chosen, _ in drafter.search.tried if len(chosen) == drafter.search.size]
    sets = {
        "found": drafter.without(drafter.search.best[0]),
        "least harm alone": drafter.without(whole[0]),
        "even": Layers.whole(SelfSkip(skip=skip).layers(drafter.count)),
    }
    plain = lab.opened(llm, "none")
    drafter.memory, drafter.runner = plain.engine.memory, plain.engine.runner
    each = [repeated(plain, drafter, ids, sets) for ids in prompts[SEARCHED:]]
    return {name: np.array([one[name] for one in each]) for name in sets}


def swift(skip: int, other: str, lab: Lab) -> Found:
    found = shares(lab, skip)
    return Found(found["found"] - found[other], [f"{name}: {values.mean():.2f}" for name, values in found.items()])


def swift_speed(lab: Lab) -> Found:
    llm = lab.load(prefix_sharing=True)
    prompts = lab.prompts(llm, SEARCHED + 8)
    drafter = search(lab, 3)
    state = drafter.snapshot()
    from redraft.draft.swift import Searching

    begin = Searching.restore
    Searching.restore = lambda one, snapshot: begin(one, state)  # type: ignore[method-assign]
    try:
        draft = f"swift:ratio={3.01 / (drafter.count - 2)},trials={len(state)},enough=1"
        return Found(lab.speedup(llm, draft, prompts[SEARCHED:]), [f"best score {drafter.search.best[1]:.2f}"])
    finally:
        Searching.restore = begin  # type: ignore[method-assign]


def exits(lab: Lab) -> Found:
    """Of each text the best gain of a draft from an early layer, by what was right in it."""
    from redraft.draft.exits import Measured

    states: list[Any] = []
    end = Measured.end
    Measured.end = lambda one, state: states.append(state)  # type: ignore[method-assign]
    try:
        texts = lab.texts(lab.llm, "del:every=2,memory=1,exits=9,head=off", lab.prompts(lab.llm, 10), tokens=48)
    finally:
        Measured.end = end  # type: ignore[method-assign]
    count = len(lab.llm.spec.layers)
    depths, length = np.array([(i + 1) * count // 10 for i in range(9)]), np.arange(1, 9)[:, None]
    gains = []
    for state in states:
        right = state.right / (state.rows + 1)
        gains.append(float((count * (1 - right ** (length + 1)) / (1 - right) / (length * depths + count)).max()))
    right = np.mean([state.right / state.rows for state in states], 0)
    notes = ["right at layer " + ", ".join(f"{depth} {share:.2f}" for depth, share in zip(depths, right, strict=True))]
    notes.append(f"drafted tokens a step {sum(one.drafted for one in texts) / sum(one.steps for one in texts):.2f}")
    return Found(gains, notes)


# ---- rows that run fewer layers for good


@dataclass(frozen=True)
class Lowest:
    """For comparison: an early exit, only the lowest `kept` layers behind the context."""

    kept: int = 15

    card: ClassVar[Card] = Card("Early exit", "a rival of a claim", Guarantee.LOSSY)

    def open(self, runner: Any) -> Any:
        from redraft.layer_skipping.layer_skipping import SameLayers

        return SameLayers(range(self.kept), len(runner.spec.layers))


@contextmanager
def registered() -> Iterator[None]:
    registry.METHODS["depth"]["lowest"] = f"{__name__}:Lowest"
    try:
        yield
    finally:
        del registry.METHODS["depth"]["lowest"]


def decode(other: str | None, lab: Lab) -> Found:
    """What a text keeps with SkipDecode at 22 of 30 layers on average beyond what it keeps with the other method."""
    with registered():
        task = running(lab)
        schedule = {"depth": "skip-decode:most=24,least=20,over=300"}
        one = lab.nats(task, **schedule)
        if other is None:
            return Found(one)
        two = lab.nats(task, depth=other)
    return Found(one - two, [f"against all layers {one.mean():+.2f}, the other {two.mean():+.2f} nats a token"])


# ---- a set for each prompt

TEXT, CONTEXT, TRAINED = 128, 64, 60  # tokens of a text and of what counts as its prompt, steps of the routers' training


def routers(lab: Lab) -> Found:
    """Of each held-out text, code and prose in turn: nats a token that the set of its prompt keeps beyond the best set of that size."""
    from pydoc_data.topics import topics

    import torch
    from transformers import AutoModelForCausalLM

    from redraft_train.routers import Example, Plan, train

    llm, held = lab.pair, lab.count(16) // 2 + 1
    files = sorted(Path(sysconfig.get_path("stdlib")).glob("*.py"))
    kinds = [
        [file.read_text(encoding="utf-8", errors="ignore")[2000:3200] for file in files],
        [topics[name][:1200] for name in sorted(topics)],
    ]
    ids = [[found[:TEXT] for text in texts if len(found := llm.tokenizer.encode(text)) >= TEXT] for texts in kinds]
    both = [Example(torch.tensor(one), CONTEXT) for pair in zip(*(one[:80] for one in ids), strict=False) for one in pair]
    tests, examples = both[: 2 * held], both[2 * held :]
    count = len(llm.spec.layers)
    torch.set_num_threads(lab.threads)
    routed = train(AutoModelForCausalLM.from_pretrained(llm.source, dtype=torch.float32), examples, Plan(keep=0.7, steps=TRAINED))

    @torch.no_grad()
    def losses(gone: tuple[int, ...], texts: list[Any]) -> list[float]:
        gates = torch.tensor([float(layer not in gone) for layer in range(count)])
        return [routed(one, gates)[0].item() for one in texts]

    with torch.no_grad():
        chosen = [tuple(np.flatnonzero(routed(one)[1].numpy() < 0.5).tolist()) for one in tests]
    static = {}
    for size in {*map(len, chosen)} - {0}:
        sets = list(combinations(range(1, count - 1), size))
        static[size] = min(sets, key=lambda gone: sum(losses(gone, examples[:8])))
    pairs = [(losses(gone, [one])[0], losses(static[len(gone)], [one])[0]) for gone, one in zip(chosen, tests, strict=True) if gone]
    notes = [f"layers skipped {np.mean([*map(len, chosen)]):.1f} of {count}", f"best sets {sorted(static.values())}"]
    notes += [f"{name}: {Counter(chosen[i::2]).most_common(2)}" for i, name in enumerate(("code", "prose"))]
    return Found([other - own for own, other in pairs], notes)


CLAIMS = (
    Claim("swift-even", ("draft=swift",), "The halves of layers that a search on own text finds draft better than evenly spaced layers.",
          "SmolLM2-135M, 3 of 30 layers' worth left out, 160 sets tried on other prompts",
          "share of 64 own tokens repeated, found minus even", partial(swift, 3, "even")),
    Claim("swift-search", ("draft=swift",), "Halves are judged together, not one by one.", "the same; 6 layers' worth",
          "share repeated, found minus those that do least harm alone", partial(swift, 6, "least harm alone")),
    Claim("swift-speed", ("draft=swift",), "1.3 to 1.6 times the speed of plain decoding.", "SmolLM2-135M, the set frozen, batch 1",
          "processor time, plain over SWIFT", swift_speed, border=1.0),
    Claim("del-untrained", ("draft=del",), "An early exit pays if the model was trained for it; if not, the rule says to draft nothing.",
          "SmolLM2-135M, not trained for it, 9 exits", "best tokens a layer with a draft over without", exits, border=1.0, below=True),
    Claim("first-sets", ("depth=first",), "Layers chosen for each prompt lose less than the best fixed set of that size.",
          "the embedded model, 60 steps on code and documentation, model not tuned", "nats a token kept beyond the fixed set", routers),
    Claim("skip-decode-loss", ("depth=skip-decode",), "Fewer and fewer layers cost little once the model is tuned to the schedule.",
          "SmolLM2-135M, not tuned, 24 falling to 20 of 30 layers", "change of nats a token", partial(decode, None), border=-0.1),
    Claim("skip-decode-exit", ("depth=skip-decode",), "The top layers matter more than those below them: better than an early exit.",
          "the same against the lowest 22 layers", "nats a token kept beyond the other", partial(decode, "lowest:kept=22")),
)  # fmt: skip
