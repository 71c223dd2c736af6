"""A text under cache and depth policies has the tokens that it has alone, one token a step, on the reference backend, NumPy's and
PyTorch's. This holds for every drafter, chunk size, batch and pool. Policies without effect change nothing. What does not depend on the
backend runs on NumPy's, which is the fastest for a model so small."""

from __future__ import annotations

import itertools
import re
from functools import cache, partial

import pytest

from redraft import registry
from redraft.card import Guarantee
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.errors import Unsupported
from redraft.guarantee import weakest
from redraft.llm import LLM
from redraft.ops import library
from redraft.outputs import CompletionOutput
from tests.arrays import BACKEND, DEFINITION, QUICK
from tests.contracts import identity, plain, trained
from tests.contracts.identity import Run, drafter, drive, prompts

engine = partial(identity.engine, layers=4, backend=QUICK)
SEAMS = ("keep", "codec", "read", "depth", "steer")
# Options with which a method has an effect on texts of a hundred tokens. Other methods are tested with their defaults.
BITING = {
    "a2ats": f"tokens=44,window=32,distance=40,sinks=1,profile={trained.codebooks(4)}",
    "ada-kv": "budget=0.3,window=4,pool=3,sinks=1,floor=0",
    "compresskv": f"budget=0.3,heads=1,window=4,pool=3,sinks=1,least=4,profile={trained.votes(4)}",
    "context-knob": f"path={trained.knob(4)}",
    "d2o": "budget=0.3,sinks=1,drop=8",
    "double-sparsity": None,  # needs a profile of the model: tests/kv/sparse_attention
    "duo": f"sinks=2,local=14,profile={trained.heads(4)}",
    "elastic-cache": "budget=0.4,distance=3,drop=4",
    "ems": "budget=12,window=4,similar=0",
    "h2o": "budget=20,drop=8",
    "first": None,  # needs routers of the model: tests/layer_skipping
    "gear": "block=32",
    "infllm": "tokens=50,local=16,sinks=2,block=32,representatives=2",
    "int4": "block=32",
    "kvmerger": "similar=0.1,count=true",
    "kivi": "block=32",
    "layer-skip": "speedup=2",
    "lazy-eviction": "budget=24,window=8",
    "mikv": f"profile={trained.channels(4, 'mikv')}",
    "page-top-k": "tokens=64,sinks=0",
    "prefixkv": "budget=0.3,sinks=1,recent=4",
    "razor": f"sinks=1,recent=8,share=0.1,every=8,profile={trained.heads(4)}",
    "scissorhands": "budget=32,recent=4,sinks=1,history=8",
    "sentencekv": "tokens=48,start=2,recent=4,longest=8",
    "skip-decode": "least=2,over=8",
    "snapkv": "budget=0.3,window=4,pool=3,sinks=1",
    "streaming-llm": "sinks=2,recent=14",
    "think": f"block=32,share=0.7,profile={trained.channels(4)}",
}
NEUTRAL = {
    "a2ats": f"tokens=8192,window=4096,distance=40,profile={trained.codebooks(4)}",
    "ada-kv": "budget=4096",
    "compresskv": f"budget=4096,profile={trained.votes(4)}",
    "context-knob": "strength=0",
    "d2o": "budget=4096",
    "duo": f"streaming=0,profile={trained.heads(4)}",
    "elastic-cache": "budget=1",
    "ems": "budget=4096",
    "h2o": "budget=4096",
    "infllm": "tokens=8192,local=4096",
    "kvmerger": "similar=1",
    "layer-skip": "speedup=1",
    "lazy-eviction": "budget=4096",
    "mikv": "balance=false",
    "page-top-k": "tokens=4096",
    "prefixkv": "budget=4096",
    "razor": f"recent=4096,profile={trained.heads(4)}",
    "scissorhands": "budget=4096",
    "sentencekv": "tokens=4096",
    "skip-decode": "least=8",
    "snapkv": "budget=4096",
    "streaming-llm": "recent=4096",
    "think": "share=0",
}
BESIDE = {"mikv": ("keep", "h2o")}  # methods that need another one: its seam and name


def chosen(options: dict[str, str | None]) -> list[tuple[str, str]]:
    """(seam, text) of every registered method that has options here or needs none."""
    found = []
    for seam in SEAMS:
        for name in registry.METHODS[seam]:
            if options.get(name, "") is not None and (options is BITING or name in options):
                found.append((seam, f"{name}:{options.get(name, '')}".rstrip(":")))
    return found


def alone_or_beside(options: dict[str, str | None]) -> list[tuple[tuple[str, str], ...]]:
    """Each of these methods alone, or with the one that it needs."""
    found: list[tuple[tuple[str, str], ...]] = []
    for seam, text in chosen(options):
        other = BESIDE.get(registry.parse(text)[0])
        if other is None:
            found.append(((seam, text),))
        elif other[1] in registry.METHODS[other[0]]:
            found.append(((seam, text), (other[0], f"{other[1]}:{options[other[1]]}")))
    return found


def pairs() -> list[tuple[tuple[str, str], ...]]:
    """Compatible pairs of methods of different seams: each method with at least one of every other seam, in turn, so that a seam's methods
    meet different partners."""
    found = []
    for seam, other in itertools.combinations(SEAMS, 2):
        these, those = ([one for one in chosen(BITING) if one[0] == own] for own in (seam, other))
        longer, shorter = sorted((these, those), key=len, reverse=True)
        turns = [(a, shorter[(i + turn) % len(shorter)]) for turn in range(len(shorter)) for i, a in enumerate(longer)]
        met: set[tuple[str, str]] = set()
        for pair in turns:
            if not met.issuperset(pair) and allowed(dict(pair)):
                met.update(pair)
                found.append(pair)
    return found


def allowed(policies: dict[str, str]) -> bool:
    try:
        engine().policies.check(SamplingParams(**policies))
    except Unsupported:
        return False
    return True


def params(policies: dict[str, str], i: int, temperature: float = 0.8) -> SamplingParams:
    return SamplingParams(temperature=temperature, max_tokens=44, seed=100 + i, **policies)


def requests(policies: list[dict[str, str]], count: int) -> list[Request]:
    return [Request(str(i), list(prompts()[i % len(prompts())]), params(policies[i % len(policies)], i)) for i in range(count)]


@cache
def alone(policies: tuple[tuple[str, str], ...], i: int) -> tuple[int, ...]:
    """Request i alone: float64, one row a step, no drafts. The first text of each policy alone is the reference's, which is slow."""
    request = requests([dict(policies)], i + 1)[i]
    backend = DEFINITION if i == 0 and policies in ((), *SINGLE) else QUICK
    return tuple(drive(engine(backend=backend, chunk=1, sharing=False), [request], [0]).texts[request.id])


def same(seen: Run, policies: list[tuple[tuple[str, str], ...]], count: int) -> None:
    for i in range(count):
        assert tuple(seen.texts[str(i)]) == alone(policies[i % len(policies)], i), f"request {i} under {policies[i % len(policies)]}"


SINGLE = alone_or_beside(BITING)


def named(some: tuple[tuple[str, str], ...]) -> str:
    """Without the folders of files, which every process makes anew."""
    return " ".join(re.sub(r"=/[^,]*/", "=", text) for _, text in some)


ids = list(map(named, SINGLE))


@pytest.mark.parametrize("one", SINGLE, ids=ids)
def test_a_policy_bites(one: tuple[tuple[str, str], ...]) -> None:
    """Each method changes some text; otherwise the tests below prove nothing."""
    if weakest(**dict(one)) < Guarantee.LOSSY:
        pytest.skip("near: the text may well be the same")
    assert any(alone(one, i) != alone((), i) for i in range(3))


@pytest.mark.parametrize(
    ("draft", "chunk", "i"),
    [("none", 11, 0), ("oracle", 512, 0), ("oracle", 11, 1), ("token-recycling", 512, 1), ("self-skip:skip=1", 11, 0)],
)
@pytest.mark.parametrize("one", SINGLE, ids=ids)
def test_alone_with_drafts_and_chunks(one: tuple[tuple[str, str], ...], draft: str, chunk: int, i: int) -> None:
    if draft.partition(":")[0] not in (*registry.METHODS["draft"], "oracle"):
        pytest.skip(f"{draft} is not registered")
    with_drafts(one, draft, chunk, i, QUICK)


@pytest.mark.skipif(BACKEND == QUICK, reason="that is the backend of the tests above")
@pytest.mark.parametrize("one", SINGLE, ids=ids)
def test_on_pytorch(one: tuple[tuple[str, str], ...]) -> None:
    with_drafts(one, "oracle", 11, 0, BACKEND)
    with_drafts(one, "oracle", 512, 1, BACKEND)


def with_drafts(one: tuple[tuple[str, str], ...], draft: str, chunk: int, i: int, backend: str) -> None:
    request = requests([dict(one)], i + 1)[i]
    known = {(request.id, 0): alone(one, i)}
    seen = drive(engine(drafter(draft, known), backend=backend, chunk=chunk), [request], [0])
    assert tuple(seen.texts[request.id]) == alone(one, i)
    assert draft != "oracle" or (seen.accepted and seen.rejected)


@pytest.mark.parametrize(("draft", "pool", "backend"), [("oracle", 60, QUICK), ("oracle", 9, BACKEND), ("none", 9, QUICK)])
def test_all_policies_in_one_batch(draft: str, pool: int, backend: str) -> None:
    """Texts without a policy and with every policy in one batch. In the small pool texts are preempted and start again."""
    every = [(), *SINGLE]
    count = max(8, len(every))
    asked = requests([dict(one) for one in every], count)
    known = {(str(i), 0): alone(every[i % len(every)], i) for i in range(count)}
    made = engine(drafter(draft, known), backend=backend, chunk=96, pool=pool)
    seen = drive(made, asked, [i % 3 for i in range(count)])
    same(seen, every, count)
    assert pool > 9 or seen.preempted


@pytest.mark.parametrize("one", SINGLE, ids=ids)
def test_preempted_texts_start_again(one: tuple[tuple[str, str], ...]) -> None:
    """After a preemption, prompt and new tokens are one chunk, which must be split where policies begin to act."""
    seen = drive(engine(chunk=96, pool=6, max_model_len=128), requests([dict(one)], 4), [0, 0, 0, 1])
    same(seen, [one], 4)
    assert seen.preempted or dict(one).keys() & {"codec", "keep"}, "nothing is shown"  # a small cache can fit without preemption


@pytest.mark.parametrize("pair", pairs(), ids=named)
def test_two_policies_together(pair: tuple[tuple[str, str], ...]) -> None:
    asked = requests([dict(pair), {}], 2)
    known = {(str(i), 0): alone(pair if i == 0 else (), i) for i in range(2)}
    seen = drive(engine(drafter("oracle", known), chunk=40), asked, [0, 1])
    same(seen, [pair, ()], 2)


PLAIN: dict[str, CompletionOutput] = {}  # what each of the engines below writes without a policy


@pytest.mark.parametrize("one", alone_or_beside(NEUTRAL), ids=named)
@pytest.mark.parametrize("dtype", ["float64", "float32"])
def test_neutral_settings_change_no_bit(embedded: dict[str, LLM], one: tuple[tuple[str, str], ...], dtype: str) -> None:
    policy = trained.fitted(dict(one), embedded[dtype].runner)
    before, after = several_pages(embedded, dtype), several_pages(embedded, dtype, **policy)
    assert after.token_ids == before.token_ids
    assert after.logprobs == before.logprobs


def several_pages(llms: dict[str, LLM], dtype: str, **policy: str) -> CompletionOutput:
    if not policy and (found := PLAIN.get(dtype)):
        return found
    prompt = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n" * 8
    (made,) = llms[dtype].generate(prompt, SamplingParams(temperature=0.8, seed=3, max_tokens=40, logprobs=5, **policy))
    return made.outputs[0] if policy else PLAIN.setdefault(dtype, made.outputs[0])


@pytest.mark.skipif(library.load() is None, reason="only the compiled kernels share pages between texts with and without policies")
@pytest.mark.parametrize("one", SINGLE, ids=ids)
def test_a_prefix_that_another_text_left_changes_no_bit(native: tuple[LLM, LLM], one: tuple[tuple[str, str], ...]) -> None:
    """The prompt ends a token behind a page, so a prefix could hold all rows that a policy watches but one."""
    shared, alone_ = native
    policies = trained.fitted(dict(one), shared.runner)
    ids_ = shared.tokenizer.encode("class Stack:\n    def push(self, item):\n        self.items.append(item)\n\n" * 8)[:129]
    asked = SamplingParams(temperature=0.8, seed=3, max_tokens=24, logprobs=3, ignore_eos=True)
    try:
        shared.engine.policies.check(asked.but(**policies))
    except Unsupported as error:
        pytest.skip(str(error))
    shared.generate({"prompt_token_ids": ids_}, asked.but(max_tokens=1))
    (found,), (wanted,) = (llm.generate({"prompt_token_ids": ids_}, asked.but(**policies)) for llm in (shared, alone_))
    assert found.outputs[0].token_ids == wanted.outputs[0].token_ids
    assert found.outputs[0].logprobs == wanted.outputs[0].logprobs


@pytest.fixture(scope="module")
def native() -> tuple[LLM, LLM]:
    return tuple(LLM("embedded", dtype="float32", backend="native", prefix_sharing=on, max_seqs=2) for on in (True, False))  # type: ignore[return-value]


@pytest.fixture(scope="module")
def embedded() -> dict[str, LLM]:
    return {dtype: LLM("embedded", dtype=dtype, prefix_sharing=False, max_seqs=4) for dtype in ("float64", "float32")}


def test_n_texts_of_one_prompt_fork_under_policies() -> None:
    for one in SINGLE:
        request = Request("r", list(prompts()[0]), params(dict(one), 0).but(n=3))
        seen = drive(engine(chunk=512), [request], [0])
        assert tuple(seen.texts["r/0"]) == alone(one, 0), one
        assert len({tuple(text) for text in seen.texts.values()}) == 3


# ---- special cases


def test_an_evicting_text_is_admitted_where_its_prefix_is_cached() -> None:
    """A match would copy the kept tokens of cached pages. With a pool of the text's own size the prompt is computed instead."""
    made = identity.engine(pool=5, max_model_len=160)
    policy = SamplingParams(temperature=0, max_tokens=20, seed=1, keep="streaming-llm:sinks=2,recent=64")
    prompt = [token for one in prompts()[:4] for token in one][:150]
    texts = [drive(made, [Request(name, list(prompt), policy)], [0]).texts[name] for name in "01"]
    assert texts[0] == texts[1]


def test_a_format_that_comes_again_leaves_what_is_stored() -> None:
    """Two codecs that differ only in their sync points share a format. The second request arrives while the first runs."""
    first = SamplingParams(temperature=0, max_tokens=30, seed=1, codec="int4:block=32")
    second = first.but(codec="int4:block=64")
    prompt = list(prompts()[0][:40])
    for backend in {DEFINITION, BACKEND}:
        by_itself = drive(engine(backend=backend), [Request("0", prompt, first)], [0]).texts["0"]
        both = drive(engine(backend=backend), [Request("0", prompt, first), Request("1", prompt, second)], [0, 10])
        assert both.texts["0"] == by_itself


def test_first_tokens_are_those_of_the_text_where_the_lane_begins_later() -> None:
    """Sparse attention that always reads the first pages, with an eviction that drops them."""
    policy = {"keep": "streaming-llm:sinks=0,recent=100", "read": "page-top-k:tokens=96"}
    request = Request("0", list(prompts()[0][:40]), SamplingParams(temperature=0.8, max_tokens=150, seed=1, **policy))
    slow = drive(engine(chunk=1, pool=80, max_model_len=256), [request], [0]).texts["0"]
    again = Request("0", list(request.prompt), request.params)
    oracle = identity.RandomTrees(plain.VOCAB, seed=2, right=0.9, known={("0", 0): slow})
    assert drive(engine(oracle, pool=80, max_model_len=256), [again], [0]).texts["0"] == slow


def test_prompt_logprobs_of_an_edited_text_are_refused() -> None:
    with pytest.raises(Unsupported, match="prompt_logprobs need the whole prompt computed"):
        engine().add(Request("r", [1, 2, 3], SamplingParams(prompt_logprobs=0), reuse="pie", before=[1, 2]))
