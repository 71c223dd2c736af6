"""What all drafters that follow the target's states have in common: texts stay the same, nothing leaks, and files are checked."""

from __future__ import annotations

from collections.abc import Iterator
from functools import cache
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import pytest

from redraft import registry
from redraft.core.sequence import Lanes, Request
from redraft.draft.follower import Followed, Follower
from redraft.engine.engine import Engine
from redraft.engine.output import checked
from redraft.errors import CheckpointError, InvalidInput, OutOfMemory
from redraft.models.trained import FILE, Trained, model_hash
from tests.arrays import BACKEND
from tests.contracts import plain
from tests.contracts.identity import SAMPLING, Condition, check, drive, engine, prompts

Arrays = dict[str, Any]
HIDDEN, INNER, HEADS, KV_HEADS, SIZE, THETA = 32, 48, 4, 2, 8, 100.0
LAYER = 1  # layers before Kangaroo's adapter


def numbers(*shape: int, size: float = 1.0) -> np.ndarray:
    return (np.random.default_rng(sum(shape)).standard_normal(shape) * size / np.sqrt(shape[-1])).astype(np.float32)


def arrays(name: str) -> tuple[Arrays, dict[str, Any]]:
    """A trained file with random numbers, for the tiny model."""
    queries, keys = HEADS * SIZE, KV_HEADS * SIZE
    made: Arrays = {
        "norm.weight": 1 + numbers(HIDDEN),
        "layer.input_layernorm.weight": 1 + numbers(HIDDEN, size=0.5),
        "layer.self_attn.q_proj.weight": numbers(queries, HIDDEN, size=2),
        "layer.self_attn.k_proj.weight": numbers(keys, HIDDEN, size=2),
        "layer.self_attn.v_proj.weight": numbers(keys, HIDDEN, size=1.5),
        "layer.self_attn.o_proj.weight": numbers(HIDDEN, queries, size=1.5),
    }
    about = {"heads": HEADS, "kv_heads": KV_HEADS, "head_dim": SIZE, "intermediate": INNER, "rope_theta": THETA, "eps": 1e-5}
    if name == "kangaroo":
        return made, {**about, "layer": LAYER}
    made |= {
        "fc.weight": numbers(HIDDEN, 2 * HIDDEN),
        "layer.post_attention_layernorm.weight": 1 + numbers(HIDDEN, size=0.3),
        "layer.mlp.gate_proj.weight": numbers(INNER, HIDDEN),
        "layer.mlp.up_proj.weight": numbers(INNER, HIDDEN, size=1.2),
        "layer.mlp.down_proj.weight": numbers(HIDDEN, INNER),
    }
    return made, {**about, "layers": 1}


OPTIONS = {"eagle": ",least=0,worth=0", "kangaroo": ",eta=0"}
NAMES = [name for name in OPTIONS if name in registry.METHODS["draft"]]


def saved(name: str, made: Arrays, about: dict[str, Any], *, folder: Path | None = None, model: str | None = None) -> Path:
    folder = folder or Path(mkdtemp())
    Trained(name, model or own_hash(), about, made).save(folder)
    return folder


@cache
def own_hash(backend: str = BACKEND) -> str:
    return model_hash(engine("none", backend=backend).runner)


@cache
def text(name: str, options: str | None = None, backend: str = BACKEND) -> str:
    """The drafter with random numbers, for the tiny model."""
    folder = saved(name, *arrays(name), model=own_hash(backend))
    return f"{name}:path={folder}{OPTIONS[name] if options is None else options}"


def own(made: Engine) -> Follower:
    drafter = made.drafter.own.drafter
    assert isinstance(drafter, Follower)
    return drafter


@pytest.fixture
def opened(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Follower]]:
    """The followers that a test opens. Each is empty when the test ends."""
    found: list[Follower] = []
    begin = Follower.__init__

    def noted(self: Follower, *given: Any) -> None:
        found.append(self)
        begin(self, *given)

    monkeypatch.setattr(Follower, "__init__", noted)
    yield found
    assert found
    for one in found:
        one.memory.check()
        assert one.memory.used() == 0, "pages are held after the last text"


# ---- texts


@pytest.mark.parametrize("sampling", SAMPLING)
@pytest.mark.parametrize(("chunk", "arrivals", "pool"), [(512, (0,), 40), (24, (0, 3, 0, 5, 9, 11), 40), (24, (0, 1, 0, 1, 0, 0), 5)])
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_the_definition(
    name: str, chunk: int, arrivals: tuple[int, ...], pool: int, sampling: str, opened: list[Follower]
) -> None:
    seen = check(Condition(text(name), sampling, chunk=chunk, arrivals=arrivals, pool=pool))
    assert seen.accepted and seen.rejected and (seen.preempted or pool > 5)


@pytest.mark.parametrize("backend", ["numpy", "reference"])
@pytest.mark.parametrize("name", NAMES)
def test_texts_are_those_of_the_definition_on_other_backends(name: str, backend: str, opened: list[Follower]) -> None:
    lanes = (Lanes.SHARED, Lanes.PER_LAYER, Lanes.PER_HEAD)
    assert check(Condition(text(name, backend=backend), "sampled", backend, arrivals=(0, 3), lanes=lanes)).accepted


@pytest.mark.parametrize("name", NAMES)
def test_wrong_states_change_no_text(name: str, monkeypatch: pytest.MonkeyPatch, opened: list[Follower]) -> None:
    note = Follower.note
    monkeypatch.setattr(Follower, "note", lambda self, state, first, states: note(self, state, first, 7 * states))
    check(Condition(text(name), "sampled", arrivals=(0, 3)))


@pytest.mark.parametrize("name", NAMES)
def test_states_that_are_missing_change_no_text_and_are_made_up_for(
    name: str, monkeypatch: pytest.MonkeyPatch, opened: list[Follower]
) -> None:
    """Each third step is not observed. Texts go on to be drafted, at their true positions, and are not offered to others."""
    observe, steps = Follower.observe, [0]

    def sometimes(self: Follower, result: Any) -> None:
        steps[0] += 1
        if steps[0] % 3:
            observe(self, result)

    monkeypatch.setattr(Follower, "observe", sometimes)
    seen = check(Condition(text(name), "greedy", arrivals=(0, 3)))
    assert seen.accepted + seen.rejected > 30


@pytest.mark.parametrize("name", NAMES)
def test_forks_and_aborts(name: str, opened: list[Follower]) -> None:
    """n texts of a request are those that they are alone, and an abort leaves nothing behind."""
    made = engine(text(name))
    found = drive(made, [Request("a", list(prompts()[0]), SAMPLING["sampled"].but(seed=3, n=3))], (0,)).texts
    single = drive(engine("none"), [Request("a", list(prompts()[0]), SAMPLING["sampled"].but(seed=3, n=3))], (0,)).texts
    assert found == single
    made.add(Request("b", list(prompts()[1]), SAMPLING["greedy"]))
    made.add(Request("c", list(prompts()[2]), SAMPLING["greedy"].but(n=2)))
    for _ in range(4):
        checked(made.step())
    assert made.abort("b") and made.abort("c") and not made.has_work and made.memory.used() == 0


@pytest.mark.parametrize("name", NAMES)
def test_a_step_that_fails_leaves_nothing_behind(name: str, monkeypatch: pytest.MonkeyPatch, opened: list[Follower]) -> None:
    forward, calls = Follower._forward, [0]

    def fails(self: Follower, *given: Any) -> Any:
        calls[0] += 1
        if calls[0] % 7 == 3:
            raise RuntimeError("as if out of memory")
        return forward(self, *given)

    monkeypatch.setattr(Follower, "_forward", fails)
    made = engine(text(name))
    requests = [Request(str(i), list(prompts()[i]), SAMPLING["greedy"]) for i in range(3)]
    for request in requests:
        made.add(request)
    texts: dict[str, list[int]] = {}
    while made.has_work:
        for event in checked(made.step()):
            texts.setdefault(event.request.id, []).extend(event.tokens)
    plainly = drive(engine("none"), [Request(str(i), list(prompts()[i]), SAMPLING["greedy"]) for i in range(3)], (0, 0, 0)).texts
    assert texts == plainly and calls[0] > 6 and made.memory.used() == 0


# ---- what is read


@pytest.mark.parametrize("name", NAMES)
def test_a_prompt_in_the_prefix_cache_is_attached_here_too(name: str, opened: list[Follower]) -> None:
    made = engine(text(name))
    drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    follower = own(made)
    states: list[Followed] = []
    begin = follower.begin
    follower.begin = lambda seq: states.append(begin(seq)) or states[-1]  # type: ignore[method-assign,func-returns-value]
    again = drive(made, [Request("b", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    assert again.cached == 32 and again.accepted
    assert states[0].whole and states[0].read > 32, "read without a gap"


@pytest.mark.parametrize("name", NAMES)
def test_salts_keep_what_was_read_apart(name: str, opened: list[Follower]) -> None:
    made = engine(text(name))
    drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"], salt="one")], (0,))
    memory = own(made).memory
    tokens = prompts()[0][own(made).lag :]
    assert memory.match(tokens, "one") == 32 and memory.match(tokens, "two") == 0


@pytest.mark.parametrize("name", NAMES)
def test_without_memory_there_are_no_drafts_and_texts_stay(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("redraft.draft.trained_layers.SHARE", 0.0)
    with pytest.raises(OutOfMemory, match="its cache does not fit beside the model"):
        engine(text(name))
    monkeypatch.undo()
    made = engine(text(name))
    follower = own(made)
    follower.memory.available = lambda: 0  # type: ignore[method-assign]
    seen = drive(made, [Request("a", list(prompts()[0]), SAMPLING["greedy"])], (0,))
    assert seen.texts["a"] and seen.accepted == seen.rejected == 0


# ---- trees


@pytest.mark.parametrize("name", NAMES)
def test_only_kept_tokens_are_drafted_and_bytes_are_bounded(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    made, about = arrays(name)
    kept = np.array([1, 4, 5, 9, 20, 23], np.int32)
    folder = saved(name, {**made, "kept": kept}, about)
    propose, seen = Follower.propose, set[int]()

    def looked(self: Follower, seqs: Any, budgets: Any) -> Any:
        for tree in (trees := propose(self, seqs, budgets)):
            seen.update(tree.tokens.tolist())
        return trees

    monkeypatch.setattr(Follower, "propose", looked)
    check(Condition(f"{name}:path={folder}{OPTIONS[name]}", "sampled", arrivals=(0, 3)))
    assert len(seen) > 3 and seen <= set(kept.tolist())
    started = engine(f"{name}:path={folder}")
    assert 0 < own(started).bytes <= registry.create("draft", f"{name}:path={folder}").max_bytes(started.runner)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_wrong_with_a_file_is_named(name: str, tmp_path: Path) -> None:
    made, about = arrays(name)
    runner = engine("none").runner

    def opening(folder: Path) -> Any:
        return engine(f"{name}:path={folder}")

    with pytest.raises(InvalidInput, match=rf"^{name}:path=none: must be a folder with a trained \w+; make one with: redraft train MODEL"):
        registry.create("draft", name)
    with pytest.raises(InvalidInput, match=rf"^{name}:path=\S+nowhere: no such file or folder; make one with: redraft train"):
        opening(tmp_path / "nowhere")
    with pytest.raises(InvalidInput, match=rf"^{name}: \S+ was made for the model with hash abc, this one has {model_hash(runner)}$"):
        opening(saved(name, made, about, folder=tmp_path / "other", model="abc"))
    with pytest.raises(CheckpointError, match=rf"a file of another, not of {name}$"):
        opening(saved("another", made, about, folder=tmp_path / "another"))
    damaged = saved(name, made, about, folder=tmp_path / "damaged") / FILE
    damaged.write_bytes(damaged.read_bytes()[:-9])
    with pytest.raises(CheckpointError, match=rf"damaged\S*: not a complete file of {name}: "):
        opening(damaged.parent)
    assert registry.create("draft", f"{name}:path={damaged.parent}").max_bytes(runner) == 0

    one = "layer.self_attn.v_proj.weight"
    for what, changed, message in [
        ("lacking", {key: value for key, value in made.items() if key != one}, f"has no array {one}"),
        ("narrow", {**made, one: made[one][:, :5]}, rf"{one} is \[16, 5\], not \[16, {HIDDEN}\]"),
        ("far", {**made, "kept": np.array([3, plain.VOCAB])}, f"kept must be ascending tokens below {plain.VOCAB}"),
        ("rows", {**made, "rows": numbers(5, HIDDEN)}, rf"rows is \[5, {HIDDEN}\], not"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            opening(saved(name, changed, about, folder=tmp_path / what))
    with pytest.raises(CheckpointError, match="its metadata do not describe a layer"):
        opening(saved(name, made, {key: value for key, value in about.items() if key != "eps"}, folder=tmp_path / "eps"))
    with pytest.raises(CheckpointError, match="no layer has 3 heads, 2 kv heads"):
        opening(saved(name, made, {**about, "heads": 3}, folder=tmp_path / "three"))
