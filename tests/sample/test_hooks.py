"""What a grammar needs from a processor: a state per path, the bytes of a token, and ending the text. A toy uses all three."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any, Self

import numpy as np
import pytest

from redraft import LLM, SamplingParams, registry
from redraft.core.noise import mix
from redraft.errors import InvalidInput
from redraft.sample.processors.processor import Ending, Path, Row, Vocabulary
from redraft.sample.sampler import Sampler
from tests.sample.controls.toys import TOYS
from tests.sample.toy import begun

V = 12


@dataclass(frozen=True)
class Brackets(Ending):
    """Digits in balanced brackets, at most three deep; the text ends when the first bracket closes. Seed 77 selects it."""

    pieces: list[bytes]
    path: Path[tuple[int, bool]]

    @classmethod
    def of(cls, params: SamplingParams, vocabulary: Vocabulary) -> Self | None:
        if params.seed != 77:
            return None
        if vocabulary.bytes_of is None:
            raise InvalidInput("brackets need a tokenizer")
        pieces = [vocabulary.bytes_of(token) for token in range(vocabulary.size)]

        def advance(state: tuple[int, bool], token: int) -> tuple[int, bool]:
            depth = state[0] + {b"(": 1, b")": -1}.get(pieces[token], 0)
            return depth, depth == 0

        return cls(pieces, Path(lambda seq: (0, False), advance))

    def apply(self, row: Row) -> None:
        depth, _ = self.path.at(row.seq, row.drafted)
        allowed = [b"("] if depth == 0 else [b"0", b"1", b")", *([b"("] if depth < 3 else [])]
        row.values[[i for i, piece in enumerate(self.pieces) if piece not in allowed]] = -np.inf

    def finished(self, seq: Any, tokens: Any) -> bool:
        return self.path.at(seq, tokens)[1]


@pytest.fixture
def brackets(monkeypatch: pytest.MonkeyPatch) -> None:
    first = {"brackets": f"{__name__}:Brackets", **registry.PROCESSORS}
    monkeypatch.setattr(registry, "PROCESSORS", first)


def test_a_state_by_path_is_computed_once_for_each_node() -> None:
    sampler = Sampler(V, frozenset())
    seq = begun(sampler, [1, 2, 3], prompt_len=2)
    calls: list[int] = []

    def advance(state: tuple[int, ...], token: int) -> tuple[int, ...]:
        calls.append(token)
        return (*state, token)

    path = Path(lambda seq: tuple(seq.tokens[: seq.prompt_len]), advance)
    assert path.at(seq, []) == (1, 2, 3) and path.at(seq, [7, 8]) == (1, 2, 3, 7, 8) and path.at(seq, (7, 9)) == (1, 2, 3, 7, 9)
    assert path.at(seq, [7, 8]) == (1, 2, 3, 7, 8) and calls == [3, 7, 8, 9]
    seq.tokens += [9, 4]  # the draft was rejected
    assert path.at(seq, [7]) == (1, 2, 3, 9, 4, 7) and calls == [3, 7, 8, 9, 9, 4, 7]


@pytest.mark.usefixtures("brackets")
def test_a_grammar_ends_its_text_whatever_is_drafted() -> None:
    llm = LLM("embedded", dtype="float64", draft="none", cache_memory=1 << 26)
    params = SamplingParams(temperature=1.5, seed=77, max_tokens=60, n=3)
    prompts = ["x = (", "def f(a):", "(1)(0)(1)"]
    plain = llm.generate(prompts, params)
    for draft in ("token-recycling", "copyspec"):
        drafted = llm.sibling(draft=draft).generate(prompts, params)
        assert [[one.token_ids for one in output.outputs] for output in drafted] == [
            [one.token_ids for one in output.outputs] for output in plain
        ]
    texts = [(one.text, one.finish_reason) for output in plain for one in output.outputs]
    assert any(reason == "stop" for _, reason in texts)
    for text, reason in texts:
        depths = np.cumsum([{"(": 1, ")": -1}.get(letter, 0) for letter in text])
        assert set(text) <= set("01()") and depths.max() <= 3 and depths[:-1].min(initial=1) > 0
        assert (depths[-1] == 0) == (reason == "stop")
    assert llm.generate(prompts[0], params.but(min_tokens=40, n=1))[0].outputs[0].text.count("(") > 1


@pytest.mark.usefixtures("brackets")
def test_a_processor_may_need_a_tokenizer() -> None:
    with pytest.raises(InvalidInput, match="brackets need a tokenizer"):
        Sampler(V, frozenset()).check(SamplingParams(seed=77))


@pytest.mark.parametrize("name", registry.PROCESSORS)
def test_the_others_work_without_one(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Simulates that the processor's file and its registry line are deleted."""
    module = registry.PROCESSORS[name].split(":")[0]
    monkeypatch.setattr(
        registry, "PROCESSORS", {key: target for key, target in registry.PROCESSORS.items() if not target.startswith(f"{module}:")}
    )
    monkeypatch.setitem(sys.modules, module, None)  # importing it raises
    fields = {"temperature": 0.5, "top_k": 5, "top_p": 0.9, "min_p": 0.01, "typical_p": 0.9, "presence_penalty": 0.5}
    fields |= {"dry_multiplier": 1, "top_n_sigma": 2, "xtc_probability": 1, "control": TOYS}
    sampler = Sampler(V, frozenset({0}), lambda text: [[4]], bytes_of=lambda token: b"%c" % (96 + token), plain=lambda text: [1])
    one = {"min-tokens": {"min_tokens": 2}, "temperature": {}, "mirostat": {"mirostat": 2}}
    other = {"grammar": {"structured_outputs": {"regex": "[a-c]+"}}, "dynamic-temperature": {"dynatemp_range": 0.2}}
    for chosen, left in ((one, other), (other, one)):  # those of one exclude some of the other
        more = {field: value for given in chosen.values() for field, value in given.items()}
        seq = begun(sampler, [1, 2], logit_bias={3: 1.0}, bad_words="x", **fields, **more)
        assert len(seq.state[sampler]) == len(registry.PROCESSORS.keys() - left.keys())
        row = sampler.row(np.random.default_rng(mix(1)).normal(size=V), seq, [])
        assert len(row.ids) and np.isfinite(row.values).any()
