from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from redraft import LLM
from redraft.card import Guarantee
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.core.spec import Attention, Rotary
from redraft.core.view import Far
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.kv.sparse_attention.a2ats import A2ATS, Codebooks, Coded, Reader, codebook, nearest
from redraft.models.trained import Trained
from redraft.ops.arrays import turned
from redraft.ops.torch_ops import TorchOps
from tests.contracts import trained
from tests.contracts.identity import drive, engine, prompts
from tests.kv.quantization import compiled
from tests.kv.sparse_attention import SCENES, TREE, Scene, alone, held_by, register, scene, texts

products = TorchOps().products
METHODS = [A2ATS(60, window=40, distance=50, sinks=2), A2ATS(80, window=32, distance=90, sinks=0)]
ROTARY = Rotary(tuple(30.0 ** (-i / 3) for i in range(3)))  # two of eight channels do not turn


def books(distance: int) -> Codebooks:
    dice = np.random.default_rng(6)
    factors = np.tril(dice.standard_normal((1, 2, 8, 8)).astype(np.float32)) + 3 * np.eye(8, dtype=np.float32)
    return Codebooks(factors, dice.standard_normal((1, 2, 11, 8)).astype(np.float32), distance, "", 1, 1)


def opened(method: A2ATS) -> Coded:
    return Coded(method, books(method.distance), (Attention(6, 2, 8, ROTARY),))


def reader(method: A2ATS, at: Scene) -> Reader:
    own = opened(method)
    state = own.begin(None)  # type: ignore[arg-type]
    own.border(state, SimpleNamespace(stored=int(at.at[0])), held_by(at), False)  # type: ignore[arg-type]
    return state


def definition(method: A2ATS, at: Scene, head: int, group: int, row: int) -> list[int]:
    """The slots that a row reads: codes by the quadratic form, then the best products."""
    made, mine, coded = books(method.distance), int(at.at[row]), int(at.at[0]) // 32 * 32
    a, vectors = (x[0, head].astype(np.float64) for x in (made.factors, made.vectors))
    probe = turned(at.q[head, group, row].numpy(), ROTARY.frequencies, np.array(method.distance - mine))
    always, others = [], []
    for slot in at.visible(head, row):
        position = int(at.where[head, slot])
        if position < method.sinks or mine - position < method.window or position >= coded:
            always.append(slot)
            continue
        key = turned(at.keys[head, slot].float().numpy().astype(np.float64), ROTARY.frequencies, np.array(-position))
        apart = key - vectors
        code = int(np.einsum("cd,de,ce->c", apart, a @ a.T, apart).argmin())
        others.append((-float(probe @ vectors[code]), slot))
    return sorted(always + [slot for _, slot in sorted(others)[: method.tokens - len(always)]])


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reads_what_the_definition_reads(method: A2ATS, name: str) -> None:
    at = SCENES[name]
    read: Tensor = reader(method, at).select(0, at.q, {}, at.seen, at.where, at.at, products)
    assert read.shape == (*at.q.shape[:3], at.keys.shape[1])
    for head in range(len(at.keys)):
        for group in range(at.q.shape[1]):
            for row in range(len(at.at)):
                assert torch.nonzero(read[head, group, row]).flatten().tolist() == definition(method, at, head, group, row)
    assert not torch.equal(read[:, 0], at.seen), "a choice"


@pytest.mark.parametrize("row", range(2 + len(TREE)))
def test_a_node_reads_what_its_row_reads_without_drafts(row: int) -> None:
    tree, state = SCENES["tree"], reader(METHODS[0], SCENES["tree"])
    one = alone(tree, row)
    both = state.select(0, tree.q, {}, tree.seen, tree.where, tree.at, products)
    by_itself = state.select(0, one.q, {}, one.seen, one.where, one.at, products)
    for head in range(2):
        for group in range(3):
            assert tree.positions(both, head, group, row) == one.positions(by_itself, head, group, 0)


def test_a_state_that_followed_a_text_is_one_that_was_made_at_once() -> None:
    at, own = SCENES["decode"], opened(METHODS[0])
    grown, at_once = own.begin(None), own.begin(None)  # type: ignore[arg-type]
    for stored in range(90, 301):
        own.border(grown, SimpleNamespace(stored=stored), held_by(at), False)  # type: ignore[arg-type]
    own.border(at_once, SimpleNamespace(stored=300), held_by(at), False)  # type: ignore[arg-type]
    assert np.array_equal(grown.codes, at_once.codes) and grown.codes.shape == (1, 2, 288) and len(np.unique(grown.codes)) > 5
    child = own.fork(grown, None)  # type: ignore[arg-type]
    child.follow(320, held_by(scene(0, [list(range(330))] * 2, 330)), 288)
    assert grown.codes.shape[2] == 288 and np.array_equal(child.codes[..., :288], grown.codes)


def test_an_eviction_gives_all_codes_anew() -> None:
    own, at = opened(METHODS[0]), SCENES["evicted"]
    state, seq = own.begin(None), SimpleNamespace(stored=256)  # type: ignore[arg-type]
    own.border(state, seq, held_by(SCENES["decode"]), False)  # type: ignore[arg-type]
    own.border(state, seq, held_by(at), True)  # type: ignore[arg-type]
    anew = own.begin(None)  # type: ignore[arg-type]
    own.border(anew, seq, held_by(at), False)  # type: ignore[arg-type]
    assert np.array_equal(state.codes, anew.codes)


def test_a_code_does_not_depend_on_the_position() -> None:
    state, keys = reader(METHODS[0], SCENES["decode"]), np.random.default_rng(1).standard_normal((20, 8))
    found = []
    for shift in (0, 1000):
        positions = np.arange(20, dtype=np.int32) + shift
        found.append(state._coded(0, 1, turned(keys, ROTARY.frequencies, positions).astype(np.float32), positions).tolist())
    assert found[0] == found[1] and len(set(found[0])) > 3


def test_the_codebook_lessens_the_error_of_scores() -> None:
    """Queries lie along one direction: the codebook follows it, and one for equal directions does not."""
    dice = np.random.default_rng(3)
    keys, queries = dice.standard_normal((600, 6)), dice.standard_normal((500, 6)) * [5, 0.1, 0.1, 0.1, 0.1, 0.1]
    error = {}
    for name, moment in (("aware", queries.T @ queries / 500), ("plain", np.eye(6))):
        a, vectors = codebook(moment, keys, codes=12)
        owner = nearest(keys @ a @ (vectors @ a).T, vectors @ a)
        assert np.array_equal(owner, [np.einsum("cd,de,ce->c", k - vectors, a @ a.T, k - vectors).argmin() for k in keys])
        error[name] = ((queries @ (keys - vectors[owner]).T) ** 2).mean()
        if name == "plain":
            assert np.allclose(a, np.eye(6), atol=1e-3), "plain vector quantization"
    assert error["aware"] < 0.3 * error["plain"]


def test_a_calibration_is_saved_and_belongs_to_its_model_and_distance(tmp_path: Path) -> None:
    llm = LLM("embedded", dtype="float32", draft="none", threads=1)
    ids = llm.tokenizer.encode("def area(width, height):\n    return width * height\n\n" * 30)
    made = A2ATS(distance=100).calibrate(llm.runner, [ids, ids[:50]], 2)
    path = made.save(tmp_path / "books.safetensors")
    again = Codebooks.load(path)
    assert np.array_equal(again.vectors, made.vectors) and (again.distance, again.texts, again.tokens) == (100, 2, made.tokens)
    layers, heads, size = len(llm.spec.attention), llm.spec.kv_heads, llm.spec.head_dim
    assert made.factors.shape == (layers, heads, size, size) and made.vectors.shape == (layers, heads, 256, size)
    assert A2ATS(distance=100, profile=path).open(llm.runner).far == Far(64, 100)
    with pytest.raises(InvalidInput, match=r"a2ats:distance=2048: .* was made for distance 100"):
        A2ATS(profile=path).open(llm.runner)
    with pytest.raises(InvalidInput, match="was made for the model with hash"):
        A2ATS(distance=40, profile=trained.codebooks(4)).open(llm.runner)
    with pytest.raises(InvalidInput, match=r"a2ats: no profile .*redraft calibrate .* --method a2ats --texts FILE"):
        A2ATS(profile=tmp_path / "none").open(llm.runner)
    with pytest.raises(InvalidInput, match="a2ats: 0 pieces of text and samples = 256"):
        A2ATS().calibrate(llm.runner, [])
    lacking = Trained("a2ats", "", {}, {"factors": made.factors}).save(tmp_path / "lacking.safetensors")
    with pytest.raises(CheckpointError, match="not a complete file of a2ats"):
        Codebooks.load(lacking)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tokens": 68}, r"a2ats:tokens=68: must be 69 or more, room for the first 4 tokens, the 64 newest and one to choose"),
        ({"window": 31}, r"a2ats:window=31: must be 32 or more"),
        ({"distance": 0}, r"a2ats:distance=0: must be 1 to 1048576"),
        ({"sinks": -1}, r"a2ats:sinks=-1: must be 0 or more"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        A2ATS(**options)


def biting(layers: int, options: str = "tokens=44,window=32,sinks=1") -> str:
    return f"a2ats:{options},distance=40,profile={trained.codebooks(layers)}"


def test_what_does_not_go_together_is_refused() -> None:
    made, read = engine(layers=4), biting(4)
    for policy, message in (
        ({"codec": "int4:block=32"}, "this codec encodes whole pages, and the sparse read needs the keys"),
        ({"keep": "streaming-llm"}, "the keep policy and the sparse read both choose the distance of the first keys"),
    ):
        with pytest.raises(Unsupported, match=message):
            made.add(Request("r", [1, 2, 3], SamplingParams(read=read, **policy)))


def test_codes_of_what_an_eviction_left() -> None:
    """The same text with any chunk; an eviction may come between two borders."""
    prompt = [token for one in prompts()[:4] for token in one][:100]
    found = []
    for chunk, backend in ((1, "torch"), (17, "numpy"), (512, "torch")):
        keep = "snapkv:budget=0.8,window=4,pool=3,sinks=1,drop=20"
        request = Request("0", list(prompt), SamplingParams(temperature=0, max_tokens=60, keep=keep, read=biting(4)))
        found.append(drive(engine(layers=4, backend=backend, chunk=chunk, max_model_len=256), [request], [0]).texts["0"])
    assert found[0] == found[1] == found[2]


def test_the_text_is_the_same_however_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    layers = len(engine().runner.spec.layers)
    read, every = biting(layers), biting(layers, "tokens=300,window=32")
    full, far, sparse = texts("none").texts["0"], texts(every).texts["0"], texts(read).texts["0"]
    assert texts(biting(layers, "tokens=300,window=256")).texts["0"] == full
    assert full != far != sparse != full
    drafted = texts(read, drafts=True)
    assert drafted.texts["0"] == sparse and drafted.accepted > 10 and drafted.rejected > 10
    assert texts(read, chunk=5).texts["0"] == sparse
    crowd = texts(read, many=4, pool=12)
    assert crowd.texts["0"] == sparse and crowd.preempted
    assert A2ATS.card.guarantee is Guarantee.LOSSY


def test_a_text_has_the_same_bits_in_any_batch() -> None:
    llm = LLM("embedded", draft="none", threads=1)
    policy = trained.fitted({"read": biting(4)}, llm.runner)
    compiled.same_in_any_batch(policy["read"], seam="read")
