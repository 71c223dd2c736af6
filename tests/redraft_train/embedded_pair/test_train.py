"""The trainer: schedule, resumption, tokenizer, split, export."""

from __future__ import annotations

import random
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer, LlamaConfig

from redraft_train.embedded_pair import corpus, export, pretrain, recipe
from redraft_train.embedded_pair import tokenizer as bpe

CONTEXT = 16
VOCABULARY = 300


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    """The models here are so small that a second thread only waits."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    source = Path(bpe.__file__).read_text()
    return bpe.train([source, "def f(x):\n        return x  # eight spaces\n" * 20], VOCABULARY + 300)


def tiny(vocabulary: int = VOCABULARY) -> LlamaConfig:
    return LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=16,
        intermediate_size=48,
        max_position_embeddings=4 * CONTEXT,
        tie_word_embeddings=True,
        bos_token_id=0,
        eos_token_id=1,
    )


def trainer(folder: Path) -> pretrain.Trainer:
    plan = pretrain.Plan(
        tokens=12 * 128,
        batch=128,
        phases=(pretrain.Phase(0.75, CONTEXT), pretrain.Phase(0.25, 4 * CONTEXT)),
        warmup=0.25,
        evaluate_every=4,
        save_every=100,
    )
    random_ids = np.random.default_rng(0)
    documents = [random_ids.integers(0, VOCABULARY, 50).astype(np.uint16) for _ in range(20)]
    mixture = corpus.Mixture({"a": documents, "b": documents[:5]}, {"a": 0.5, "b": 0.5}, plan.seed)
    held_out = {"a": corpus.windows(np.concatenate(documents), 4 * CONTEXT)}
    return pretrain.Trainer(pretrain.build(tiny(), plan.seed), plan, mixture, held_out, folder)


@pytest.mark.parametrize(("progress", "rate"), [(0.0, 0.0), (0.01, 0.5), (0.02, 1.0), (0.5, 1.0), (0.75, 1.0), (0.875, 0.5), (1.0, 0.0)])
def test_schedule_at_its_corners(progress: float, rate: float) -> None:
    assert pretrain.rate_at(progress, warmup=0.02, decay=0.25) == pytest.approx(rate)


def test_schedule_without_warmup_or_decay_is_flat() -> None:
    assert [pretrain.rate_at(progress, 0.0, 0.0) for progress in (0.0, 0.5, 1.0)] == [1.0, 1.0, 1.0]


def test_a_resumed_run_ends_with_the_same_bits_and_has_learnt(tmp_path: Path) -> None:
    whole = trainer(tmp_path / "whole")
    before = whole.evaluate()["a"]
    whole.run()
    assert whole.evaluate()["a"] < before
    for stop in (3, 10):  # once in either phase
        trainer(tmp_path / "parts").run(until=stop)
    last = trainer(tmp_path / "parts")
    assert last.step == 10
    last.run()
    expected = whole.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in last.model.state_dict().items())
    assert (tmp_path / "parts" / "log.jsonl").read_text().count("\n") == 3
    assert not list(tmp_path.rglob("*.partial"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"phases": (pretrain.Phase(0.5, 256),)}, "add up to 1"),
        ({"batch": 1000}, "whole rows"),
        ({"tokens": 100}, "less than a step"),
    ],
)
def test_a_plan_that_cannot_work_says_why(change: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        pretrain.Plan(**({"tokens": 10**6} | change))


def test_tokenizer_round_trips_any_text(tokenizer: Tokenizer) -> None:
    generator = random.Random(0)
    texts = [
        "",
        "\n\n\n    \t  x\r\n \n",
        "naïve — 日本語 👩‍👩‍👧 \x00\x7f\u2028",
        "if x:\n            return 12345  \n\n\ndef f(): 'it''s'",
        *("".join(chr(generator.choice([generator.randrange(128), generator.randrange(0xD7FF)])) for _ in range(200))
          for _ in range(50)),
    ]  # fmt: skip
    for text in texts:
        assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=True) == text


def test_tokenizer_starts_with_bos_and_keeps_digits_apart_and_indents_together(tokenizer: Tokenizer) -> None:
    encoding = tokenizer.encode("        return 420")
    assert encoding.ids[0] == 0
    assert encoding.tokens[-3:] == ["4", "2", "0"]
    assert encoding.tokens[1] == "Ġ" * 7
    assert (tokenizer.token_to_id(bpe.BOS), tokenizer.token_to_id(bpe.EOS)) == (0, 1)


def test_split_keeps_equal_texts_on_one_side() -> None:
    documents = [corpus.Document("a", f"{copy}/{i}", f"text {i}\n") for i in range(2000) for copy in "xy"]
    training, held = corpus.split(documents)
    assert len(training) + len(held) == len(documents)
    assert not {document.text for document in training} & {document.text for document in held}
    assert 0.01 < len(held) / len(documents) < 0.03


def test_mixture_keeps_the_shares_and_is_the_same_for_a_seed() -> None:
    encoded = {"a": [np.full(100, 1, np.uint16)], "b": [np.full(7, 2, np.uint16)] * 3}
    rows = corpus.Mixture(encoded, {"a": 0.75, "b": 0.25}, 1).rows(40, CONTEXT)
    assert rows.shape == (40, CONTEXT + 1)
    assert (rows == 1).all(axis=1).sum() == 30
    assert np.array_equal(rows, corpus.Mixture(encoded, {"a": 0.75, "b": 0.25}, 1).rows(40, CONTEXT))


def test_windows_overlap_by_their_target() -> None:
    assert corpus.windows(np.arange(8), 3).tolist() == [[0, 1, 2, 3], [3, 4, 5, 6]]


def test_standard_library_has_source_and_no_tests() -> None:
    names = {document.name for document in corpus.standard_library()}
    assert {"os.py", "json/decoder.py"} <= names
    assert not any(name.startswith(("test/", "site-packages/")) for name in names)


def test_separated_file_parts_documents_and_normalises_newlines(tmp_path: Path) -> None:
    path = tmp_path / "texts.txt"
    path.write_bytes(b"one\r\nmore\n<|endoftext|>\ntwo\n")
    assert [document.text for document in corpus.separated_file(path, "peps")] == ["one\nmore\n", "two\n"]


def test_a_missing_corpus_is_named(tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = tmp_path / "peps.txt"
    with pytest.raises(FileNotFoundError, match=str(missing)):
        corpus.separated_file(missing, "peps")
    monkeypatch.setenv("GLIBC_TUNABLES", "")
    monkeypatch.setattr("sys.argv", ["recipe", "--peps", str(missing), "--work", str(tmp_path)])
    with pytest.raises(SystemExit):
        recipe.main()
    assert f"no corpus file at {missing}" in capsys.readouterr().err


def test_export_loads_in_transformers_with_the_same_logits(tmp_path: Path, tokenizer: Tokenizer) -> None:
    model = pretrain.build(tiny(tokenizer.get_vocab_size()), seed=3)
    result = export.Result(0, 100, {"peps": 6.0}, {"peps": 3.0}, "python -m redraft_train.embedded_pair.recipe")
    folder = tmp_path / "target"
    export.write(model, tokenizer, result, folder)
    assert AutoModelForCausalLM.from_pretrained(folder).dtype == torch.bfloat16
    loaded = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    ids = torch.tensor([tokenizer.encode("def f(x):\n    return 1\n").ids])
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        assert torch.equal(loaded(ids).logits, model(ids).logits)

    reader = AutoTokenizer.from_pretrained(folder)
    assert reader("def f").input_ids == tokenizer.encode("def f").ids
    assert (reader.bos_token_id, reader.eos_token_id) == (0, 1)
    chat = reader.apply_chat_template([{"role": "user", "content": "Why?"}], tokenize=False, add_generation_prompt=True)
    assert chat == "<s>Question: Why?\n\nAnswer:"
    assert "unfinished" in (folder / "MODEL_CARD.md").read_text()
    assert [path.name for path in tmp_path.iterdir()] == ["target"]


def test_the_pair_has_its_sizes() -> None:
    target, draft = (pretrain.build(member.config, 0).num_parameters() for member in recipe.PAIR)
    assert 7.5 < target / draft < 9
    assert 2 * (target + draft) < 32e6
