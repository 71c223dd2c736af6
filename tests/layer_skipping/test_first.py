"""Routers choose the layers from the prompt: tests of the votes, of the text against a dense definition, and of the file."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np
import pytest

from redraft import registry
from redraft.config import SamplingParams
from redraft.core.sequence import Request
from redraft.engine.engine import Engine
from redraft.errors import CheckpointError, InvalidInput, Unsupported
from redraft.layer_skipping.first import METHOD, FiRST
from redraft.models.trained import Trained, model_hash
from tests.contracts import plain
from tests.contracts.drafters import RandomTrees
from tests.contracts.identity import SAMPLING, drive, prompts
from tests.layer_skipping.deep import ALL, LAYERS, deep, engine, logits, requests

HIDDEN = 32
WEIGHT = np.random.default_rng(0).standard_normal((LAYERS, HIDDEN)).astype(np.float32) / 4
BIAS = np.zeros(LAYERS, np.float32)


@pytest.fixture
def routers(tmp_path: Path) -> Path:
    return save(engine(), tmp_path / "routers")


def save(made: Engine, path: Path, weight: np.ndarray = WEIGHT, bias: np.ndarray = BIAS) -> Path:
    Trained(METHOD, model_hash(made.runner), {}, {"weight": weight, "bias": bias}).save(path)
    return path


def skipping(routers: Path, **more: object) -> SamplingParams:
    return SAMPLING["sampled"].but(depth=f"first:path={routers}", **more)


@cache
def inputs(tokens: tuple[int, ...]) -> list[np.ndarray]:
    """The inputs [T, hidden] of every layer of the deep model, densely."""
    spec, weights = deep()
    x = np.asarray(weights.embed)[list(tokens)]
    found = []
    for layer, w in zip(spec.layers, weights.layers, strict=True):
        found.append(x)
        x = x + plain.linear(plain.attention(plain.linear(plain.rms(x, w.attn_norm, layer.norm), w.qkv), layer.mixer), w.out)
        x = x + plain.mlp(plain.rms(x, w.mlp_norm, layer.norm), w)
    return found


def kept(tokens: tuple[int, ...], bias: np.ndarray = BIAS) -> frozenset[int]:
    votes = [(1 / (1 + np.exp(-(h @ w + b)))).mean() for h, w, b in zip(inputs(tokens), WEIGHT.astype(float), bias, strict=True)]
    return frozenset({0, LAYERS - 1, *(i for i, vote in enumerate(votes) if vote >= 0.5)})


@cache
def expected(number: int, context: int | None = None, skips: bool = True) -> list[int]:
    prompt, params = prompts()[number], SAMPLING["sampled"]
    tokens, given = list(prompt), context or len(prompt)
    layers = kept(prompt[:given]) if skips else ALL
    assert params.max_tokens is not None
    for _ in range(params.max_tokens):
        row = logits(tokens, [ALL] * given + [layers] * (len(tokens) - given))[-1]
        tokens.append(plain.draw(row, params, 100 + number, tokens)[0])
    return tokens[len(prompt) :]


# ---- the text


def test_prompts_choose_different_layers() -> None:
    assert len({kept(prompt) for prompt in prompts()[:4]}) > 1, "otherwise the tests below show little"


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_the_text_is_that_of_the_definition(backend: str, routers: Path) -> None:
    seen = drive(engine(backend=backend), requests(skipping(routers), 3), (0, 0, 1))
    assert seen.texts == {str(i): expected(i) for i in range(3)}
    assert expected(0) != expected(0, skips=False)


@pytest.mark.parametrize("drafts", [False, True])
@pytest.mark.parametrize(("arrivals", "chunk", "pool"), [((0,) * 4, 512, 40), ((0, 1, 3, 3), 7, 40), ((0, 0, 2, 5), 24, 6)])
def test_drafts_chunks_batches_and_preemption_change_nothing(
    drafts: bool, arrivals: tuple[int, ...], chunk: int, pool: int, routers: Path
) -> None:
    known = {(str(i), 0): expected(i, skips=bool(i % 2)) for i in range(4)}
    trees = RandomTrees(plain.VOCAB, seed=2, right=0.8, known=known)
    made = engine((lambda runner, sampler: trees) if drafts else None, chunk=max(chunk, 8), pool=pool)
    asked = requests(SAMPLING["sampled"])
    for request in asked[1::2]:
        request.params = request.params.but(depth=f"first:path={routers}")
    seen = drive(made, asked, arrivals)
    assert seen.texts == {str(i): known[str(i), 0] for i in range(4)}
    assert bool(seen.accepted and seen.rejected) == drafts and bool(seen.preempted) == (pool == 6)
    assert not any(seq.state for request in asked for seq in request.sequences)


def test_votes_do_not_depend_on_chunks(routers: Path) -> None:
    found = []
    for chunk in (8, 16, 512):
        made = engine(chunk=chunk)
        (request,) = requests(skipping(routers), 1)
        made.add(request)
        while not request.sequences or request.sequences[0].stored < len(request.prompt):
            made.step()
        (seq,) = request.sequences
        (votes,) = seq.state[seq.cache.depth]
        found.append((votes.rows, *votes.total))
        assert seq.layers is not None and seq.layers.attention == kept(tuple(request.prompt))
    np.testing.assert_allclose(found, [found[0]] * 3, rtol=1e-12)
    assert found[0][0] == len(prompts()[0])


def test_n_texts_have_the_layers_of_their_prompt(routers: Path) -> None:
    request = Request("r", list(prompts()[1]), skipping(routers, seed=101, n=3))
    made = engine()
    seen = drive(made, [request], (0,))
    assert seen.texts["r/0"] == expected(1) and len({tuple(text) for text in seen.texts.values()}) == 3


def test_only_the_context_votes(routers: Path) -> None:
    (request,) = requests(skipping(routers), 1)
    request.context = 17
    seen = drive(engine(chunk=24), [request], (0,))
    assert seen.texts["0"] == expected(0, 17) and kept(prompts()[0][:17]) != kept(prompts()[0])


def test_the_whole_prompt_runs_each_time(routers: Path) -> None:
    made = engine()
    for name in "01":
        (request,) = requests(skipping(routers), 1)
        request.id = name
        seen = drive(made, [request], (0,))
        assert seen.texts[name] == expected(0) and not seen.cached


@pytest.mark.parametrize("bias", [40.0, -40.0])
def test_routers_that_agree_keep_all_layers_or_two(bias: float, tmp_path: Path) -> None:
    path = save(engine(), tmp_path, bias=np.full(LAYERS, bias, np.float32))
    (request,) = requests(skipping(path), 1)
    made = engine()
    made.add(request)
    while not request.sequences or request.sequences[0].stored < len(request.prompt):
        made.step()
    (seq,) = request.sequences
    assert seq.layers is not None and seq.layers.attention == (ALL if bias > 0 else {0, LAYERS - 1})
    if bias > 0:
        again = requests(skipping(path), 1)
        assert drive(engine(), again, (0,)).texts["0"] == expected(0, skips=False)


# ---- the file


def test_without_a_file_it_says_how_to_make_one(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("REDRAFT_CACHE", str(tmp_path))
    with pytest.raises(InvalidInput, match=r"first: no routers .*make them with: python -m redraft_train.routers"):
        engine().add(requests(SAMPLING["greedy"].but(depth="first"), 1)[0])


def test_files_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    made = engine()
    other = Trained(METHOD, "0" * 64, {}, {"weight": WEIGHT, "bias": BIAS}).save(tmp_path / "other")
    with pytest.raises(InvalidInput, match=r"first: .* was made for the model with hash 000"):
        FiRST(other).open(made.runner)
    small = save(made, tmp_path / "small", weight=WEIGHT[:, :5])
    with pytest.raises(CheckpointError, match=r"small: routers of 6 layers need the arrays weight \[6, 32\] and bias \[6\]"):
        FiRST(small).open(made.runner)


def test_a_threshold_is_a_probability() -> None:
    with pytest.raises(InvalidInput, match=r"first:threshold=2\.0: must be 0 to 1"):
        registry.create("depth", "first:threshold=2")


def test_spans_of_an_edited_text_cast_no_votes(routers: Path) -> None:
    (request,) = requests(skipping(routers), 1)
    request.reuse, request.before = "pie", [1, 2, 3]
    with pytest.raises(Unsupported, match="reads every row of the context, but reuse pie skips parts of it"):
        engine().add(request)
