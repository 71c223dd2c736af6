"""KVShare: which spans are found, which rows run again before and after the first new token, and that all of them give computed bits."""

from __future__ import annotations

from random import Random
from typing import Any

import numpy as np
import pytest

from redraft import LLM
from redraft.config import SamplingParams
from redraft.core.sequence import Request, Wants
from redraft.engine.engine import Engine
from redraft.engine.output import Progress, Stats, checked
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.prefix import PrefixTree
from redraft.kv.reuse.kvshare import KVShare, Sharing
from redraft.kv.reuse.reuse import Later, Pass, Spliced
from redraft.kv.spans import SpanIndex
from redraft.ops import library
from tests.contracts import identity, plain
from tests.kv.reuse.joined import joined, reported, text_of

GREEDY = SamplingParams(temperature=0, max_tokens=10, seed=1, logprobs=5)
SAMPLED = GREEDY.but(max_tokens=14, temperature=1.0)
DICE = Random(11)
OLD = [DICE.randrange(plain.VOCAB) for _ in range(300)]
NEW = [*OLD[:50], *OLD[120:290], 3, 1, 4, 1, 5]  # trimmed in the middle
LONGEST = 400
SOME = "kvshare:ratio=0.4,spread=0.5,later=6,every=2,window=4"
ALL = "kvshare:ratio=1,spread=-100"


def request(name: str, tokens: list[int], reuse: str = "", params: SamplingParams = GREEDY, **more: Any) -> Request:
    return Request(name, list(tokens), params, reuse=reuse, **more)


def engine(**options: Any) -> Engine:
    """One that has the old text in its cache."""
    made = identity.engine(**{"max_model_len": LONGEST, **options})
    text_of(made, request("old", OLD))
    return made


def plainly(tokens: list[int] = NEW, **options: Any) -> list[float]:
    return reported(identity.engine(max_model_len=LONGEST, sharing=False, **options), request("plain", tokens))


def opened(method: KVShare) -> Sharing:
    return Sharing(method, SpanIndex.of(PrefixTree(32)))


def test_rows_that_are_wrong_and_attended_run_again() -> None:
    """Six reused rows from 10 on, then a prompt of 20 tokens: row 12 is wrong and attended at once, row 14 only by a new token."""
    method, asked = KVShare(ratio=0.5, spread=1, check=2, window=3, later=4, every=2), 0
    rows, away = np.arange(10, 16, dtype=np.int32), np.array([1.0, 0, 9, 0, 9, 1])

    def read(layer: int) -> tuple[Any, Any]:
        nonlocal asked
        asked += 1
        assert layer == 2
        values = np.zeros((2, 6, 4), np.float32) if asked == 1 else np.tile(away[:, None], (2, 1, 4)).astype(np.float32)
        return values, values

    def seen(*attended: int, rows: int = 1) -> Any:
        found = np.full((1, rows, 3, 2, 19), 0.01)
        found[..., list(attended)] = 0.4
        return found

    steps = opened(method).repair(Spliced(rows, 6, read, request("r", list(range(20)))))
    first = next(steps)
    assert isinstance(first, Pass) and first.layers == 3 and first.rows.tolist() == list(range(10, 16)) and not first.watch
    assert steps.send(None) == Later(19), "of the three rows that ask, and before the last token of the prompt"
    asking = steps.send(None)
    assert isinstance(asking, Pass) and asking.rows.tolist() == [16, 17, 18] and asking.watch[0].each
    repaired = steps.send(seen(12, 13, rows=3))
    assert isinstance(repaired, Pass) and repaired.rows.tolist() == [12, 16, 17, 18] and repaired.layers is None
    later = steps.send(None)
    assert isinstance(later, Later) and later.at == 21 and later.watch
    assert [*steps.send(seen(12, rows=2)).rows] == [], "12 is right by now"
    assert steps.send(None).at == 23
    assert [*steps.send(seen(12, 14)).rows] == [14]
    with pytest.raises(StopIteration):
        steps.send(None)


def test_nothing_runs_again_without_hits_or_at_ratio_0() -> None:
    none, some = np.zeros(0, np.int32), np.arange(4, dtype=np.int32)
    for method, rows in ((KVShare(), none), (KVShare(ratio=0), some), (KVShare(ratio=0.2), some)):
        assert list(opened(method).repair(Spliced(rows, 6, lambda layer: (None, None), request("r", [1] * 9)))) == []


def test_what_is_found() -> None:
    made = engine()
    new = request("new", NEW, SOME)
    text_of(made, new)
    assert (new.cached_tokens, new.reused_tokens) == (32, 50 - 32 + 168)
    assert [(span.at, span.first, span.length, span.exact) for span in new.spans] == [(32, 32, 18, True), (50, 120, 168, False)]


def test_a_prompt_of_which_little_is_found_is_computed_for_later_ones() -> None:
    made, strange = engine(), [(7 * i) % plain.VOCAB for i in range(200)]
    one = request("one", [*strange, *OLD[120:290]], SOME)
    text_of(made, one)
    two = request("two", [1, 2, *strange, *OLD[120:290]], SOME)
    text_of(made, two)
    assert one.reused_tokens == 0 and two.reused_tokens > 300
    text_of(made, some := request("some", [*strange[::-1], *OLD[120:290]], SOME + ",least=0.4"))
    assert some.reused_tokens > 160


def test_nothing_found_changes_nothing() -> None:
    new = request("new", [1, *OLD[::-1]], SOME)
    assert reported(engine(), new) == plainly(new.prompt), "to the last bit"
    assert not new.reused_tokens and not new.repair_rows


def test_a_prefix_is_the_prefix_cache() -> None:
    """Its last page, which agrees in part, too. Such pages are shared on."""
    new, made = request("new", OLD[:90], SOME), engine()
    assert reported(made, new) == pytest.approx(plainly(new.prompt), abs=1e-12)
    assert (new.cached_tokens, new.reused_tokens, new.repair_rows) == (64, 25, 0)
    assert made.memory.match([*new.prompt, *new.sequences[0].tokens[90:], 0], "") == 96


@pytest.mark.parametrize("backend", ["torch", "reference", "numpy"])
def test_all_rows_are_the_computed_prompt(backend: str) -> None:
    tokens = [*OLD[:40], *OLD[100:200], 3, 1, 4] if backend == "reference" else NEW
    new = request("new", tokens, ALL)
    assert reported(engine(backend=backend), new) == pytest.approx(plainly(tokens, backend=backend), abs=1e-10)
    assert new.reused_tokens > 80 and new.repaired_tokens > 80


def test_one_layer_is_exact() -> None:
    new = request("new", NEW, "kvshare:ratio=0,check=0")
    assert reported(engine(layers=1), new) == pytest.approx(plainly(layers=1), abs=1e-10)


def test_new_tokens_let_rows_run_again() -> None:
    def repaired(reuse: str) -> float:
        reported(engine(), one := request("new", NEW, reuse))
        return one.repair_rows

    assert repaired(SOME) > repaired(SOME.replace("later=6", "later=0")) > 170 / 2, "and each counts"


def test_the_paper_s_parts_matter() -> None:
    """Nothing, a part and all of the rows: nearer and nearer to the computed prompt."""
    truth = np.array(plainly(layers=4))
    found = [
        np.abs(np.array(reported(engine(layers=4), request("new", NEW, f"kvshare:later=0,window=4,{options}")))[:5] - truth[:5]).mean()
        for options in ("ratio=0", "ratio=0.5,spread=0", "ratio=1,spread=-100")
    ]
    assert found[0] > found[1] > found[2] and found[2] < 1e-9, found


def test_steps_drafts_batches_and_preemption_change_nothing() -> None:
    alone = text_of(engine(layers=4), request("new", NEW, SOME, SAMPLED))
    assert alone != text_of(engine(layers=4), request("new", NEW, params=SAMPLED)), "the reuse is seen"
    for drafter, chunk, pool in (("none", 8, 60), ("random", 24, 60), ("token-recycling", 512, 60), ("none", 33, 22)):
        made = engine(layers=4, drafter=identity.drafter(drafter, {}), chunk=chunk, pool=pool)
        others = [request(f"o{i}", OLD[first : first + 60], reuse) for i, (first, reuse) in enumerate([(7, ""), (90, SOME), (160, "")])]
        seen = identity.drive(made, [request("new", NEW, SOME, SAMPLED), *others], [0, 0, 1, 3])
        assert pool < 60 or seen.texts["new"] == alone, (drafter, chunk)


@pytest.mark.parametrize("when", ["rerun", "until"])
def test_preempted_at_any_time(when: str) -> None:
    """The text starts again with the spans of the first time, and decides the same."""
    truth = text_of(engine(layers=4), request("new", NEW, SOME, SAMPLED))
    made = engine(chunk=16, layers=4)
    made.add(request("new", NEW, SOME, SAMPLED))
    stopped, tokens, last = 0, [], -1
    while made.has_work:
        seq = next((one for one in made.running), None)
        if seq is not None and seq.reusing is not None and stopped < 4:
            waits = seq.rerun is not None if when == "rerun" else seq.reusing.until is not None and seq.generated > max(last, 0)
            if waits:
                stopped, last = stopped + 1, seq.generated
                made._preempt(seq)
                text_of_other = request(f"other {stopped}", [*OLD[120 : 200 + stopped], *OLD[:40]])
                made.add(text_of_other)  # its spans are published meanwhile
                made.memory.check()
        tokens += [token for event in made.step() for token in event.tokens if event.request.id == "new"]
    assert stopped > 1 and tokens == truth
    assert made.memory.used() == 0


def test_an_abort_at_any_time_leaks_nothing() -> None:
    for steps in range(2, 30, 3):
        made = engine(chunk=24)
        made.add(request("new", NEW, SOME))
        for _ in range(steps):
            made.step()
        made.abort("new")
        made.memory.check()
        assert made.memory.used() == 0


def test_blended_blocks_are_nobody_elses() -> None:
    made = engine()
    text_of(made, request("new", NEW, SOME))
    again = request("again", NEW)
    assert reported(made, again) == pytest.approx(plainly(), abs=1e-12)
    assert again.cached_tokens == 32


def test_a_tenant_never_finds_another_one_s_text() -> None:
    made = identity.engine(max_model_len=LONGEST)
    text_of(made, request("old", OLD, salt="one"))
    for salt, found in (("two", 0), ("", 0), ("one", 186)):
        new = request("new", NEW, SOME, salt=salt)
        text_of(made, new)
        assert new.reused_tokens == found


def test_segments_are_spans() -> None:
    made = identity.engine(max_model_len=LONGEST)
    new = joined("new", reuse=ALL)
    assert reported(made, new) == pytest.approx(reported(identity.engine(max_model_len=LONGEST, sharing=False), joined("plain")), abs=1e-10)
    assert new.reused_tokens > 80


def test_texts_of_one_request() -> None:
    once = SOME.replace("later=6", "later=0")
    made = engine()
    seen = identity.drive(made, [request("new", NEW, once, GREEDY.but(n=2))], [0])
    assert seen.texts["new/0"] == seen.texts["new/1"] == text_of(engine(), request("new", NEW, once))
    with pytest.raises(Unsupported, match=r"^reuse kvshare:.*: n = 2, but texts of one request share pages"):
        made.add(request("two", NEW, SOME, GREEDY.but(n=2)))


def test_a_text_that_moves_while_it_is_repaired_is_computed_again() -> None:
    made = engine()
    made.add(request("new", NEW, SOME), parks=True)
    while not made.ready():
        made.step()
    assert made.release("new").stored == [None]
    made.forget("new")
    made.memory.check()


def test_a_text_that_goes_on_behind_its_prompt() -> None:
    """The prefix cache has its prompt and new tokens that it has already."""
    made = engine()
    made.add(request("new", OLD[:90], SOME, GREEDY.but(max_tokens=60)), [Progress(OLD[90:140], Stats())])
    while made.has_work:
        checked(made.step())
    made.memory.check()


def test_rows_that_may_run_again_have_no_log_probabilities() -> None:
    made = identity.engine(max_model_len=LONGEST)
    one = joined("r", reuse=SOME)
    end = one.chunks[-1][1]
    one.wants = Wants(prompt_logprobs=1, logprobs_of=[end + 1])
    with pytest.raises(Unsupported, match="prompt_logprobs need the whole prompt computed"):
        made.add(one)


@pytest.mark.skipif(library.load() is None, reason="no compiled kernels here")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_natively_all_rows_have_the_bits_of_the_computed_prompt(dtype: str) -> None:
    llm = LLM("embedded", backend="native", dtype=dtype, draft="none", max_model_len=512, cache_memory=64 << 20, threads=1)
    old = llm.tokenizer.encode("def area(self):\n    return self.width * self.height\n\n\nclass Shape:\n    def name(self):\n" * 8)
    new = {"prompt_token_ids": [*old[:20], *old[60:], *old[5:9]]}
    truth = llm.generate(new, temperature=0, max_tokens=12, logprobs=5)[0]
    llm.engine.table.forget()
    llm.generate({"prompt_token_ids": old}, temperature=0, max_tokens=1)
    found = llm.generate(new, temperature=0, max_tokens=12, logprobs=5, reuse=ALL)[0]
    assert found.outputs[0].token_ids == truth.outputs[0].token_ids
    assert found.outputs[0].logprobs == truth.outputs[0].logprobs, "to the last bit"
    assert found.repaired_tokens and found.reused_tokens > 100
    text = llm.tokenizer.decode(old)
    many = llm.generate([text[:300] + "x = 1\n" + text[400:], new["prompt_token_ids"]], temperature=0, max_tokens=1, reuse="kvshare")
    assert all(one.error is None and one.reused_tokens for one in many)


def test_refusals() -> None:
    for text, message in (("ratio=1.5", "must be at most 1|0 to 1"), ("window=0", "1 or more|1 to 256"), ("every=0", "1 or more")):
        with pytest.raises(InvalidInput, match=message):
            identity.engine().add(request("r", [1, 2], f"kvshare:{text}"))
    with pytest.raises(Unsupported, match=r"kvshare:check=2: the model has layers 0 to 1"):
        identity.engine().add(request("r", [1, 2], "kvshare:check=2"))
