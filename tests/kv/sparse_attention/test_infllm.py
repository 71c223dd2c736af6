from __future__ import annotations

from collections.abc import Sequence as Seq
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redraft.card import Guarantee
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.core.spec import Attention, Rotary
from redraft.core.view import Far
from redraft.errors import InvalidInput, Unsupported
from redraft.kv.slots import Held
from redraft.kv.sparse_attention.infllm import Blocks, InfLLM, Reader
from redraft.ops.backend import WeightSums
from redraft.ops.torch_ops import TorchOps
from tests.contracts.identity import drive, engine, prompts
from tests.kv.quantization import compiled
from tests.kv.sparse_attention import SCENES as EVERY_SCENE
from tests.kv.sparse_attention import TREE, Scene, alone, register, texts

products = TorchOps().products
SCENES = {name: one for name, one in EVERY_SCENE.items() if name != "evicted"}  # no policy evicts beside it
METHODS = [
    InfLLM(tokens=110, local=40, sinks=6, block=32, representatives=3),
    InfLLM(tokens=100, local=30, sinks=0, block=64, representatives=64),
    InfLLM(tokens=300, local=20, sinks=4, block=32, representatives=1, cut=0.6),
]
ROTARY = Rotary(tuple(30.0 ** (-i / 3) for i in range(3)))  # two of eight channels do not turn
BITING = "infllm:tokens=50,local=16,sinks=2,block=32,representatives=2"


def opened(method: InfLLM, layers: int = 1) -> Blocks:
    return Blocks(method, (Attention(6, 2, 8, ROTARY),) * layers)


def turn(x: Tensor, by: float) -> Tensor:
    """x [8], rotated by complex numbers."""
    made = torch.complex(x[:3].double(), x[3:6].double()) * torch.polar(
        torch.ones(3).double(), by * torch.tensor(ROTARY.frequencies).double()
    )
    return torch.cat([made.real, made.imag, x[6:].double()])


def held_by(at: Scene) -> Held:
    """One layer, one lane for both heads."""

    def read(lane: int, first: int, end: int) -> tuple[np.ndarray, np.ndarray]:
        keys = at.keys[:, first:end].float().numpy()
        return keys, keys

    return Held(lambda: [np.arange(at.committed[0], dtype=np.int32)], read)


def masses(tokens: int) -> np.ndarray:
    """[heads, tokens]: attention that tokens got."""
    return np.random.default_rng(5).random((2, tokens))


def reader(method: InfLLM, at: Scene) -> Reader:
    own = opened(method)
    state, stored = own.begin(None), int(at.at[0]) // method.block * method.block  # type: ignore[arg-type]
    state.mass = masses(stored)[:, method.sinks :]
    own.border(state, SimpleNamespace(stored=stored), held_by(at), False)  # type: ignore[arg-type]
    return state


def chosen(method: InfLLM, at: Scene) -> Tensor:
    found: Tensor = reader(method, at).select(0, at.q, {}, at.seen, at.where, at.at, products)
    return found


def definition(method: InfLLM, at: Scene, head: int, row: int) -> list[int]:
    """The slots that a row reads, block by block."""
    mine, border = int(at.at[row]), int(at.at[0]) // method.block * method.block
    starts = [s for s in range(method.sinks, border, method.block) if s + method.block + method.local <= border]
    got, scores = masses(border), []
    for start in starts:
        total = torch.zeros((), dtype=torch.float64)
        for h in range(2):
            most = sorted(range(start, start + method.block), key=lambda j: (-got[h, j], j))[: method.representatives]
            mean = torch.stack([turn(at.keys[h, j].float(), -j) for j in most]).mean(0)
            for g in range(at.q.shape[1]):
                total += turn(at.q[h, g, row], method.local - mine) @ mean
        scores.append(float(total))
    order = sorted(range(len(starts)), key=lambda i: (-scores[i], i))
    count = (method.tokens - method.sinks - method.local) // method.block
    if method.cut < 1:
        shares = torch.tensor(scores, dtype=torch.float64).div(6 * 8**0.5).softmax(0)
        needed = next(i + 1 for i in range(len(order)) if float(shares[order[: i + 1]].sum()) >= method.cut)
        count = min(count, needed)
    blocks = {j for i in order[:count] for j in range(starts[i], starts[i] + method.block)}
    in_none = {p for p in range(mine + 1) if not any(s <= p < s + method.block for s in starts)}
    return [slot for slot in at.visible(head, row) if int(at.where[head, slot]) in blocks | in_none]


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reads_what_the_definition_reads(method: InfLLM, name: str) -> None:
    at = SCENES[name]
    read = chosen(method, at)
    assert read.shape == (2, 1, len(at.at), at.keys.shape[1])
    for head in range(2):
        for row in range(len(at.at)):
            assert torch.nonzero(read[head, 0, row]).flatten().tolist() == definition(method, at, head, row)
    assert not torch.equal(read[:, 0], at.seen), "a choice"


@pytest.mark.parametrize("row", range(2 + len(TREE)))
def test_a_node_reads_what_its_row_reads_without_drafts(row: int) -> None:
    tree, state = SCENES["tree"], reader(METHODS[0], SCENES["tree"])
    one = alone(tree, row)
    both = state.select(0, tree.q, {}, tree.seen, tree.where, tree.at, products)
    by_itself = state.select(0, one.q, {}, one.seen, one.where, one.at, products)
    for head in range(2):
        assert tree.positions(both, head, 0, row) == one.positions(by_itself, head, 0, 0)


def test_few_blocks_where_one_stands_out_and_more_where_none_does() -> None:
    method = METHODS[2]
    at = SCENES["decode"]
    state = reader(method, at)
    assert state.means is not None
    counts = []
    for means in (np.zeros_like(state.means), state.means * 50):
        state.means = means
        counts.append(int(state._chosen(0, at.q, at.at, products).sum()))
    blocks = state.count
    assert counts[0] == -(-6 * blocks // 10) and counts[1] == 1, "equal shares, then one block with all"


def steps(state: Reader, own: Blocks, weights: Any, cuts: Seq[int]) -> None:
    """Commits of these numbers of rows; of four rows and more, the last two come from a tree beside other nodes."""
    stored = 0
    for rows in cuts:
        drafted = 2 if rows > 3 else 0
        chain, slots = rows - drafted, stored + rows + 1
        sums, nodes = np.zeros((1, 1, 2, slots)), np.zeros((1, 3 if drafted else 0, 1, 2, slots))
        for r in range(chain):
            sums[0, 0, :, : stored + r + 1] += weights(stored + r)
        if drafted:  # nodes 0 and 2 are on the path, node 1 is not
            end = stored + chain
            first, second = weights(end), weights(end + 1)
            nodes[0, 0, 0, :, : end + 1] = first
            nodes[0, 1] = 99.0
            nodes[0, 2, 0, :, : end + 1], nodes[0, 2, 0, :, end + 2] = second[:, :-1], second[:, -1]
        stored += rows
        seq = SimpleNamespace(stored=stored, state={own: state})
        own.observe(seq, WeightSums(sums, nodes), chain, [0, 2] if drafted else [])  # type: ignore[arg-type]
        own.border(state, seq, held_by(SCENES["decode"]), False)  # type: ignore[arg-type]


def test_attention_is_added_up_in_any_steps() -> None:
    """Up to the border at which a block is sealed, whatever tokens came together."""
    own = opened(METHODS[0])
    rows = [np.random.default_rng(i).random((2, i + 1)) for i in range(256)]
    found = []
    for cuts in ([1] * 256, [32] * 8, [5, 27] * 8):
        state = own.begin(None)  # type: ignore[arg-type]
        steps(state, own, rows.__getitem__, cuts)
        found.append(state)
    assert found[0].count == (256 - 40 - 6) // 32 and found[0].mass.shape == (2, 256 - found[0].first)
    for one in found[1:]:
        assert one.count == found[0].count and np.allclose(one.mass, found[0].mass, atol=1e-12)
        assert np.array_equal(one.means, found[0].means)
    got = np.zeros((2, 256))
    for r, row in enumerate(rows[:96]):  # block 0 is tokens 6 to 37, sealed when 96 are stored
        got[:, : r + 1] += row
    most = np.argsort(-got[1, 6:38], kind="stable")[:3] + 6
    mean = torch.stack([turn(SCENES["decode"].keys[1, j].float(), -int(j)) for j in most]).mean(0)
    assert found[0].means is not None and np.allclose(found[0].means[0, 1, 0], mean.numpy(), atol=1e-5)


def test_a_fork_goes_its_own_way() -> None:
    own, at = opened(METHODS[0]), SCENES["decode"]
    state = reader(METHODS[0], at)
    child = own.fork(state, None)  # type: ignore[arg-type]
    before = state.mass.copy()
    child.watched(WeightSums(np.ones((1, 1, 2, 289)), np.zeros((1, 0, 1, 2, 289))), 289, [])
    assert np.array_equal(state.mass, before) and child.mass.shape[1] == before.shape[1] + 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 1279}, r"infllm:tokens=1279: must be 1280 or more, room for the first 128 tokens, the 1024 newest and a block"),
        ({"block": 40}, r"infllm:block=40: must be a multiple of 32"),
        ({"representatives": 129}, r"infllm:representatives=129: must be 128 or less, the tokens of a block"),
        ({"cut": 0.0}, r"infllm:cut=0\.0: must be above 0"),
        ({"local": 0}, r"infllm:local=0: must be 1 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        InfLLM(**options)


@pytest.mark.parametrize(
    ("policy", "message"),
    [
        ({"codec": "int4:block=32"}, "this codec encodes whole pages, and the sparse read needs the keys"),
        ({"keep": "snapkv"}, "the sparse read watches all slots of its text, and a keep policy removes some; choose one of the two"),
        ({"keep": "streaming-llm"}, "the keep policy and the sparse read both choose the distance of the first keys"),
    ],
)
def test_what_does_not_go_together_is_refused(policy: dict[str, str], message: str) -> None:
    with pytest.raises(Unsupported, match=message):
        engine().add(Request("r", [1, 2, 3], SamplingParams(read="infllm", **policy)))


def test_a_reused_context_is_refused() -> None:
    with pytest.raises(Unsupported, match="reuse pie: read=infllm acts on rows of the prompt"):
        engine().add(Request("r", [1, 2, 3], SamplingParams(read="infllm"), reuse="pie", before=[1, 2]))


def test_positions_may_exceed_the_trained_context() -> None:
    """No distance does. With a distance beyond the trained context they may not."""
    for read, length in (("infllm:tokens=50,local=16,sinks=2,block=32", 100), ("infllm:tokens=8000,local=4096", 44)):
        made = engine(max_model_len=64)
        request = Request("0", list(prompts()[0][:20]), SamplingParams(temperature=0, max_tokens=100, read=read))
        assert len(drive(made, [request], [0]).texts["0"]) == length


def test_rows_of_the_context_read_blocks_too() -> None:
    """The distance alone, without a choice, gives other log-probabilities of the prompt than both."""
    prompt = [token for one in prompts()[:6] for token in one][:200]
    found = []
    for read in (None, BITING, "infllm:tokens=1000,local=16,sinks=2,block=32"):
        request = Request("0", list(prompt), SamplingParams(max_tokens=1, prompt_logprobs=0, temperature=0, read=read))
        drive(engine(max_model_len=256, pool=80), [request], [0])
        found.append([one.logprob for one in request.prompt_logprobs if one])
    plain, both, far = (np.array(one) for one in found)
    assert np.array_equal(plain[:15], far[:15]) and np.array_equal(far[:90], both[:90])
    assert not np.array_equal(plain[15:60], far[15:60]) and not np.array_equal(far[100:], both[100:])


def test_the_text_is_the_same_however_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    full, sparse = texts("none").texts["0"], texts(BITING).texts["0"]
    assert texts("infllm:tokens=1000,local=256").texts["0"] == full
    assert sparse != full
    drafted = texts(BITING, drafts=True)
    assert drafted.texts["0"] == sparse and drafted.accepted > 10 and drafted.rejected > 10
    assert texts(BITING, chunk=5).texts["0"] == sparse
    crowd = texts(BITING, many=4, pool=12)
    assert crowd.texts["0"] == sparse and crowd.preempted
    assert InfLLM.card.guarantee is Guarantee.LOSSY and opened(METHODS[0]).far == Far(40, 40)


@pytest.mark.parametrize("read", [BITING, f"{BITING},cut=0.5"])
def test_a_text_has_the_same_bits_in_any_batch(read: str) -> None:
    compiled.same_in_any_batch(read, seam="read")
