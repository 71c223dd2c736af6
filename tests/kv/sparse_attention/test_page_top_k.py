import math

import pytest
import torch
from torch import Tensor

from redraft.card import Guarantee
from redraft.errors import InvalidInput
from redraft.kv.sparse_attention.page_top_k import PageTopK
from redraft.ops.format import PAGE
from redraft.ops.torch_ops import TorchOps
from tests.kv.sparse_attention import Scene, alone, register, scene, texts

products = TorchOps().products

LONG = list(range(300))
SPARSE = [[*range(40), *range(70, 270)], [*range(1, 270, 3)]]  # what an eviction left, another number in each head
TREE = [-1, 0, 0, -1, 3, 1, 5]

SCENES = {
    "decode": scene(0, [LONG, LONG], 300),
    "border": scene(1, [LONG[:288], LONG[:288]], 288),
    "tree": scene(2, [LONG, LONG], 300, chain=2, parents=TREE),
    "evicted": scene(3, SPARSE, 270, chain=3, parents=TREE),
    "window": scene(4, [LONG, LONG], 300, parents=TREE, window=190),
    "short": scene(5, [LONG[:70]], 70, chain=4),
}
METHODS = [PageTopK(tokens=96), PageTopK(tokens=160, logical=32, sinks=2), PageTopK(tokens=128, logical=1, sinks=0)]


def side(method: PageTopK, at: Scene) -> dict[str, Tensor]:
    """The side data as in the engine: only pages full of committed tokens are summarized."""
    heads, _, size = at.keys.shape
    made = method.summarize(at.keys.reshape(-1, PAGE, size))
    held = {name: one.unflatten(0, (heads, -1)) for name, one in made.items()}
    for head, length in enumerate(at.committed):
        for one in held.values():
            one[head, length // PAGE :] = math.nan
    return held


def chosen(method: PageTopK, at: Scene) -> Tensor:
    return method.select(0, at.q, side(method, at), at.seen, at.where, at.at, products)


def definition(method: PageTopK, at: Scene, head: int, row: int) -> list[int]:
    """The slots that a row reads, from the keys themselves."""
    visible, newest = at.visible(head, row), int(at.at[row]) // PAGE * PAGE
    scores, rest = {}, []
    for page in range(at.keys.shape[1] // PAGE):
        slots = range(page * PAGE, (page + 1) * PAGE)
        if not all(slot in visible and int(at.where[head, slot]) < newest for slot in slots):
            rest += [slot for slot in slots if slot in visible]
            continue
        scores[page] = -math.inf
        for part in range(slots.start, slots.stop, method.logical):
            keys = at.keys[head, part : part + method.logical]
            for q in at.q[head, :, row]:
                best = sum(max(float(q[c] * keys[:, c].min()), float(q[c] * keys[:, c].max())) for c in range(len(q)))
                scores[page] = max(scores[page], best)
    first = {page for page in scores if int(at.where[head, (page + 1) * PAGE - 1]) < PAGE * method.sinks}  # of the text
    order = sorted(scores, key=lambda page: (page not in first, page if page in first else -scores[page], page))
    taken = order[: method.tokens // PAGE - 1]
    return sorted(rest + [slot for page in taken for slot in range(page * PAGE, (page + 1) * PAGE)])


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("method", METHODS, ids=str)
def test_reads_what_the_definition_reads(method: PageTopK, name: str) -> None:
    at = SCENES[name]
    read = chosen(method, at)
    assert read.shape == (len(at.keys), 1, len(at.at), at.keys.shape[1])
    for head in range(len(at.keys)):
        for row in range(len(at.at)):
            assert torch.nonzero(read[head, 0, row]).flatten().tolist() == definition(method, at, head, row)
    if name not in ("short", "window"):
        assert not torch.equal(read[:, 0], at.seen), "a choice"


def test_no_key_exceeds_the_bound_of_its_part() -> None:
    at = SCENES["decode"]
    for logical in (1, 2, 4, 8, 16, 32):
        method = PageTopK(logical=logical)
        keys = at.keys[:, :288]
        held = {name: one.unflatten(0, (2, -1)) for name, one in method.summarize(keys.reshape(-1, PAGE, 8)).items()}
        bounds = method.bounds(at.q, held, products)
        true = torch.einsum("kgrd,knd->kgrn", at.q, keys)
        assert (true <= bounds.repeat_interleave(logical, -1) + 1e-12).all()
        assert bounds.shape == (2, 3, 1, 288 // logical)
        if logical == 1:
            torch.testing.assert_close(bounds, true, rtol=0, atol=1e-12)


def test_parts_of_one_token_choose_the_pages_of_the_largest_products() -> None:
    at, method = SCENES["decode"], PageTopK(tokens=128, logical=1, sinks=0)
    best = torch.einsum("kgrd,knd->krng", at.q, at.keys[:, :288]).amax(-1).unflatten(-1, (-1, PAGE)).amax(-1)
    for head, row in enumerate(chosen(method, at)[:, 0, 0]):
        pages = row.unflatten(0, (-1, PAGE))[:9]
        assert pages.all(-1).nonzero().flatten().tolist() == sorted(best[head, 0].topk(3).indices.tolist())
        assert not (pages.any(-1) ^ pages.all(-1)).any()


@pytest.mark.parametrize("row", range(2 + len(TREE)))
def test_a_node_reads_what_its_row_reads_without_drafts(row: int) -> None:
    tree, method = SCENES["tree"], PageTopK(tokens=96)
    one = alone(tree, row)
    for head in range(2):
        assert tree.positions(chosen(method, tree), head, 0, row) == one.positions(chosen(method, one), head, 0, 0)


def test_a_budget_of_all_that_is_seen_reads_all() -> None:
    for at in SCENES.values():
        for tokens in (320, 1024):
            assert torch.equal(chosen(PageTopK(tokens=tokens), at)[:, 0], at.seen)
    few = SCENES["window"]  # 190 slots in sight, cut anywhere
    assert torch.equal(chosen(PageTopK(tokens=192), few)[:, 0], few.seen)
    assert PageTopK(tokens=192).dense_up_to == 192


@pytest.mark.parametrize("stored", range(288, 321))
def test_the_budget_is_kept_with_the_newest_page_and_the_first(stored: int) -> None:
    at = scene(stored, [list(range(stored))], stored)
    read = chosen(PageTopK(tokens=128), at)[0, 0, 0]
    assert int(read.sum()) == 96 + stored % PAGE + 1
    assert read[:PAGE].all()
    assert read[stored // PAGE * PAGE : stored + 1].all()


def test_of_equal_pages_the_lower_ones() -> None:
    at = SCENES["border"]
    same = at._replace(keys=torch.ones_like(at.keys))
    pages = chosen(PageTopK(tokens=128, sinks=0), same)[0, 0, 0].unflatten(0, (-1, PAGE)).any(-1)
    assert pages.nonzero().flatten().tolist() == [0, 1, 2, 9]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_bounds_lie_in_the_dtype_of_the_cache_and_are_weighed_in_float32(dtype: torch.dtype) -> None:
    method = PageTopK(logical=8)
    arrays = method.arrays(64, dtype)
    made = method.summarize(torch.randn(5, PAGE, 64).to(dtype))
    assert {name: (*one.shape[1:],) for name, one in made.items()} == {name: array.shape for name, array in arrays.items()}
    assert all(array.whole and array.dtype == made[name].dtype == dtype for name, array in arrays.items())
    held = {name: one[None] for name, one in made.items()}
    assert method.bounds(torch.randn(1, 2, 3, 64).to(dtype), held, products).dtype == torch.float32
    assert method.fill(0, torch.zeros(1, 1, 64)) == {}
    assert PageTopK(logical=8, tokens=2048).name == method.name != PageTopK().name


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"logical": 0}, r"page-top-k:logical=0: must be 1 or more and divide 32"),
        ({"logical": 12}, r"page-top-k:logical=12: must be 1 or more and divide 32"),
        ({"sinks": -1}, r"page-top-k:sinks=-1: must be 0 or more"),
        ({"tokens": 100}, r"page-top-k:tokens=100: must be a multiple of 32 and 96 or more"),
        ({"tokens": 96, "sinks": 2}, r"page-top-k:tokens=96: must be a multiple of 32 and 128 or more"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        PageTopK(**options)


def test_the_text_is_the_same_however_it_was_made(monkeypatch: pytest.MonkeyPatch) -> None:
    register(monkeypatch)
    full, sparse = texts("none").texts["0"], texts("page-top-k:tokens=96").texts["0"]
    assert texts("page-top-k:tokens=160").texts["0"] == full
    assert sparse != full
    drafted = texts("page-top-k:tokens=96", drafts=True)
    assert drafted.texts["0"] == sparse and drafted.accepted > 10 and drafted.rejected > 10
    assert texts("page-top-k:tokens=96", chunk=5).texts["0"] == sparse
    crowd = texts("page-top-k:tokens=96", many=4, pool=24)
    assert crowd.texts["0"] == sparse and crowd.preempted
    assert PageTopK.card.guarantee is Guarantee.LOSSY
