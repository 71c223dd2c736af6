"""A model with recurrent layers and attention: the text is that of the definition under every condition."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import cache, partial
from typing import Any

import pytest
import torch

from redraft import registry
from redraft.core.noise import sample_seed
from redraft.core.sequence import Request
from redraft.core.tree import TokenTree
from redraft.draft.second import SecondModelDrafter
from redraft.engine.engine import Engine
from redraft.errors import Unsupported
from redraft.models.runner import Runner
from redraft.ops.backend import Linear
from redraft.sample.sampler import Sampler
from tests.contracts import hybrid, plain
from tests.contracts.drafters import FullFanOut, RandomTrees
from tests.contracts.identity import SAMPLING, Different, Run, drive, prompts
from tests.kv.state import State

CROWD = (0, 1, 0, 1, 0, 0)
SMALL = 5


@cache
def expected(prompt: tuple[int, ...], sampling: str, seed: int) -> list[int]:
    return plain.generate(*hybrid.tiny(), prompt, SAMPLING[sampling], seed=seed)


def chains(known: dict[tuple[str, int], list[int]]) -> RandomTrees:
    """Right for two tokens, wrong at the third."""

    class Chains(RandomTrees):
        def _grow(self, seq: Any, budget: Any) -> TokenTree:
            future = known[seq.request.id, seq.index][seq.generated :][: min(*budget, 3)]
            return TokenTree.chain([*future[:2], *((token + 1) % plain.VOCAB for token in future[2:])])

    return Chains(plain.VOCAB)


def second(runner: Runner, sampler: Sampler, name: str) -> SecondModelDrafter:
    """A drafter with the same hybrid model, a slightly changed head and its own memory."""
    own = hybrid.runner("torch", 40)
    head = own.weights.head.weight
    noise = torch.randn(head.shape, generator=torch.Generator().manual_seed(3), dtype=head.dtype)
    own.weights = replace(own.weights, head=Linear(head + 0.4 * head.std() * noise))
    return SecondModelDrafter(registry.create("draft", name), own, sampler)


DRAFTERS: dict[str, Callable[..., Any]] = {
    "none": lambda known, runner, sampler: registry.create("draft", "none").open(runner, sampler),
    "chains": lambda known, runner, sampler: chains(known),
    "trees": lambda known, runner, sampler: RandomTrees(plain.VOCAB, seed=2, right=0.8, known=known),
    "fan-out": lambda known, runner, sampler: FullFanOut(plain.VOCAB),
    "self-skip": lambda known, runner, sampler: registry.create("draft", "self-skip").open(runner, sampler),
    "draft-model": lambda known, runner, sampler: second(runner, sampler, "draft-model"),
    "rsd-s": lambda known, runner, sampler: second(runner, sampler, "rsd-s"),
}


def engine(open_drafter: Callable[..., Any], *, backend: str = "torch", chunk: int = 512, pool: int = 40, sharing: bool = True) -> Engine:
    runner = hybrid.runner(backend, pool, sharing=sharing)
    verifier = registry.create("verify", "coupled")
    sampler = Sampler(runner.spec.vocab, frozenset(), drafts=verifier.drafts)
    budgets = {"token_budget": chunk, "max_seqs": 8, "draft_rows": 16, "draft_total": 64}
    made = registry.create("sched", "sarathi", **budgets)
    return Engine(runner, made, open_drafter(runner, sampler), verifier, sampler, max_model_len=128)


def check(drafter: str, sampling: str, *, arrivals: tuple[int, ...] = (0,), n: int = 1, strict: bool = True, **options: Any) -> Run:
    """Runs requests. Raises Different if a token differs from the definition."""
    chosen = [prompts()[i % len(prompts())] for i in range(len(arrivals))]
    truth = {
        (str(i), index): expected(prompt, sampling, sample_seed(100 + i, index)) for i, prompt in enumerate(chosen) for index in range(n)
    }
    made = engine(partial(DRAFTERS[drafter], truth), **options)
    requests = [Request(str(i), list(prompt), SAMPLING[sampling].but(seed=100 + i, n=n)) for i, prompt in enumerate(chosen)]
    seen = drive(made, requests, arrivals, check=strict)
    for (name, index), text in truth.items():
        if (found := seen.texts[name if n == 1 else f"{name}/{index}"]) != text:
            raise Different(f"{drafter} {sampling} {options}: request {name}, text {index}: {found}, not {text}")
    return seen


@pytest.mark.parametrize(
    ("drafter", "sampling", "options"),
    [
        *((d, "greedy", {"chunk": 512}) for d in DRAFTERS),
        *((d, "filtered", {"chunk": 11}) for d in DRAFTERS),
        *((d, "sampled", {"arrivals": CROWD, "chunk": 24, "pool": SMALL}) for d in ("none", "chains", "trees", "rsd-s")),
        *((d, "sampled", {"arrivals": (0, 2, 9), "n": 3}) for d in ("none", "trees", "rsd-s", "self-skip")),
        *((d, "sampled", {"backend": "reference", "arrivals": (0, 0)}) for d in ("chains", "trees")),
        ("trees", "sampled", {"arrivals": (0, 3, 6), "sharing": False}),
    ],
    ids=str,
)
def test_the_text_is_the_definitions(drafter: str, sampling: str, options: dict[str, Any]) -> None:
    seen = check(drafter, sampling, **options)
    if drafter != "none":
        assert seen.rejected
    if drafter in ("chains", "trees", "draft-model", "rsd-s"):
        assert seen.accepted
    if options.get("pool") == SMALL:
        assert seen.preempted


def test_a_prefix_is_reused_where_pages_and_states_agree() -> None:
    assert check("trees", "sampled", arrivals=(0, 9)).cached == 32
    assert check("trees", "sampled", arrivals=(0, 9), sharing=False).cached == 0


def test_reuse_of_moved_text_is_refused() -> None:
    made = engine(partial(DRAFTERS["none"], {}))
    request = Request("r", [1, 2, 3], SAMPLING["greedy"], reuse="pie", before=[2, 3])
    with pytest.raises(Unsupported, match=r"^reuse pie takes over keys and values only, but"):
        made.add(request)
    assert not made.has_work


FAULTS: dict[str, tuple[str, Callable[..., Any]]] = {}


def fault(place: str) -> Callable[[Callable[..., Any]], None]:
    return lambda planted: FAULTS.update({planted.__name__: (place, planted)})


@fault("commit")
def the_state_after_all_nodes_is_committed(right: Any, state: State, work: Any, accepted: Any) -> None:
    right(state, work, [replace_path(found, state, w) for w, found in zip(work, accepted, strict=True)])


def replace_path(found: Any, state: State, work: Any) -> Any:
    nodes = len(state.held[work.seq.id].nodes)
    return found._replace(path=(nodes - 1,)) if nodes else found


@fault("commit")
def accepted_nodes_are_forgotten(right: Any, state: State, work: Any, accepted: Any) -> None:
    right(state, work, [found._replace(path=()) for found in accepted])


@fault("reserve")
def nodes_start_from_the_chain(right: Any, state: State, work: Any, trees: Any) -> Any:
    flat = [TokenTree(tree.tokens, tree.parents * 0 - 1, tree.kinds) if len(tree) else tree for tree in trees]
    return right(state, work, flat)


@fault("attach")
def a_reused_prefix_starts_from_nothing(right: Any, state: State, seq: Any, n: int) -> None:
    pass


@fault("fork")
def a_fork_starts_from_nothing(right: Any, state: State, seq: Any, child: Any) -> None:
    state.open(child)


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_noticed(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    place, planted = FAULTS[name]
    right = getattr(State, place)
    monkeypatch.setattr(State, place, lambda *given: planted(right, *given))
    with pytest.raises(Different):
        check("trees", "sampled", arrivals=(0, 9), n=2, strict=False)
