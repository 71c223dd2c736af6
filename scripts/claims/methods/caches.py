"""Cache policies: nats that the right tokens lose against the full cache, and what an edit of a cached text costs."""

from __future__ import annotations

import math
import sysconfig
import time
from pathlib import Path
from random import Random

import numpy as np

from redraft import LLM, SamplingParams
from redraft.bench.tasks import Task
from redraft.core.sequence import Request
from redraft.engine.output import checked
from scripts.claims.claim import Claim, Found
from scripts.claims.lab import Lab
from scripts.proofs.pie import distribution, divergence, insert

LENGTH, QUARTER = 256, 64  # tokens of a text, and of a budget of 25 %
EDITED = 384
HALF = f"streaming-llm:sinks=4,recent={2 * QUARTER - 4}"
SINKS, WINDOW = f"streaming-llm:sinks=4,recent={QUARTER - 4}", f"streaming-llm:sinks=0,recent={QUARTER}"
FILES = ("tarfile", "argparse", "mailbox", "inspect", "turtle", "typing", "pdb", "doctest")


def running(lab: Lab) -> Task:
    return lab.tasks(LENGTH, 6)["standard library"]


def pairs(lab: Lab) -> Task:
    return lab.tasks(LENGTH, 8)["key-value, multi-turn"]


def loss(task: str, **policy: str):  # type: ignore[no-untyped-def]
    """A run whose number is the change of each text's nats a token."""

    def run(lab: Lab) -> Found:
        chosen = running(lab) if task == "running" else pairs(lab)
        right = lab.scores(chosen, **policy).right.mean(), lab.scores(chosen).right.mean()
        notes = [f"answers right {right[0]:.0%}, full cache {right[1]:.0%}"] if task == "pairs" else []
        return Found(lab.nats(chosen, **policy), notes)

    return run


def against(task: str, one: dict[str, str], other: dict[str, str]):  # type: ignore[no-untyped-def]
    """A run whose number is what a text keeps with one policy beyond the other."""

    def run(lab: Lab) -> Found:
        chosen = running(lab) if task == "running" else pairs(lab)
        a, b = lab.nats(chosen, **one), lab.nats(chosen, **other)
        return Found(a - b, [f"against the full cache {a.mean():+.3f}, the other {b.mean():+.3f}"])

    return run


def codec(name: str):  # type: ignore[no-untyped-def]
    def run(lab: Lab) -> Found:
        from redraft.bench.cache import stored

        share = stored(lab.llm, {"codec": name})
        return Found(lab.nats(running(lab), codec=name), [f"a coded token takes {share:.0%} of the bytes of an exact one"])

    return run


def profile(lab: Lab, *, random: bool = False) -> Path:
    """Channels of double sparsity, calibrated on other text than is scored, or drawn."""
    from redraft.kv.sparse_attention.double_sparsity import DoubleSparsity, Profile

    path = lab.folder / f"channels-{random}.safetensors"
    if not path.exists():
        text = (Path(sysconfig.get_path("stdlib")) / "tarfile.py").read_text(encoding="utf-8")
        made = DoubleSparsity.calibrate(lab.llm.runner, [lab.llm.tokenizer.encode(text)], samples=2)
        if random:
            dice = np.random.default_rng(lab.seed)
            made = Profile(dice.random(made.scores.shape, np.float32), made.model, made.texts, made.tokens)
        made.save(path)
    return path


def sparse(lab: Lab, factor: int, *, random: bool = False) -> dict[str, str]:
    return {"read": f"double-sparsity:tokens={LENGTH // 8},factor={factor},profile={profile(lab, random=random)}"}


def channels_lose(lab: Lab) -> Found:
    return Found(lab.nats(running(lab), **sparse(lab, 16)))


def channels_random(lab: Lab) -> Found:
    return against("running", sparse(lab, 16), sparse(lab, 16, random=True))(lab)


def edited(lab: Lab) -> list[tuple[float, float, float]]:
    """Of each text: KL of the next token after an inserted line, with PIE and with keys that were not turned, and the processor time of
    its update over that of the whole prompt."""
    from redraft.kv.store import Store

    kept, fresh, found = lab.load(prefix_sharing=True), lab.llm, []
    params = SamplingParams(temperature=0, max_tokens=1, logprobs=1024, ignore_eos=True, seed=0)
    move = Store.move
    for i, name in enumerate(FILES[: lab.count(6)]):
        ids = kept.tokenizer.encode((Path(sysconfig.get_path("stdlib")) / f"{name}.py").read_text(encoding="utf-8")[:20_000])
        old = ids[:EDITED]
        new = insert(0.5, 12)(old, ids[EDITED:], Random(i))
        exact, _, _, _ = distribution(fresh, Request("exact", list(new), params))
        whole = seconds(fresh, Request("whole", list(new), params))
        both = []
        for turned in (True, False):
            tenant = f"{i} {turned}"
            distribution(kept, Request("old", list(old), params, tenant))
            if not turned:
                Store.move = lambda store, moves: move(store, [one._replace(delta=0) for one in moves])  # type: ignore[method-assign]
            try:
                request = Request("new", list(new), params, tenant, before=list(old), reuse="pie:shortest=8")
                both.append(distribution(kept, request)[0])
            finally:
                Store.move = move  # type: ignore[method-assign]
        distribution(kept, Request("old", list(old), params, f"{i} timed"))
        update = seconds(kept, Request("new", list(new), params, f"{i} timed", before=list(old), reuse="pie:shortest=8"))
        found.append((*(divergence(exact, one) for one in both), update / whole))
    return found


def seconds(llm: LLM, request: Request) -> float:
    """Processor time to the first token."""
    began = time.process_time()
    llm.engine.add(request)
    while llm.engine.has_work:
        checked(llm.engine.step())
    return time.process_time() - began


def pie_turn(lab: Lab) -> Found:
    found = edits(lab)
    kls = [f"{np.mean([one[k] for one in found]):.1e}" for k in (0, 1)]
    return Found(
        [math.log10(max(one[1], 1e-9) / max(one[0], 1e-9)) for one in found], [f"mean KL {kls[0]}, without the turn {kls[1]} nats"]
    )


def pie_time(lab: Lab) -> Found:
    return Found([one[2] for one in edits(lab)])


def edits(lab: Lab) -> list[tuple[float, float, float]]:
    if "edits" not in lab._runs:
        lab._runs["edits"] = edited(lab)  # type: ignore[assignment]
    return lab._runs["edits"]  # type: ignore[return-value]


NATS = "nats a token, change"
CLAIMS = (
    Claim("streaming-llm-sinks", ("keep=streaming-llm",), "A window breaks a model unless the first tokens stay",
          "running text of 256 tokens, 25 %: 4 sinks and 60 newest, against 64 newest", "nats a token, with minus without sinks",
          against("running", {"keep": SINKS}, {"keep": WINDOW}), border=0.1),
    Claim("streaming-llm-stable", ("keep=streaming-llm",), "With sinks the perplexity stays within a few per cent (here: 0.1 nats)",
          "the same, against the full cache", NATS, loss("running", keep=SINKS), border=-0.1),
    Claim("scissorhands-window", ("keep=scissorhands",), "At equal budget tokens that attention chose are worth more than the newest ones",
          "running text, 25 %, against 4 sinks and the newest", "nats a token, scissorhands minus window",
          against("running", {"keep": f"scissorhands:budget={QUARTER}"}, {"keep": SINKS})),
    Claim("scissorhands-half", ("keep=scissorhands",),
          "Half of the cache loses nearly nothing (here: 0.02 nats)", "running text, 50 %", NATS,
          loss("running", keep=f"scissorhands:budget={2 * QUARTER}"), border=-0.02),
    Claim("ada-kv-heads", ("keep=ada-kv",), "Budgets that heads of a layer share lose less than even ones",
          "five questions about key-value pairs in 256 tokens, 50 %; floor=1 is even", "nats a token, shared minus even",
          against("pairs", {"keep": f"ada-kv:budget={2 * QUARTER}"}, {"keep": f"ada-kv:budget={2 * QUARTER},floor=1"})),
    Claim("double-sparsity-loss", ("read=double-sparsity",),
          "A sixteenth of the channels finds the tokens that matter, with little loss (here: 0.05 nats)",
          "running text, an eighth of the tokens, 4 of 64 channels", NATS, channels_lose, border=-0.05),
    Claim("double-sparsity-channels", ("read=double-sparsity",), "Calibrated channels are better than random ones",
          "the same", "nats a token, calibrated minus random", channels_random),
    Claim("page-top-k-query", ("read=page-top-k",), "Pages that the query chooses keep what fixed windows forget",
          "five questions about key-value pairs in 256 tokens, 50 %, against 4 sinks and the newest", "nats a token, pages minus window",
          against("pairs", {"read": f"page-top-k:tokens={2 * QUARTER}"}, {"keep": HALF})),
    Claim("page-top-k-loss", ("read=page-top-k",), "Half of the pages loses nearly nothing (here: 0.1 nats)",
          "the same", NATS, loss("pairs", read=f"page-top-k:tokens={2 * QUARTER}"), border=-0.1),
    Claim("cache-int8-loss", ("codec=int8",),
          "8 bits lose nearly nothing (here: 0.01 nats)", "running text", NATS, codec("int8"), border=-0.01),
    Claim("cache-int4-loss", ("codec=int4",), "Few bits, a grid for each channel of the keys, keep the quality (here: 0.05 nats)",
          "running text, 4 bits", NATS, codec("int4:block=32"), border=-0.05),
    Claim("pie-turn", ("reuse=pie",), "Turned keys keep the next token's distribution: KL at least 10 times smaller than without the turn",
          "6 files of 384 tokens, a line inserted in the middle", "log10 of KL, unturned / turned", pie_turn, border=1.0),
    Claim("pie-time", ("reuse=pie",), "An edit costs 85 % less time than the whole text anew", "the same",
          "processor time to the first token, update / whole", pie_time, border=0.15, below=True),
)  # fmt: skip
