from __future__ import annotations

from collections.abc import Sequence as Seq
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import Tensor

from redraft.card import Guarantee
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.sparse_attention.sentence_kv import Reader, SentenceKV, Sentences, ends
from redraft.ops.torch_ops import TorchOps
from tests.contracts.identity import drive, engine, prompts
from tests.kv.sparse_attention import LONG, SCENES, TREE, Scene, alone, held_by, register, scene, texts

products = TorchOps().products
STOP = 7  # the id of a token that ends a sentence
METHODS = [SentenceKV(96, start=4, recent=8, longest=16), SentenceKV(72, start=0, recent=40, longest=10)]
WORDS = [STOP if i % 23 in (0, 9) else 1 for i in range(400)]  # sentences of 9 and of 14 tokens, or less if they are cut


def opened(method: SentenceKV, layers: int = 1, heads: int = 2) -> Sentences:
    return Sentences(method, frozenset({STOP}), layers, heads)


def lane(at: Scene, head: int) -> list[int]:
    return at.where[head, : at.committed[head]].tolist()


def reader(method: SentenceKV, at: Scene, tokens: Seq[int] = WORDS) -> Reader:
    own, state = opened(method), None
    state = own.begin(None)
    stored = int(at.at[0])
    own.border(state, SimpleNamespace(stored=stored, tokens=list(tokens[: stored + 1])), held_by(at), False)
    return state


def chosen(method: SentenceKV, at: Scene) -> Tensor:
    return reader(method, at).select(0, at.q, {}, at.seen, at.where, at.at, products)


def sentences(tokens: Seq[int], longest: int) -> list[list[int]]:
    """The positions of finished sentences."""
    found, open_one = [], []
    for i, token in enumerate(tokens):
        open_one.append(i)
        if token == STOP or len(open_one) == longest:
            found.append(open_one)
            open_one = []
    return found


def definition(method: SentenceKV, at: Scene, head: int, group: int, row: int) -> list[int]:
    """The slots that a row reads, by going through sentences in order of their products."""
    mine = int(at.at[row])
    stored = int(at.at[0]) // 32 * 32
    place = {int(at.where[head, slot]): slot for slot in at.visible(head, row)}
    held, lines = lane(at, head), sentences(WORDS[:stored], method.longest)
    finished = {position for line in lines for position in line}
    read = {p for p in place if p < method.start or mine - p < method.recent or p not in finished}
    scores = {}
    for i, line in enumerate(lines):
        own = [held.index(p) for p in line if p in held]
        mean = at.keys[head, own].float().double().mean(0).float().double() if own else torch.zeros(at.keys.shape[-1])
        scores[i] = float(at.q[head, group, row] @ mean.double())
    for i in sorted(scores, key=lambda i: (-scores[i], i)):
        for position in lines[i]:
            if position in place and position not in read and len(read) < method.tokens:
                read.add(position)
    return sorted(place[p] for p in read)


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reads_what_the_definition_reads(method: SentenceKV, name: str) -> None:
    at = SCENES[name]
    read = chosen(method, at)
    assert read.shape == (*at.q.shape[:3], at.keys.shape[1])
    for head in range(len(at.keys)):
        for group in range(at.q.shape[1]):
            for row in range(len(at.at)):
                assert torch.nonzero(read[head, group, row]).flatten().tolist() == definition(method, at, head, group, row)
    assert int(read.sum(-1).max()) <= method.tokens
    assert not torch.equal(read[:, 0], at.seen), "a choice"


@pytest.mark.parametrize("row", range(2 + len(TREE)))
def test_a_node_reads_what_its_row_reads_without_drafts(row: int) -> None:
    tree, method = SCENES["tree"], METHODS[0]
    one = alone(tree, row)
    state = reader(method, tree)
    both = state.select(0, tree.q, {}, tree.seen, tree.where, tree.at, products)
    by_itself = state.select(0, one.q, {}, one.seen, one.where, one.at, products)
    for head in range(2):
        for group in range(3):
            assert tree.positions(both, head, group, row) == one.positions(by_itself, head, group, 0)


def test_a_token_is_in_one_sentence_and_sentences_have_a_longest() -> None:
    state = reader(METHODS[0], SCENES["decode"])
    lines = sentences(WORDS[:288], 16)
    assert state.owner.tolist() == [i for i, line in enumerate(lines) for _ in line]
    assert max(map(len, lines)) <= 16 and {len(line) for line in lines} >= {9, 14}
    assert len(sentences([1] * 40, 16)) == 2


def test_a_state_that_followed_a_text_is_one_that_was_made_at_once() -> None:
    """Also in another engine, which has the text's slots but not its past. Only the keys of new sentences are read."""
    at, own, calls = SCENES["decode"], opened(METHODS[0]), []
    grown, at_once = own.begin(None), own.begin(None)
    for stored in range(100, 301):
        seq = SimpleNamespace(stored=stored, tokens=WORDS[:stored])
        own.border(grown, seq, held_by(at, calls), False)
    own.border(at_once, seq, held_by(at), False)
    assert len(calls) == 2 * 7, "two heads, borders 96, 128, ... 288"
    assert [first for head, first, _ in calls if head == 0] == sorted(first for head, first, _ in calls if head == 0)
    assert calls[-1][1] > 240
    assert np.array_equal(grown.owner, at_once.owner) and np.array_equal(grown.means, at_once.means)
    child = own.fork(grown, None)
    own.border(child, SimpleNamespace(stored=330, tokens=WORDS[:330]), held_by(at), False)
    assert len(child.owner) > len(grown.owner), "a fork goes its own way"


def test_an_eviction_changes_the_means() -> None:
    whole, left = SCENES["decode"], scene(0, [LONG[::2], LONG[::2]], 300)
    own = opened(METHODS[0])
    state, seq = own.begin(None), SimpleNamespace(stored=300, tokens=WORDS[:300])
    own.border(state, seq, held_by(whole), False)
    before = state.means
    own.border(state, seq, held_by(left), False)
    assert state.means is before, "nothing new at this border"
    own.border(state, seq, held_by(left), True)
    anew = own.begin(None)
    own.border(anew, seq, held_by(left), False)
    assert np.array_equal(state.means, anew.means) and not np.array_equal(state.means, before)


def test_tokens_that_end_a_sentence() -> None:
    words = ["a", ".", " etc.", '."', ".\n", "\n\n", "\n", "3.5", "?", " !)", "\u3002", "e.g", "", "..."]
    tokenizer = SimpleNamespace(bytes_of=lambda token: words[token].encode())
    assert [words[token] for token in sorted(ends(tokenizer, len(words)))] == [  # type: ignore[arg-type]
        ".", " etc.", '."', ".\n", "\n\n", "\n", "?", " !)", "\u3002", "...",
    ]  # fmt: skip


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"start": -1}, r"sentencekv:start=-1: must be 0 or more"),
        ({"recent": 0}, r"sentencekv:recent=0: must be 1 or more"),
        ({"longest": 0}, r"sentencekv:longest=0: must be 1 or more"),
        ({"tokens": 128}, r"sentencekv:tokens=128: must be 129 or more, room for the first 32 tokens, the newest, an unfinished sentence"),
        ({"tokens": 60, "start": 0, "longest": 8, "recent": 60}, r"sentencekv:tokens=60: must be 61 or more"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        SentenceKV(**options)


def test_a_codec_of_whole_pages_is_refused() -> None:
    params = SamplingParams(read="sentencekv:tokens=129", codec="int4:block=32")
    with pytest.raises(
        Unsupported, match="codec=int4:block=32, read=sentencekv:tokens=129: this codec encodes whole pages, and the sparse"
    ):
        engine().add(Request("r", [1, 2, 3], params))


@pytest.mark.parametrize("keep", ["streaming-llm:sinks=2,recent=70", "snapkv:budget=0.8,window=4,pool=3,sinks=1"])
def test_sentences_of_what_an_eviction_left(keep: str) -> None:
    """The same text with any chunk; an eviction may come between two borders."""
    prompt = [token for one in prompts()[:4] for token in one][:100]
    read = "sentencekv:tokens=48,start=2,recent=4,longest=8"
    found = []
    for chunk, backend in ((1, "torch"), (17, "numpy"), (512, "torch")):
        request = Request("0", list(prompt), SamplingParams(temperature=0, max_tokens=60, keep=keep, read=read))
        found.append(drive(engine(backend=backend, chunk=chunk, max_model_len=256), [request], [0]).texts["0"])
    assert found[0] == found[1] == found[2]


def test_an_eviction_may_leave_no_slot_of_any_sentence() -> None:
    prompt = [token for one in prompts()[:4] for token in one][:64]
    params = SamplingParams(
        temperature=0, max_tokens=90, keep="ems:budget=8,window=4,similar=1", read="sentencekv:tokens=48,start=2,longest=8"
    )
    assert len(drive(engine(max_model_len=256), [Request("0", prompt, params)], [0]).texts["0"]) == 90


def test_the_text_is_the_same_however_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    read = "sentencekv:tokens=48,start=2,recent=4,longest=8"
    full, sparse = texts("none").texts["0"], texts(read).texts["0"]
    assert texts("sentencekv:tokens=160").texts["0"] == full
    assert sparse != full
    drafted = texts(read, drafts=True)
    assert drafted.texts["0"] == sparse and drafted.accepted > 10 and drafted.rejected > 10
    assert texts(read, chunk=5).texts["0"] == sparse
    crowd = texts(read, many=4, pool=12)
    assert crowd.texts["0"] == sparse and crowd.preempted
    assert SentenceKV.card.guarantee is Guarantee.LOSSY
