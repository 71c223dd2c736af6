"""Cache-Craft: what is seen of a prompt, how much of a chunk runs again, and that nothing or all of it gives the bits it should."""

from __future__ import annotations

from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given

from redraft import LLM
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.taps import Taps
from redraft.core.tree import EMPTY
from redraft.core.view import Watch
from redraft.engine.engine import Engine
from redraft.errors import InvalidInput
from redraft.kv.reuse.cache_craft import Crafting, Variant, impact
from redraft.ops import library
from redraft.ops.arrays import array
from tests.contracts import identity
from tests.kv.reuse.joined import CHUNKS, GREEDY, HEAD, LONGEST, joined, reported, text_of

SOME = "cache-craft:alpha=0.7"
OLD, NEW = (2, 0, 3, 1), (3, 2, 1, 0)
SAMPLED = GREEDY.but(max_tokens=14, temperature=1.0)


def warm(reuse: str = SOME, *orders: tuple[int, ...], **options: Any) -> Engine:
    """An engine that has seen the chunks in these orders."""
    made = identity.engine(**{"max_model_len": LONGEST, **options})
    for i, order in enumerate(orders or (OLD,)):
        text_of(made, joined(f"old {i}", order, reuse))
    return made


def plainly(order: tuple[int, ...] = NEW, **options: Any) -> list[float]:
    return reported(identity.engine(max_model_len=LONGEST, sharing=False, **options), joined("plain", order))


def variants(engine: Engine) -> list[list[Variant]]:
    (method,) = [one for one in engine.opened._found.values() if isinstance(one, Crafting)]
    return list(method._variants.values())


def variant(before: str = "", inter: tuple[float, ...] = (), cci: float = 0.6) -> Variant:
    """After the chunks named by letters."""
    return Variant([], 0, tuple(letter.encode() for letter in before), inter, cci, np.zeros(9))


def named(letters: str) -> list[bytes]:
    return [letter.encode() for letter in letters]


def test_beta_gamma_and_the_part_of_a_chunk() -> None:
    one = variant("abc", (3.0, 1.0, 4.0))
    assert one.beta(named("abc")) == one.beta(named("cxba")) == 1 and one.beta(named("ax")) == 3 / 8 and one.beta(named("xy")) == 0
    assert one.gamma(named("abc")) == one.gamma(named("xaybc")) == one.gamma(named("c")) == 0
    assert one.gamma(named("cba")) == 1 and one.gamma(named("acb")) == 1 / 3
    assert one.part(named("abc"), 1) == 0 and one.part(named("cba"), 1) == 0.6 and one.part(named("xy"), 100) == 1
    assert one.part(named("ax"), 1) == pytest.approx(0.6 * 5 / 8)
    first = variant()
    assert first.part([], 1) == 0 and first.part(named("a"), 1) == 0.6


@given(
    st.permutations("abcd"), st.permutations("abcdxy"), st.integers(0, 6), st.lists(st.floats(0, 9), min_size=4, max_size=4),
    st.floats(0.5, 1), st.floats(0, 3), st.floats(0, 3),
)  # fmt: skip
def test_bounds(old: list[str], new: list[str], count: int, inter: list[float], cci: float, low: float, more: float) -> None:
    one, before = variant("".join(old), tuple(inter), cci), named("".join(new[:count]))
    assert 0 <= one.beta(before) <= 1 + 1e-12 and 0 <= one.gamma(before) <= 1
    assert 0 <= one.part(before, low) <= one.part(before, low + more) <= 1 and one.part(before, 0) == 0


def test_the_impact_of_the_context() -> None:
    """Between 1/2 without attention on it and 1; by hand for two layers."""
    none = np.zeros((1, 2))
    assert impact(none, np.array([5.0, 3.0]), [8], 4) == 0.5 == impact(np.zeros((0, 2)), np.ones(2), [], 4)
    a, b = (2 / (4 * 8) + 6 / (4 * 8)) / 2, (5 / 16 + 3 / 16) / 2
    assert impact(np.array([[2.0, 6.0]]), np.array([5.0, 3.0]), [8], 4) == pytest.approx(1 / (1 + np.exp(-a / b)))


def test_what_is_seen_of_a_prompt() -> None:
    """The same as one pass over the whole prompt says, in steps of any size."""
    made = identity.engine(max_model_len=LONGEST)
    request = joined("plain", OLD)
    seq = made.admission.sequence(request, 0)
    made.memory.open(seq)
    work = [Work(seq, len(request.prompt))]
    out = made.runner.forward(
        Batch.pack(work, [EMPTY], made.memory.reserve(work, [EMPTY])), Taps(attention={0: (Watch("mass", each=True),)})
    )
    mass = array(out.attention[0].chain)[0].mean(2)  # [rows, layers, slots]
    chunks = joined("r", OLD, SOME).chunks
    for chunk in (512, 64, 7):
        seen = [one for held in variants(warm(chunk=chunk)) for one in held]
        for i, (first, end) in enumerate(chunks):
            before = mass[first:end, :, chunks[0][0] : first]
            assert seen[i].outward == pytest.approx(before.sum(2).mean(1), abs=1e-12)
            assert seen[i].inter == pytest.approx([mass[first:end, :, a:b].sum() for a, b in chunks[:i]], abs=1e-9)
            inter = np.array([mass[first:end, :, a:b].sum((0, 2)) for a, b in chunks[:i]]).reshape(i, 2)
            intra = mass[first:end, :, first:end].sum((0, 2))
            assert seen[i].impact == pytest.approx(impact(inter, intra, [b - a for a, b in chunks[:i]], end - first), abs=1e-9)


def test_a_prompt_with_an_unknown_chunk_is_computed() -> None:
    made = identity.engine(max_model_len=LONGEST)
    first = joined("new", OLD, SOME)
    assert reported(made, first) == pytest.approx(plainly(OLD), abs=1e-12)
    assert (first.reused_tokens, first.repair_rows) == (0, 0) and len(variants(made)) == 4
    assert made.memory.match([*first.prompt, 0], "") == len(first.prompt) // 32 * 32, "its pages are shared on"
    again = joined("again", NEW, SOME)
    reported(made, again)
    assert again.reused_tokens > 60 and 0 < again.repaired_tokens < again.reused_tokens


def test_the_tokens_that_looked_most_at_their_context_run_again() -> None:
    made = warm()
    new = joined("new", NEW, SOME)
    text_of(made, new)
    assert [span.at for span in new.spans] == [first for first, _ in new.chunks]
    keys = [np.asarray(CHUNKS[i], np.int32).tobytes() for i in NEW]
    for i, span in enumerate(new.spans):
        one = next(one for held in variants(made) for one in held if one.first == span.first)
        count = int(np.ceil(one.part(keys[:i], 0.7) * span.length))
        assert span.again == tuple(sorted((np.argsort(-one.outward, kind="stable")[:count] + span.at).tolist()))


def test_the_same_prompt_is_the_prefix_cache() -> None:
    made = warm()
    again = joined("again", OLD, SOME)
    assert reported(made, again) == pytest.approx(plainly(OLD), abs=1e-12)
    assert again.cached_tokens == 128 // 32 * 32 and again.repair_rows == 0


def test_alpha_0_repairs_nothing_and_a_large_one_computes_all() -> None:
    none = joined("new", NEW, "cache-craft:alpha=0")
    reported(warm("cache-craft:alpha=0", layers=4), none)
    assert none.reused_tokens > 100 and none.repair_rows == 0
    other = (1, 0, 3, 2)  # no chunk has all chunks in front again that it had
    every = joined("new", other, "cache-craft:alpha=1000")
    assert reported(warm("cache-craft:alpha=1000", layers=4), every) == pytest.approx(plainly(other, layers=4), abs=1e-10)
    assert every.reused_tokens == 0


def test_one_layer_is_exact() -> None:
    assert reported(warm("cache-craft:alpha=0", layers=1), joined("new", NEW, "cache-craft:alpha=0")) == pytest.approx(
        plainly(layers=1), abs=1e-10
    )


def test_more_variants_never_repair_more() -> None:
    few, many = (joined("new", NEW, SOME) for _ in range(2))
    text_of(warm(SOME, OLD), few)
    made = warm(SOME, OLD)
    method = next(one for one in made.opened._found.values() if isinstance(one, Crafting))
    text_of(made, joined("plain", (3, 0, 2, 1)))
    kept = {key: list(held) for key, held in method._variants.items()}
    method._variants.clear()
    text_of(made, joined("learns", (3, 0, 2, 1), SOME))
    for key, held in kept.items():
        method._variants[key] = [*held, *method._variants[key]]
    assert all(len(held) == 2 for held in method._variants.values())
    text_of(made, many)
    assert 0 < many.repaired_tokens < few.repaired_tokens


def test_steps_drafts_batches_and_preemption_change_nothing() -> None:
    alone = text_of(warm(layers=4), joined("new", NEW, SOME, SAMPLED))
    assert alone != text_of(warm(layers=4), joined("new", NEW, params=SAMPLED)), "the reuse is seen"
    for drafter, chunk, pool in (("none", 8, 40), ("random", 24, 40), ("token-recycling", 512, 40), ("none", 33, 17)):
        made = warm(drafter=identity.drafter(drafter, {}), chunk=chunk, pool=pool, layers=4)
        others = [joined(f"o{i}", order, reuse) for i, (order, reuse) in enumerate([((1, 3), ""), ((3, 1, 0), SOME), ((0,), "")])]
        seen = identity.drive(made, [joined("new", NEW, SOME, SAMPLED), *others], [0, 0, 1, 3])
        assert pool < 40 or seen.texts["new"] == alone, (drafter, chunk)


@pytest.mark.parametrize("order", [OLD, NEW], ids=["while it learns", "while it repairs"])
def test_preempted_and_aborted(order: tuple[int, ...]) -> None:
    def made() -> Engine:
        return warm(chunk=16) if order is NEW else identity.engine(max_model_len=LONGEST, chunk=16)

    truth, engine = text_of(made(), joined("new", order, SOME)), made()
    engine.add(joined("new", order, SOME))
    stopped, tokens = 0, []
    while engine.has_work:
        seq = next(iter(engine.running), None)
        if stopped < 3 and seq is not None and seq.reusing is not None and (seq.rerun is not None or seq.reusing.watch):
            stopped += 1
            for _ in range(stopped):
                tokens += [token for event in engine.step() for token in event.tokens]
            if seq in engine.running:
                engine._preempt(seq)
                engine.memory.check()
        tokens += [token for event in engine.step() for token in event.tokens]
    assert stopped and tokens == truth
    for steps in range(1, 12):
        engine = made()
        engine.add(joined("gone", order, SOME))
        for _ in range(steps):
            engine.step()
        engine.abort("gone")
        engine.memory.check()
        assert engine.memory.used() == 0


def test_blended_blocks_are_nobody_elses() -> None:
    made = warm()
    text_of(made, joined("new", NEW, SOME))
    again = joined("again", NEW)
    assert reported(made, again) == pytest.approx(plainly(), abs=1e-12)
    assert again.cached_tokens == 0, "not even the first chunk, which stood elsewhere"


def test_each_tenant_and_each_head_has_its_own_variants() -> None:
    made = warm()
    for name, salt, head in (("other", "two", HEAD), ("head", "", [*HEAD, 1])):
        new = joined(name, NEW, SOME, salt=salt)
        new.prompt = [*head, *new.prompt[len(HEAD) :]]
        new.chunks = [(first + len(head) - len(HEAD), end + len(head) - len(HEAD)) for first, end in new.chunks]
        text_of(made, new)
        assert new.reused_tokens == 0


def test_what_left_the_cache_is_learned_again() -> None:
    made = warm()
    made.table.forget()
    new = joined("new", NEW, SOME)
    assert reported(made, new) == pytest.approx(plainly(), abs=1e-12)
    assert new.reused_tokens == 0 and all(held[-1].source is new.prompt for held in variants(made))


def test_two_texts_of_one_request() -> None:
    made = warm()
    seen = identity.drive(made, [joined("new", NEW, SOME, GREEDY.but(n=2))], [0])
    assert seen.texts["new/0"] == seen.texts["new/1"] == text_of(warm(), joined("new", NEW, SOME))


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")
def test_natively_a_watched_prompt_has_the_bits_of_a_plain_one() -> None:
    llm = LLM("embedded", backend="native", dtype="bfloat16", draft="none", max_model_len=512, cache_memory=64 << 20, threads=1)
    chunks = ["    return 1\n\n\n" * 6, "class Shape:\n    area = 3\n" * 5, "import os\nimport sys\n" * 7]
    segments = ["def head():\n", *chunks, "def size(self):\n"]
    params = SamplingParams(temperature=0, max_tokens=8, logprobs=5)
    truth = llm.generate({"segments": segments}, params)[0]
    llm.engine.table.forget()
    found = llm.generate({"segments": segments}, params, reuse=SOME)[0]
    assert found.outputs[0].logprobs == truth.outputs[0].logprobs, "to the last bit"
    moved = llm.generate({"segments": [segments[0], *chunks[::-1], segments[4]]}, params, reuse=SOME)[0]
    assert moved.reused_tokens > 90 and 0 < moved.repaired_tokens < 90


def test_refusals() -> None:
    with pytest.raises(InvalidInput, match="cache-craft:alpha=-1"):
        identity.engine(max_model_len=LONGEST).add(joined("r", reuse="cache-craft:alpha=-1"))
