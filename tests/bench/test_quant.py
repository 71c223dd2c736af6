"""Ways to store the weights, side by side."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from gguf import GGMLQuantizationType as Kind

from redraft.bench import quant
from redraft.bench.divergence import rows
from redraft.errors import InvalidInput
from redraft.llm import LLM
from redraft.ops import library
from tests import checkpoints
from tests.models.gguf import files

Ran = tuple[int, str, str]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    own = checkpoints.tiny_llama(folder / "own", hidden_size=64, intermediate_size=96)
    return str(files.write(own, folder / "q.gguf", Kind.Q4_0))


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "a.txt"
    path.write_text(" ".join(f"line {i} of {i * i}" for i in range(300)))
    return path


def test_a_quantized_file_is_a_way_of_its_own(model: str, tmp_path: Path) -> None:
    assert list(quant.ways(model)) == ["16 bit", "int4", "int8", "stored"]
    assert "stored" not in quant.ways(str(checkpoints.tiny_llama(tmp_path / "plain", hidden_size=64)))


def test_figures(model: str, text: Path) -> None:
    """The first way is the measure of the others; fewer bits, fewer bytes; the perplexity is that of the rows."""
    options = quant.QuantOptions((text,), tokens=60, length=32, decoded=4, rounds=2)
    plain, int4, int8, stored = quant.measure(model, options)
    assert (
        plain.kl == 0 and plain.agreement == 1 and all(len(way.speeds) == 2 and min(way.speeds) > 0 for way in (plain, stored, int4, int8))
    )
    assert 0 < int8.kl < int4.kl and stored.kl > 0
    if not library.why_not():
        assert max(stored.bytes, int8.bytes) < plain.bytes
    llm = LLM(model, dtype="bfloat16", quant="none", draft="none", cache_memory=1 << 22)
    tokens = llm.tokenizer.encode(text.read_text())[:32]
    expected = [quant._log_softmax(row)[token] for row, token in zip(rows(llm, tokens), tokens[1:], strict=False)]
    one = quant.QuantOptions((text,), tokens=31, length=32, decoded=1, rounds=1)
    assert quant.measure(model, one)[0].perplexity == pytest.approx(float(pow(2.718281828459045, -sum(expected) / len(expected))))


def test_the_verb(model: str, text: Path, tmp_path: Path, redraft: Callable[..., Ran]) -> None:
    found, page = tmp_path / "q.json", tmp_path / "q.html"
    words = ("bench", "quant", model, "--tokens", "60", "--length", "32", "--decoded", "2", "--rounds", "1")
    code, out, err = redraft(*words, "--texts", str(text), "--json", str(found), "--html", str(page))
    assert code == 0, err
    assert all(name in out for name in ("16 bit", "stored", "int8", "int4", "same token")) and max(map(len, out.splitlines())) <= 80
    assert [way["name"] for way in json.loads(found.read_text())["ways"]] == ["16 bit", "int4", "int8", "stored"]
    assert page.read_text().count("<svg") == 3
    assert redraft(*words)[::2] == (2, "error: --texts: at least one file of text is needed\n")


def test_a_text_that_is_too_short(model: str, tmp_path: Path) -> None:
    path = tmp_path / "short.txt"
    path.write_text("two words")
    with pytest.raises(InvalidInput, match="no text has 128 tokens"):
        quant.measure(model, quant.QuantOptions((path,), length=512 // 4))
    with pytest.raises(InvalidInput, match="--length 512, --decoded 64: the model's context is 256"):
        quant.measure(model, quant.QuantOptions((path,)))
