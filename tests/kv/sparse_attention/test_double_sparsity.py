import gzip
import math
from argparse import __file__ as first_text
from dataclasses import replace
from pathlib import Path
from tarfile import __file__ as second_text
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from redraft import LLM
from redraft.cli.calibrate import calibrate
from redraft.config import SamplingParams
from redraft.core.batch import Batch
from redraft.core.plan import Work
from redraft.core.sequence import UNLIMITED, Request, Sequence
from redraft.core.tree import EMPTY
from redraft.errors import CheckpointError, InvalidInput
from redraft.kv.sparse_attention.double_sparsity import DoubleSparsity, Labels, Profile
from redraft.models.runner import Runner
from redraft.models.trained import model_hash, place
from redraft.ops import library
from redraft.ops.format import PAGE
from redraft.ops.reference import Reference
from redraft.ops.torch_ops import TorchOps
from tests.arrays import placed
from tests.checkpoints import tiny_llama
from tests.contracts import plain
from tests.kv.sparse_attention import Scene, alone, register, scene, texts

products = TorchOps().products

LONG = list(range(120))
TREE = [-1, 0, 0, -1, 3, 1, 5]
SCENES = {
    "decode": scene(0, [LONG, LONG], 120),
    "tree": scene(2, [LONG, LONG], 120, chain=2, parents=TREE),
    "evicted": scene(3, [[*range(20), *range(40, 130)], list(range(1, 128, 3))], 130, chain=3, parents=TREE),
    "window": scene(4, [LONG, LONG], 120, parents=TREE, window=50),
    "short": scene(5, [LONG[:10], LONG[:10]], 10, chain=3),
}
ALL = torch.arange(8).expand(1, 2, -1)
SOME = torch.tensor([[[0, 3, 6], [1, 2, 7]]])
TEXTS = [[(7 * i * i + i) % plain.VOCAB for i in range(40)], [(5 * i * i * i + 2) % plain.VOCAB for i in range(25)]]
REFERENCE = Reference()


@pytest.fixture(autouse=True)
def own_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path / "cache"))
    register(monkeypatch)
    return tmp_path / "cache"


def runner(**changes: Any) -> Runner:
    spec, weights = plain.tiny()
    return Runner(replace(spec, **changes), placed(REFERENCE, weights), REFERENCE, 4)


def side(labels: Labels, at: Scene) -> dict[str, Tensor]:
    """The result of `fill` for every key, page by page."""
    heads, slots, _ = at.keys.shape
    filled = labels.fill(0, at.keys.transpose(0, 1))["labels"]
    assert filled.shape == (slots, heads, labels.channels.shape[-1])
    return {"labels": filled.transpose(0, 1).unflatten(1, (-1, PAGE))}


def chosen(labels: Labels, at: Scene) -> Tensor:
    return labels.select(0, at.q, side(labels, at), at.seen, at.where, at.at, products)


def definition(labels: Labels, at: Scene, head: int, group: int, row: int) -> list[int]:
    visible, channels = at.visible(head, row), labels.channels[0, head]
    q = at.q[head, group, row, channels]
    forced = [s for s in visible if int(at.where[head, s]) < labels.sinks or int(at.where[head, s]) == int(at.at[row])]
    rest = sorted(set(visible) - set(forced), key=lambda s: (-float(q @ at.keys[head, s, channels]), s))
    return sorted([*forced, *rest[: labels.tokens - len(forced)]])


@pytest.mark.parametrize("name", SCENES)
@pytest.mark.parametrize("channels", [ALL, SOME], ids=["all channels", "some"])
@pytest.mark.parametrize("tokens", [3, 24])
def test_reads_the_largest_scores_of_what_a_row_sees(tokens: int, channels: Tensor, name: str) -> None:
    at, labels = SCENES[name], Labels(channels, tokens, 0, 1)
    read = chosen(labels, at)
    assert read.shape == (len(at.keys), 3, len(at.at), at.keys.shape[1])
    for head in range(len(at.keys)):
        for group in range(3):
            for row in range(len(at.at)):
                assert torch.nonzero(read[head, group, row]).flatten().tolist() == definition(labels, at, head, group, row)
                own = at.where[head] == at.at[row]
                assert (read[head, group, row] & own & at.seen[head, row]).any(), "a row reads its own token"


def test_all_channels_find_the_true_top_k() -> None:
    at = SCENES["decode"]
    read = chosen(Labels(ALL, 21, 0, 0), at)
    true = torch.einsum("kgd,knd->kgn", at.q[:, :, 0], at.keys[:, :120]).topk(20).indices.sort(-1).values
    assert torch.equal(read[:, :, 0, :120].nonzero()[:, -1].view(2, 3, 20), true)


def test_as_many_tokens_as_there_are_read_all_whatever_the_labels() -> None:
    for at in SCENES.values():
        labels = Labels(SOME, 300, 0, 1)
        wrong = {"labels": torch.randn_like(side(labels, at)["labels"])}
        assert torch.equal(labels.select(0, at.q, wrong, at.seen, at.where, at.at, products), at.seen[:, None].expand(-1, 3, -1, -1))
    few = SCENES["window"]
    assert torch.equal(chosen(Labels(SOME, 50, 0, 1), few), few.seen[:, None].expand(-1, 3, -1, -1))


@pytest.mark.parametrize("row", range(2 + len(TREE)))
def test_a_node_reads_what_its_row_reads_without_drafts(row: int) -> None:
    tree, labels = SCENES["tree"], Labels(SOME, 12, 0, 1)
    one = alone(tree, row)
    for head in range(2):
        for group in range(3):
            assert tree.positions(chosen(labels, tree), head, group, row) == one.positions(chosen(labels, one), head, group, 0)


def test_labels_of_what_a_row_does_not_see_are_nothing_to_it() -> None:
    at, labels = SCENES["tree"], Labels(SOME, 12, 0, 1)
    before, held = chosen(labels, at), side(labels, at)
    for row in range(len(at.at)):
        spoilt = held["labels"].flatten(1, 2).masked_fill(~at.seen[:, row, :, None], math.nan).view_as(held["labels"])
        got = labels.select(
            0, at.q[:, :, row : row + 1], {"labels": spoilt}, at.seen[:, row : row + 1], at.where, at.at[row : row + 1], products
        )
        assert torch.equal(got, before[:, :, row : row + 1])


def test_of_equal_scores_the_lower_slots() -> None:
    at = SCENES["decode"]
    read = chosen(Labels(SOME, 9, 0, 1), at._replace(keys=torch.ones_like(at.keys)))
    assert read[0, 1, 0].nonzero().flatten().tolist() == [*range(8), 120]


def test_the_first_layers_read_all() -> None:
    at, labels = SCENES["decode"], Labels(SOME.expand(3, -1, -1), 9, 2, 1)
    read = [labels.select(i, at.q, side(labels, at), at.seen, at.where, at.at, products) for i in range(3)]
    assert [torch.equal(one, at.seen[:, None].expand_as(one)) for one in read] == [True, True, False]


def test_scores_are_weighed_in_float32() -> None:
    at, labels = SCENES["decode"], Labels(ALL, 2, 0, 0)
    keys = torch.zeros_like(at.keys)
    keys[:, 3], keys[:, 70] = 1.0, torch.tensor([1.0078125, *[1.0] * 7])  # neighbours in bfloat16, whose sums it cannot tell apart
    low = at._replace(q=torch.ones_like(at.q).bfloat16(), keys=keys.bfloat16())
    assert chosen(labels, low)[0, 0, 0].nonzero().flatten().tolist() == [70, 120]
    assert labels.arrays(8, torch.bfloat16)["labels"] == ((PAGE, 8), torch.bfloat16, False)
    assert labels.summarize(torch.zeros(2, PAGE, 8)) == {} and labels.sync_every == 0 and labels.dense_up_to == 2


# ---- calibration


def captured(monkeypatch: pytest.MonkeyPatch, tokens: list[int]) -> list[tuple[plain.Numbers, plain.Numbers]]:
    """Rotated queries and keys of each layer, from the dense definition."""
    spec, weights = plain.tiny()
    made: list[plain.Numbers] = []
    turn = plain.turn
    with monkeypatch.context() as patch:
        patch.setattr(plain, "turn", lambda *given: made.append(turn(*given)) or made[-1])
        plain.logits(spec, weights, tokens)
    return list(zip(made[::2], made[1::2], strict=True))


@pytest.mark.parametrize("backend", [Reference(), TorchOps(torch.float64)], ids=["reference", "torch"])
def test_a_profile_is_the_mean_product_of_each_channel(monkeypatch: pytest.MonkeyPatch, backend: Any) -> None:
    spec, weights = plain.tiny()
    profile = DoubleSparsity.calibrate(Runner(spec, placed(backend, weights), backend, 4), TEXTS)
    wanted = torch.zeros(2, 2, 8, dtype=torch.float64)
    for text in TEXTS:
        for layer, (q, k) in enumerate(captured(monkeypatch, text)):
            for head in range(2):
                for of in (2 * head, 2 * head + 1):
                    wanted[layer, head] += torch.from_numpy(q[:, of] * k[:, head]).abs().sum(0) / 2
    torch.testing.assert_close(torch.from_numpy(profile.scores).double(), wanted / 65, rtol=1e-6, atol=0)
    assert (profile.texts, profile.tokens) == (2, 65)
    for count in (1, 3, 8):
        found = profile.channels(count)
        for layer in range(2):
            for head in range(2):
                best = sorted(range(8), key=lambda c: -float(wanted[layer, head, c]))[:count]
                assert found[layer, head].tolist() == sorted(best)


def test_long_texts_are_cut_and_pieces_taken_evenly() -> None:
    one = runner(context=10)
    pieces = [TEXTS[0][i : i + 10] for i in (0, 20)]
    few, two = DoubleSparsity.calibrate(one, TEXTS[:1], samples=2), DoubleSparsity.calibrate(one, pieces)
    assert np.array_equal(few.scores, two.scores) and (few.texts, few.tokens) == (1, 20)
    assert DoubleSparsity.calibrate(one, TEXTS).tokens == 65
    for given, samples in (([], 1), ([[]], 1), (TEXTS, 0)):
        with pytest.raises(
            InvalidInput, match=r"^double-sparsity: \d+ pieces of text and samples = \d: a calibration needs at least one of each$"
        ):
            DoubleSparsity.calibrate(one, given, samples)


def test_calibrating_leaves_the_runner_alone() -> None:
    one = runner()
    pool = [one.memory.used(), one.memory.available()]
    DoubleSparsity.calibrate(one, TEXTS)
    assert [one.memory.used(), one.memory.available()] == pool and isinstance(one.backend, Reference)
    one.memory.check()


# ---- profiles


def test_a_profile_is_found_where_it_was_left(tmp_path: Path, own_cache: Path) -> None:
    one = runner()
    profile = DoubleSparsity.calibrate(one, TEXTS)
    assert profile.save() == own_cache / "double-sparsity" / f"{model_hash(one)}.safetensors"
    elsewhere = profile.save(tmp_path / "new" / "mine.safetensors")
    assert [path.name for path in elsewhere.parent.iterdir()] == ["mine.safetensors"]
    for made in (DoubleSparsity(factor=2), DoubleSparsity(factor=2, profile=elsewhere)):
        assert np.array_equal(made.open(one).channels, profile.channels(4))
    back = Profile.load(elsewhere)
    assert np.array_equal(back.scores, profile.scores) and (back.model, back.texts, back.tokens) == (profile.model, 2, 65)


def test_names_tell_side_data_apart() -> None:
    one = runner()
    DoubleSparsity.calibrate(one, TEXTS).save()
    names = [DoubleSparsity(**options).open(one).name for options in ({}, {"tokens": 9, "dense": 0, "sinks": 2}, {"factor": 2})]
    assert names[0] == names[1] != names[2]
    profile = DoubleSparsity.calibrate(one, TEXTS)
    assert replace(profile, scores=-profile.scores).save() and DoubleSparsity().open(one).name != names[0]


def test_without_a_profile_the_error_says_how_to_make_one(own_cache: Path) -> None:
    with pytest.raises(InvalidInput) as refused:
        DoubleSparsity().open(runner())
    missing = own_cache / "double-sparsity" / f"{model_hash(runner())}.safetensors"
    assert str(refused.value) == (
        f"double-sparsity: no profile {missing}; make one with: redraft calibrate MODEL --method double-sparsity --texts FILE"
    )


def test_the_profile_of_another_model_is_refused_with_both_hashes(tmp_path: Path) -> None:
    one, other = runner(), runner(context=99)
    path = DoubleSparsity.calibrate(one, TEXTS).save(tmp_path / "one.safetensors")
    with pytest.raises(InvalidInput, match=f"was made for the model with hash {model_hash(one)}, this one has {model_hash(other)}"):
        DoubleSparsity(profile=path).open(other)


def test_damaged_files_and_others_are_refused(tmp_path: Path) -> None:
    path = DoubleSparsity.calibrate(runner(), TEXTS).save(tmp_path / "whole.safetensors")
    (tmp_path / "half").write_bytes(path.read_bytes()[:-9])
    save_file({"scores": torch.zeros(1)}, tmp_path / "other", {"method": "other", "model": "a", "texts": "1", "tokens": "1"})
    save_file({"scores": torch.zeros(1)}, tmp_path / "incomplete", {"method": "double-sparsity"})
    for name, what in (("half", "not a complete file"), ("other", "a file of other, not"), ("incomplete", "not a complete file")):
        with pytest.raises(CheckpointError, match=rf"{name}: {what} of double-sparsity"):
            DoubleSparsity(profile=tmp_path / name).open(runner())


def test_where_profiles_are_stored(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("REDRAFT_CACHE")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert place("double-sparsity", "abc") == tmp_path / "redraft" / "double-sparsity" / "abc.safetensors"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert place("double-sparsity", "abc") == tmp_path / ".cache" / "redraft" / "double-sparsity" / "abc.safetensors"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"factor": 0}, r"double-sparsity:factor=0: must be 1 or more"),
        ({"dense": -1}, r"double-sparsity:dense=-1: must be 0 or more"),
        ({"sinks": -1}, r"double-sparsity:sinks=-1: must be 0 or more"),
        ({"tokens": 2}, r"double-sparsity:tokens=2: must be 3 or more"),
        ({"tokens": 5, "sinks": 4}, r"double-sparsity:tokens=5: must be 6 or more"),
    ],
)
def test_options_are_checked(options: dict[str, int], message: str) -> None:
    with pytest.raises(InvalidInput, match=message):
        DoubleSparsity(**options)


def test_a_factor_beyond_the_channels_is_refused() -> None:
    with pytest.raises(InvalidInput, match=r"^double-sparsity:factor=9: must be 8 or less, the number of channels of a key$"):
        DoubleSparsity(factor=9).open(runner())


# ---- on models


def test_the_text_is_the_same_however_it_was_made() -> None:
    spec, weights = plain.tiny()
    DoubleSparsity.calibrate(Runner(spec, placed(REFERENCE, weights), REFERENCE, 4), TEXTS).save()
    sparse = "double-sparsity:tokens=24,factor=2,dense=1"
    full, some = texts("none").texts["0"], texts(sparse).texts["0"]
    assert texts("double-sparsity:tokens=160,factor=8,dense=0").texts["0"] == full != some
    drafted = texts(sparse, drafts=True)
    assert drafted.texts["0"] == some and drafted.accepted > 10 and drafted.rejected > 10
    assert texts(sparse, chunk=5).texts["0"] == some
    crowd = texts(sparse, many=4, pool=24)
    assert crowd.texts["0"] == some and crowd.preempted


def test_the_command_calibrates_a_checkpoint(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, text = tiny_llama(tmp_path / "llama"), tmp_path / "text.txt"
    text.write_text("a text of forty letters, one token each " * 2)
    calibrate(str(folder), [text])
    out, err = capsys.readouterr()
    assert err == "double-sparsity: 81 tokens of 1 texts\n"
    llm = LLM(str(folder))
    found = Profile.load(Path(out.strip()))
    assert np.array_equal(found.scores, DoubleSparsity.calibrate(llm.runner, [llm.tokenizer.encode(text.read_text())]).scores)
    assert llm.generate("a text", SamplingParams(max_tokens=4, read="double-sparsity:tokens=8,dense=1"))[0].outputs[0].token_ids
    own, packed = tmp_path / "own.safetensors", tmp_path / "packed.gz"
    packed.write_bytes(gzip.compress(text.read_bytes()))
    calibrate(str(folder), [packed], output=own)
    assert np.array_equal(Profile.load(own).scores, found.scores)


def test_the_command_refuses_in_one_line(tmp_path: Path) -> None:
    (tmp_path / "bytes").write_bytes(b"\xff\xfe")
    for given, method, message in (
        (None, "double-sparsity", r"^--texts: at least one file of text is needed$"),
        ([tmp_path / "none"], "double-sparsity", r"^texts = \S+none: cannot be read \(No such file or directory\)$"),
        ([tmp_path / "bytes"], "double-sparsity", r"^texts = \S+bytes: cannot be read \(not UTF-8 text"),
        ([tmp_path / "none"], "page-top-k", r"^--method page-top-k: these methods need a calibration: .*double-sparsity"),
    ):
        with pytest.raises(InvalidInput, match=message):
            calibrate("embedded", given, method)


class Tape:
    """A backend that records the inputs of attention."""

    def __init__(self, backend: Any) -> None:
        self.backend, self.seen = backend, []

    def __getattr__(self, name: str) -> Any:
        return getattr(self.backend, name)

    def attend(self, index: int, layer: Any, q: Tensor, k: Tensor, *rest: Any) -> Tensor:
        self.seen.append((q.unflatten(1, (layer.kv_heads, -1)).float(), k.float()))
        return self.backend.attend(index, layer, q, k, *rest)


def test_on_the_embedded_model_calibrated_channels_recall_more_than_random_ones() -> None:
    llm = LLM("embedded", backend="torch")
    ids = [llm.tokenizer.encode(Path(file).read_text(encoding="utf-8")) for file in (first_text, second_text)]
    profile = DoubleSparsity.calibrate(llm.runner, [ids[0][:1024]])
    tape = Tape(llm.runner.backend)
    one = Runner(llm.runner.spec, llm.runner.weights, tape, 20, sharing=False)  # type: ignore[arg-type]
    seq = Sequence(0, Request("", ids[1][:512], SamplingParams()), 0, ids[1][:512], 512, seed=0, sync_point=UNLIMITED)
    one.memory.open(seq)
    one.forward(Batch.pack([Work(seq, 512)], [EMPTY], one.memory.reserve([Work(seq, 512)], [EMPTY])))
    random = replace(profile, scores=np.random.default_rng(0).random(profile.scores.shape, np.float32))
    n, recall = 512, {}
    for name, count in (("calibrated", 16), ("random", 16), ("true", 64)):
        labels, hits = Labels((random if name == "random" else profile).channels(count), n // 8, 0, 0), []
        for index, (q, k) in enumerate(tape.seen):
            q, keys = q[-32:].permute(1, 2, 0, 3), k.transpose(0, 1)
            seen, at = torch.ones(n, n, dtype=torch.bool).tril()[None, -32:], torch.arange(n - 32, n)
            where, every = torch.arange(n)[None], keys.unflatten(1, (-1, PAGE))
            held = {"labels": labels.fill(index, k)["labels"].transpose(0, 1).unflatten(1, (-1, PAGE))}
            read = labels.select(index, q, held, seen, where, at, products)
            true = Labels(torch.arange(64).expand(8, 1, -1), n // 8, 0, 0).select(index, q, {"labels": every}, seen, where, at, products)
            hits.append(float((read & true).sum() / true.sum()))
        recall[name] = sum(hits) / len(hits)
    assert recall["true"] == 1
    assert recall["calibrated"] > recall["random"] + 0.1 > 0.3


def test_every_backend_shows_the_meter_what_it_attends(tmp_path: Path) -> None:
    """A backend that runs whole layers in one call must not bypass the meter."""
    folder, text = str(tiny_llama(tmp_path / "llama")), [list(range(40))]
    served = library.serves("float32", "cpu")[0]
    scores = [DoubleSparsity.calibrate(LLM(folder, dtype="float32", backend=one).runner, text).scores for one in ("torch", served)]
    assert abs(scores[0]).min() > 0
    np.testing.assert_allclose(scores[1], scores[0], rtol=1e-3, atol=1e-4)


def test_a_profile_of_nothing_is_refused(tmp_path: Path) -> None:
    path = Profile(np.zeros((2, 1, 8), np.float32), "a model", 1, 40).save(tmp_path / "nothing.safetensors")
    with pytest.raises(CheckpointError, match="all scores are 0: calibrate again"):
        Profile.load(path)
