"""Token prepending: a placeholder follows the last row between layers, layers above `out` never run, and a text stands for itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from redraft import LLM
from redraft.engine.prepend import PLACEHOLDER, Prepend, quoted
from redraft.errors import InvalidInput, PromptTooLong
from redraft.ops import library
from redraft.ops.arrays import array
from tests.checkpoints import tiny_llama

NATIVE = library.PATH.exists() and library.load() is not None
EXACT = ["numpy", *(["native"] if NATIVE else [])]
TEXTS = [
    "A cat sat on the mat",
    "Is this right?",
    'He said "no" to me!',
    "A much longer text, which fills more than one page of the cache.",
]
METHOD = Prepend(start=1, exit=2, out=-2)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_llama(tmp_path_factory.mktemp("prepend") / "model", num_hidden_layers=5)


def load(path: Path, backend: str = "numpy", **options: Any) -> LLM:
    return LLM(str(path), backend=backend, dtype="float32", threads=1, max_model_len=200, **options)


def by_transformers(path: Path, method: Prepend, text: str) -> np.ndarray[Any, Any]:
    """With hooks before layers."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path, dtype=torch.float64).eval()
    tokens, place = method.tokens(text, load(path).tokenizer)

    def follow(module: Any, given: Any) -> Any:
        h = given[0].clone()
        h[:, place] = h[:, -1]
        return (h, *given[1:])

    for layer in model.model.layers[method.start : method.exit]:
        layer.register_forward_pre_hook(follow)
    with torch.no_grad():
        found: np.ndarray[Any, Any] = model(torch.tensor([tokens]), output_hidden_states=True).hidden_states[method.out][0, -1].numpy()
    return found


@pytest.mark.torch
@pytest.mark.parametrize("method", [METHOD, Prepend(1, 4, -1), Prepend(0, 3, 4), Prepend(2, 2, -2)], ids=str)
@pytest.mark.parametrize("backend", [*EXACT, "torch"])
def test_is_what_hooks_between_layers_of_transformers_give(path: Path, method: Prepend, backend: str) -> None:
    found = load(path, backend).embed(TEXTS, prepend=method, normalize=False)
    for own, text in zip(found, TEXTS, strict=True):
        np.testing.assert_allclose(own, by_transformers(path, method, text), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("backend", EXACT)
def test_a_text_stands_for_itself(path: Path, backend: str) -> None:
    llm = load(path, backend)
    together = llm.embed(TEXTS * 4, prepend="start=1,exit=2,out=-2")
    for one, text in zip(together, TEXTS * 4, strict=True):
        (alone,) = llm.embed(text, prepend=METHOD)
        assert np.array_equal(one, alone) and np.linalg.norm(one) == pytest.approx(1)
    assert llm.engine.memory.used() == 0 and not llm.runner.table.prefix.nodes, "nothing of it is cached"


def test_without_layers_between_it_is_the_plain_prompt(path: Path) -> None:
    llm = load(path)
    tokens, place = METHOD.tokens(TEXTS[0], llm.tokenizer)
    assert tokens[place] == PLACEHOLDER
    (inert,) = llm.embed(TEXTS[0], prepend="start=3,exit=3,out=-1")
    (plain,) = llm.embed({"prompt_token_ids": tokens})
    assert np.array_equal(inert, plain)
    (follows,) = llm.embed(TEXTS[0], prepend="start=1,exit=3,out=-1")
    assert not np.allclose(follows, plain, atol=1e-3)


def test_layers_above_never_run(path: Path) -> None:
    llm = load(path)
    for layer in llm.runner.weights.layers[3:]:
        array(layer.qkv.weight)[:] = np.nan
    assert np.isfinite(llm.embed(TEXTS[0], prepend="start=1,exit=3,out=3")).all()
    assert not np.isfinite(llm.embed(TEXTS[0], prepend="start=1,exit=3,out=4")).all()


def test_beside_a_text_that_is_being_generated(path: Path) -> None:
    llm = load(path)
    (wanted,) = llm.generate("abc", temperature=0, max_tokens=20)
    vectors, pieces = llm.embed(TEXTS, prepend=METHOD), []
    for piece in llm.stream("abc", temperature=0, max_tokens=20):
        pieces += piece.token_ids
        assert np.array_equal(llm.embed(TEXTS, prepend=METHOD), vectors)
    assert pieces == wanted.outputs[0].token_ids


def test_quoted_texts() -> None:
    assert [quoted(text) for text in (" a ", "a.", "a?", 'say "b"', "a!")] == ["a.", "a.", "a.", "say 'b'.", "a!"]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"prepend": "exit=0"}, "prepend: exit = 0: must be start = 1"),
        ({"prepend": "out=6"}, "prepend: out = 6: 1 to 5 or -5 to -1 is allowed"),
        ({"prepend": "out=0"}, "prepend: out = 0: 1 to 5"),
        ({"prepend": "exit=5"}, "prepend: exit = 5: must be 4 or less"),
        ({"prepend": "begin=1"}, "unknown option 'begin' of prepend"),
        ({"prepend": 3}, "prepend = 3: options such as"),
        ({"prepend": METHOD, "pooling": "mean"}, "pooling = 'mean': with prepend"),
        ({"prepend": METHOD, "lora": "x"}, "lora = 'x'"),
        ({"prepend": "template=TEXT"}, "prepend: template = 'TEXT': <PST> and"),
        ({"prepend": METHOD, "prompts": [1, 2]}, r"prompts\[0\]: with prepend only a text is allowed"),
    ],
)
def test_what_is_refused(path: Path, given: dict[str, Any], message: str) -> None:
    with pytest.raises(Exception, match=rf"^{message}") as caught:
        load(path).embed(**{"prompts": "a", **given})
    assert isinstance(caught.value, InvalidInput) or "unknown option" in str(caught.value)


def test_a_text_that_is_too_long(path: Path) -> None:
    with pytest.raises(PromptTooLong, match=r"prompt has 2.. tokens with its template: max_model_len allows 199"):
        load(path).embed("a" * 220, prepend=METHOD)
