"""What all drafters with trained heads have in common: texts stay the same, states follow the text, and files are checked."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.sequence import Lanes, Request
from redraft.draft.heads import Heads, TextState, TrainedHeads
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import CheckpointError, InvalidInput
from redraft.models.trained import FILE, Trained, model_hash
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, Condition, check, drive, engine, prompts

Arrays = dict[str, Any]
HIDDEN, DEPTHS = 32, 3


def numbers(*shape: int, size: float = 0.5) -> np.ndarray:
    return (np.random.default_rng(shape[-1]).standard_normal(shape) * size / np.sqrt(shape[-1])).astype(np.float32)


def medusa(blocks: int = 1, size: float = 4.0) -> tuple[Arrays, dict[str, Any]]:
    names = [f"heads.{head}.blocks.{block}" for head in range(DEPTHS) for block in range(blocks)]
    arrays = {f"{name}.weight": numbers(HIDDEN, HIDDEN, size=size) for name in names}
    return {**arrays, **{f"{name}.bias": numbers(HIDDEN) for name in names}}, {"heads": DEPTHS, "blocks": blocks}


def hydra(blocks: int = 1, size: float = 4.0) -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {}
    for head in range(DEPTHS):
        wide = HIDDEN * (head + 2)
        arrays[f"heads.{head}.blocks.0.residual.weight"] = np.eye(HIDDEN, wide, dtype=np.float32)
        for block in range(blocks):
            arrays[f"heads.{head}.blocks.{block}.weight"] = numbers(HIDDEN, HIDDEN if block else wide, size=size)
            arrays[f"heads.{head}.blocks.{block}.bias"] = numbers(HIDDEN)
    return arrays, {"heads": DEPTHS, "blocks": blocks}


def clover() -> tuple[Arrays, dict[str, Any]]:
    arrays: Arrays = {"cell.gain": 1 + numbers(HIDDEN)}
    for part in ("ih", "hh"):
        arrays |= {f"cell.{part}.weight": numbers(3 * HIDDEN, HIDDEN, size=2.0), f"cell.{part}.bias": numbers(3 * HIDDEN)}
    return arrays, {"heads": DEPTHS, "cell": "gru"}


MADE: dict[str, tuple[str, Callable[[], tuple[Arrays, dict[str, Any]]]]] = {
    "medusa": ("medusa", medusa),
    "hydra": ("hydra", lambda: hydra(2)),
    "clover": ("hydra", clover),
}
FORMS = [form for form, (name, _) in MADE.items() if name in registry.METHODS["draft"]]
NAMES = [name for name in registry.METHODS["draft"] if issubclass(registry.method("draft", name), TrainedHeads)]


def saved(name: str, arrays: Arrays, about: dict[str, Any], *, folder: Path | None = None, model: str | None = None) -> Path:
    """A folder for the tiny model."""
    folder = folder or Path(mkdtemp())
    Trained(name, model or own_hash(), about, arrays).save(folder)
    return folder


@cache
def own_hash(backend: str = BACKEND) -> str:
    return model_hash(engine("none", backend=backend).runner)


@cache
def text(form: str, options: str = "") -> str:
    """The drafter with random numbers, for the tiny model."""
    name, make = MADE[form]
    return f"{name}:path={saved(name, *make())}{options}"


def own(made: Engine) -> Heads:
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, Heads)
    return drafter


def test_every_method_with_heads_is_tested() -> None:
    assert {MADE[form][0] for form in FORMS} == set(NAMES)


# ---- texts


@pytest.mark.parametrize("options", ["", ",nodes=4"])
@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("chunk", "arrivals", "pool"), [(512, (0,), 40), (24, (0, 3, 0, 5, 9, 11), 40), (24, (0, 1, 0, 1, 0, 0), 5)])
@pytest.mark.parametrize("form", FORMS)
def test_texts_are_those_of_the_definition(
    form: str, chunk: int, arrivals: tuple[int, ...], pool: int, sampling: str, options: str
) -> None:
    seen = check(Condition(text(form, options), sampling, chunk=chunk, arrivals=arrivals, pool=pool))
    assert seen.rejected and (seen.accepted or options) and (seen.preempted or pool > 5)


@pytest.mark.parametrize("form", FORMS)
def test_texts_are_those_of_the_definition_with_numpy(form: str) -> None:
    name, make = MADE[form]
    draft = f"{name}:path={saved(name, *make(), model=own_hash('numpy'))}"
    lanes = (Lanes.SHARED, Lanes.PER_LAYER, Lanes.PER_HEAD)
    assert check(Condition(draft, "sampled", "numpy", arrivals=(0, 3), lanes=lanes)).accepted


@pytest.mark.parametrize("form", FORMS)
def test_a_wrong_state_changes_no_text(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    grow = Heads.propose

    def stale(self: Heads, seqs: Any, budgets: Any) -> Any:
        for seq in seqs:
            if (state := seq.state[self]).row is not None:
                state.row = np.full_like(state.row, 7.0)
        return grow(self, seqs, budgets)

    monkeypatch.setattr(Heads, "propose", stale)
    check(Condition(text(form), "sampled", arrivals=(0, 3)))


# ---- states


@pytest.mark.parametrize("pool", [40, 5])
@pytest.mark.parametrize("form", FORMS)
def test_the_state_is_that_of_the_row_that_drew_the_newest_token(form: str, pool: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Through accepted paths, preemption and chunks: what a text afresh gives, and none where that is not known."""
    propose, seen = Heads.propose, [0, 0]

    def looked(self: Heads, seqs: Any, budgets: Any) -> Any:
        for seq, budget in zip(seqs, budgets, strict=True):
            state: TextState = seq.state[self]
            if min(budget) > 0 and state.row is not None and state.length == len(seq.tokens):
                logits = array_of(state.row @ np.asarray(head, np.float64).T)
                expected = plain.logits(*plain.tiny(), seq.tokens[:-1])[-1]
                np.testing.assert_allclose(logits, expected, atol=1e-9)
                seen[seq.generated > 3] += 1
        return propose(self, seqs, budgets)

    head = plain.tiny()[1].head.weight
    monkeypatch.setattr(Heads, "propose", looked)
    made = engine(text(form), pool=pool, chunk=24)
    requests = [Request(str(i), list(prompts()[i]), SAMPLING["sampled"].but(seed=i)) for i in range(5)]
    run = drive(made, requests, (0, 1, 0, 1, 0))
    assert min(seen) > 3 and bool(run.preempted) == (pool == 5)


def array_of(x: Any) -> np.ndarray:
    return np.asarray(x)


@pytest.mark.parametrize("form", FORMS)
def test_forks_and_aborts(form: str) -> None:
    """n texts of a request are those that they are alone, and an abort leaves nothing behind."""
    made = engine(text(form))
    request = Request("a", list(prompts()[0]), SAMPLING["sampled"].but(seed=3, n=3))
    found = drive(made, [request], (0,)).texts
    single = drive(engine("none"), [Request("a", list(prompts()[0]), SAMPLING["sampled"].but(seed=3, n=3))], (0,)).texts
    assert found == single
    made.add(Request("b", list(prompts()[1]), SAMPLING["greedy"]))
    made.add(Request("c", list(prompts()[2]), SAMPLING["greedy"].but(n=2)))
    for _ in range(4):
        checked(made.step())
    assert made.abort("b") and made.abort("c") and not made.has_work and made.memory.used() == 0


def test_a_fork_has_its_own_copy() -> None:
    drafter = own(engine(text(FORMS[0])))
    state = drafter.begin(None)  # type: ignore[arg-type]
    state.row, state.length = np.ones(HIDDEN), 5
    child = drafter.fork(state, None)  # type: ignore[arg-type]
    state.row, state.length = None, 0
    assert child.row is not None and child.length == 5 and child.growth is None


# ---- trees


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("count", [0, 1, 3])
def test_nodes_is_obeyed(form: str, count: int, monkeypatch: pytest.MonkeyPatch) -> None:
    propose, most = Heads.propose, [0]

    def counted(self: Heads, seqs: Any, budgets: Any) -> Any:
        trees = propose(self, seqs, budgets)
        most[0] = max(most[0], *map(len, trees))
        return trees

    monkeypatch.setattr(Heads, "propose", counted)
    drive(engine(text(form, f",nodes={count}")), [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    assert most[0] == count


@pytest.mark.parametrize("form", FORMS)
def test_no_node_is_less_than_a_quarter_as_likely_as_its_first_sibling(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    propose, siblings = Heads.propose, []

    def looked(self: Heads, seqs: Any, budgets: Any) -> Any:
        for tree in (trees := propose(self, seqs, budgets)):
            tree.check(vocab=plain.VOCAB, rows=99, depth=DEPTHS)
            for parent in range(-1, len(tree)):
                scores = [float(tree.scores[node]) for node in tree.drawn(parent)]
                siblings.extend(score / max(scores) for score in scores)
        return trees

    monkeypatch.setattr(Heads, "propose", looked)
    drive(engine(text(form, ",nodes=9")), [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    assert len(siblings) > 20 and min(siblings) >= 0.25 * 0.999


@pytest.mark.parametrize("form", FORMS)
def test_rates_are_learnt_and_restored(form: str) -> None:
    made = engine(text(form))
    before = made.drafter.snapshot()
    texts = drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,)).texts
    assert made.drafter.snapshot() != before
    made.drafter.restore(before)
    assert made.drafter.snapshot() == before
    assert drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,)).texts == texts


# ---- files


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_with_a_file_is_named(name: str, tmp_path: Path) -> None:
    form = next(form for form in FORMS if MADE[form][0] == name)
    arrays, about = MADE[form][1]()
    runner = engine("none").runner

    def opened(folder: Path) -> Any:
        return engine(f"{name}:path={folder}")

    with pytest.raises(InvalidInput, match=rf"^{name}:path=none: must be a folder with trained heads; make one with: redraft train MODEL"):
        registry.create("draft", name)
    with pytest.raises(InvalidInput, match=rf"^{name}:nodes=-1: must be 0 or more$"):
        registry.create("draft", f"{name}:path=x,nodes=-1")
    with pytest.raises(InvalidInput, match=rf"^{name}:path=\S+nowhere: no such file or folder; make one with"):
        opened(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=rf"^{name}: \S+ was made for the model with hash abc, this one has {model_hash(runner)}$"):
        opened(saved(name, arrays, about, folder=tmp_path / "other", model="abc"))
    with pytest.raises(CheckpointError, match=rf"a file of another, not of {name}$"):
        opened(saved("another", arrays, about, folder=tmp_path / "another"))
    damaged = saved(name, arrays, about, folder=tmp_path / "damaged") / FILE
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=rf"damaged\S*: not a complete file of {name}: "):
        opened(damaged.parent)
    assert registry.create("draft", f"{name}:path={damaged.parent}").max_bytes(runner) == 0

    one = next(iter(arrays))
    for what, changed, message in [
        ("lacking", {key: value for key, value in arrays.items() if key != one}, f"has no array {one}"),
        ("narrow", {**arrays, one: arrays[one][:, :5]}, rf"{one} is \[\d+, 5\], not \[\d+, \d+\]"),
        ("far", {**arrays, "kept": np.array([3, plain.VOCAB])}, f"kept must be ascending tokens below {plain.VOCAB}"),
        ("twice", {**arrays, "kept": np.array([3, 3])}, "kept must be ascending tokens below"),
        ("rows", {**arrays, "rows": numbers(5, HIDDEN)}, rf"rows is \[5, {HIDDEN}\], not"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            opened(saved(name, changed, about, folder=tmp_path / what))
    with pytest.raises(CheckpointError, match="0 heads of 1 blocks"):
        opened(saved(name, arrays, {**about, "heads": 0, "blocks": 1}, folder=tmp_path / "none"))


@pytest.mark.parametrize("form", FORMS)
def test_only_kept_tokens_are_drafted_and_bytes_are_bounded(form: str, monkeypatch: pytest.MonkeyPatch) -> None:
    name, make = MADE[form]
    arrays, about = make()
    kept = np.array([1, 4, 5, 9, 20, 23], np.int32)
    folder = saved(name, {**arrays, "kept": kept}, about)
    propose, seen = Heads.propose, set[int]()

    def looked(self: Heads, seqs: Any, budgets: Any) -> Any:
        for tree in (trees := propose(self, seqs, budgets)):
            seen.update(tree.tokens.tolist())
        return trees

    monkeypatch.setattr(Heads, "propose", looked)
    check(Condition(f"{name}:path={folder}", "sampled", arrivals=(0, 3)))
    assert len(seen) > 3 and seen <= set(kept.tolist())
    made = engine(f"{name}:path={folder}")
    assert 0 < own(made).bytes <= registry.create("draft", f"{name}:path={folder}").max_bytes(made.runner)


@pytest.mark.parametrize("form", FORMS)
def test_rows_of_a_trained_head_replace_those_of_the_target(form: str) -> None:
    name, make = MADE[form]
    arrays, about = make()
    head = np.asarray(plain.tiny()[1].head.weight)
    kept = np.array([2, 3, 7, 8], np.int32)
    trees = []
    for extra in ({}, {"rows": head[kept]}, {"rows": -head[kept]}):
        drafter = own(engine(f"{name}:path={saved(name, {**arrays, 'kept': kept, **extra}, about)}"))
        trees.append([offer.tokens for offer in drafter.offers(numbers(3, HIDDEN))])
    assert trees[0] == trees[1] == [tokens[::-1] for tokens in trees[2]]


# ---- in a planner


@pytest.mark.parametrize("form", FORMS)
def test_auto_finds_the_drafter_by_its_file(form: str) -> None:
    name, make = MADE[form]
    folder = saved(name, *make())
    auto = registry.create("draft", f"auto:head={folder}")
    assert list(auto.made()) == ["suffix", "ngram", "token-recycling", name]
    assert auto.made()[name] == registry.create("draft", f"{name}:path={folder}")
    for parts in (f"auto:head={folder}", f"auto:parts=ngram+({name}:path={folder},nodes=3)", f"auto:parts=ngram+{name}:path={folder}"):
        for sampling in SAMPLING:
            check(Condition(parts, sampling, chunk=24, arrivals=(0, 3, 0, 5), pool=12))
    check(Condition(f"union:parts=ngram+({name}:path={folder})", "sampled", arrivals=(0, 3)))


def test_a_head_that_is_none_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=r"^auto:head=\S+nowhere: no such file or folder$"):
        registry.create("draft", f"auto:head={tmp_path / 'nowhere'}")
    (tmp_path / "words").write_text("x")
    with pytest.raises(CheckpointError, match=r"words: not a trained file: "):
        registry.create("draft", f"auto:head={tmp_path / 'words'}")
    with pytest.raises(InvalidInput, match=r"^auto:head=\S+: a file of double-sparsity, which is no drafter with a trained file$"):
        registry.create("draft", f"auto:head={saved('double-sparsity', {'a': np.zeros(2)}, {})}")


def test_a_planner_asks_for_the_trees_of_all_texts_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    name, make = MADE[FORMS[0]]
    propose, counts = Heads.propose, list[int]()

    def counted(self: Heads, seqs: Any, budgets: Any) -> Any:
        counts.append(len(seqs))
        return propose(self, seqs, budgets)

    monkeypatch.setattr(Heads, "propose", counted)
    made = engine(f"auto:parts=ngram+{name}:path={saved(name, *make())}")
    if type(made.drafter.own.drafter).__name__ != "CompiledPlanner":
        pytest.skip("the planner is not compiled")
    drive(made, [Request(str(i), list(prompts()[i]), SAMPLING["greedy"]) for i in range(4)], (0, 0, 0, 0))
    assert max(counts) > 2
