"""The knob: after its edit the coordinate is c, earlier rows keep their bits, and cached pages are those of texts without it."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.card import Guarantee
from redraft.errors import CheckpointError, InvalidInput
from redraft.guarantee import weakest
from redraft.models.trained import Trained, model_hash
from redraft.ops.arrays import array
from redraft.steer.knob import ContextKnob, Knob
from tests.checkpoints import tiny_llama

DICE = np.random.default_rng(5)
U = DICE.standard_normal(48)
KNOB = Knob(U, layer=2, c=3.5, strength=1.0)
PROMPT = "In this story the capital of France is Rome. The capital of France is"
PARAMS = SamplingParams(temperature=0.7, seed=4, max_tokens=40)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("knob") / "model")


def load(path: Path, **options: Any) -> LLM:
    return LLM(str(path), backend="numpy", dtype="float32", threads=1, max_model_len=200, **options)


@pytest.fixture(scope="module")
def llm(path: Path) -> LLM:
    return load(path)


@pytest.fixture(scope="module")
def file(llm: LLM, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return trained(llm, tmp_path_factory.mktemp("trained"))


def trained(llm: LLM, folder: Path, **changes: Any) -> Path:
    u = DICE.standard_normal(llm.spec.hidden).astype(np.float32)
    about = {"layer": 0, "context": 9.0, "prior": -9.0} | {name: value for name, value in changes.items() if name != "u"}
    return Trained("context-knob", model_hash(llm.runner), about, {"u": changes.get("u", u)}).save(folder / "knob")


def text(llm: LLM, steer: str | None, prompt: Any = PROMPT, params: SamplingParams = PARAMS) -> list[int]:
    return llm.generate(prompt, params.but(steer=steer))[0].outputs[0].token_ids


# ---- the edit


@pytest.mark.parametrize("library", ["numpy", "torch"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_the_coordinate_is_c_and_nothing_else_moves(library: str, dtype: str) -> None:
    h = DICE.standard_normal((6, 48)).astype(dtype)
    given: Any = h
    if library == "torch":
        given = pytest.importorskip("torch").from_numpy(h.copy())
    between = KNOB.between(context=5)
    assert between is not None and between.cuts == {3} and KNOB.shareable_tokens(5) == 4
    once = between.act(3, given, np.arange(2, 8, dtype=np.int32))
    found, unit = array(once), U / np.linalg.norm(U)
    assert np.array_equal(found[:2], h[:2]), "positions 2 and 3 come before the last row of the context"
    assert found.dtype == h.dtype
    np.testing.assert_allclose(found[2:] @ unit, 3.5, atol=1e-5)
    beside = np.eye(48) - np.outer(unit, unit)
    np.testing.assert_allclose(found[2:] @ beside, h[2:] @ beside, atol=1e-5)
    np.testing.assert_allclose(array(between.act(3, once, np.arange(2, 8, dtype=np.int32))), found, atol=1e-5)


def test_a_row_is_the_same_with_any_others() -> None:
    between = KNOB.between(context=1)
    assert between is not None
    h, at = DICE.standard_normal((9, 48)).astype(np.float32), np.arange(9, dtype=np.int32)
    whole = between.act(3, h, at)
    for i in range(9):
        assert np.array_equal(between.act(3, h[i : i + 1], at[i : i + 1])[0], whole[i])


def test_part_of_the_way() -> None:
    half, off = replace(KNOB, strength=0.5).between(1), replace(KNOB, strength=0.0).between(1)
    assert off is None and half is not None
    h, unit = DICE.standard_normal((3, 48)), U / np.linalg.norm(U)
    found = half.act(3, h, np.arange(3, dtype=np.int32))
    np.testing.assert_allclose(found @ unit, (h @ unit + 3.5) / 2)


# ---- texts


def test_it_changes_texts_both_ways(llm: LLM, file: Path) -> None:
    found = [tuple(text(llm, steer)) for steer in (None, f"context-knob:path={file}", f"context-knob:path={file},turn=-1")]
    assert len(set(found)) == 3
    assert tuple(text(llm, f"context-knob:path={file},c=9")) == found[1] and tuple(text(llm, "context-knob:strength=0")) == found[0]
    assert weakest(steer="context-knob") is Guarantee.LOSSY
    assert llm.generate(PROMPT, PARAMS.but(steer=f"context-knob:path={file}"))[0].guarantee == "lossy"


def test_texts_beside_each_other(path: Path, llm: LLM, file: Path) -> None:
    steers = [None, f"context-knob:path={file}", f"context-knob:path={file},turn=-1", None]
    alone = [text(llm, steer) for steer in steers]
    for draft in ("none", "suffix", "self-skip:skip=0"):
        made = load(path, draft=draft)
        many = made.generate([PROMPT] * 4, [PARAMS.but(steer=steer) for steer in steers])
        assert [one.outputs[0].token_ids for one in many] == alone, draft
        assert not any(one.outputs[0].stats.fault for one in many)


def test_its_context_is_shared_with_plain_texts_and_what_it_wrote_is_not(path: Path, file: Path) -> None:
    steer, fresh = f"context-knob:path={file}", load(path, prefix_sharing=False)
    made = load(path)
    tokens = made.tokenizer.encode(PROMPT)
    text(made, None)
    (steered,) = made.generate(PROMPT, PARAMS.but(steer=steer))
    assert steered.cached_tokens == (len(tokens) - 1) // 32 * 32 > 0
    assert steered.outputs[0].token_ids == text(fresh, steer)
    longer = {"prompt_token_ids": [*tokens, *steered.outputs[0].token_ids]}
    for one in (None, steer):
        (after,) = made.generate(longer, PARAMS.but(steer=one))
        assert after.outputs[0].token_ids == text(fresh, one, longer), "rows that were steered are plain now"


# ---- files


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"u": np.zeros(3, np.float32)}, "not a complete file of context-knob: u of "),
        ({"layer": 2}, "layer = 2: 0 to 1 is allowed"),
        ({"layer": -1}, "layer = -1: 0 to 1"),
        ({"layer": "1"}, "not a complete file of context-knob"),
        ({"context": None}, "not a complete file of context-knob"),
    ],
)
def test_a_wrong_file(llm: LLM, tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(CheckpointError, match=message):
        ContextKnob(path=trained(llm, tmp_path, **changes)).open(llm.runner)


def test_without_a_file_the_error_says_how_to_make_one(llm: LLM, tmp_path: Path) -> None:
    with pytest.raises(InvalidInput, match=f"context-knob: no file {tmp_path}/x; make one with: python -m redraft_train.knob .* --out"):
        llm.generate(PROMPT, steer=f"context-knob:path={tmp_path}/x")


def test_a_file_of_another_model(llm: LLM, tmp_path: Path) -> None:
    other = tiny_llama(tmp_path / "other", num_hidden_layers=4)
    with pytest.raises(InvalidInput, match="was made for the model with hash"):
        load(other).generate(PROMPT, steer=f"context-knob:path={trained(llm, tmp_path)}")


@pytest.mark.parametrize("options", ["strength=2", "turn=inf", "c=nan"])
def test_options(llm: LLM, options: str) -> None:
    with pytest.raises(InvalidInput, match=f"context-knob:{options.partition('=')[0]}="):
        llm.generate(PROMPT, steer=f"context-knob:{options}")
