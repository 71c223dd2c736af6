"""States and distributions of texts: those of the engine, whatever the pieces; a folder that is complete or absent."""

from __future__ import annotations

from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from redraft import LLM, SamplingParams
from redraft.core.taps import Taps
from redraft.errors import CheckpointError
from redraft.models import loader
from redraft_train import states
from redraft_train.states import KEPT, ROWS, States
from redraft_train.texts import Text

CODE = "def add(a, b):\n    return a + b\n\n\nclass Stack:\n    def push(self, item):\n        self.items.append(item)\n"


def text(tokens: list[int], answers: list[tuple[int, int]] | None = None, held: bool = False) -> Text:
    return Text("a", 0, held, 0.0, tokens, answers or [(1, len(tokens))])


@pytest.fixture(scope="module")
def tokens(llm: LLM) -> list[int]:
    return llm.tokenizer.encode(CODE * 8)[: ROWS + 70]


@pytest.fixture(scope="module")
def found(llm: LLM, tokens: list[int], tmp_path_factory: pytest.TempPathFactory) -> States:
    given = [text(tokens[:1]), text(tokens[:40], [(10, 20), (30, 40)], held=True), text(tokens), text(tokens[:3])]
    ticks: list[int] = []
    folder = tmp_path_factory.mktemp("states") / "states"
    made = states.write(llm.runner, given, folder, [2], tick=ticks.append)
    assert sum(ticks) == sum(len(one.tokens) for one in given) and max(ticks) <= ROWS
    assert [path.name for path in folder.parent.iterdir()] == ["states"]
    return made


def test_texts_lie_one_behind_the_other(found: States, tokens: list[int]) -> None:
    assert found.starts.tolist() == np.cumsum([0, 1, 40, len(tokens), 3]).tolist()
    assert found.tokens.tolist() == tokens[:1] + tokens[:40] + tokens + tokens[:3]
    assert np.flatnonzero(found.answer[1:41]).tolist() == [*range(10, 20), *range(30, 40)]
    assert found.held.tolist() == [False, True, False, False]


def test_distributions_are_those_of_the_engine(llm: LLM, found: States, tokens: list[int]) -> None:
    params = SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=4, draft="none")
    logprobs = llm.generate({"prompt_token_ids": tokens}, params)[0].prompt_logprobs
    own = slice(int(found.starts[2]), int(found.starts[3]))
    ids, logs = found.top_ids[own], found.top_logits[own] - found.log_sum[own, None]
    assert ids.shape == (len(tokens), KEPT)
    for at, one in enumerate(logprobs[1:]):
        assert one is not None
        assert [token for token, _ in one.top] == ids[at, :4].tolist()
        assert [log for _, log in one.top] == pytest.approx(logs[at, :4].tolist(), abs=1e-4)
    assert (np.diff(logs, axis=1) <= 0).all() and (np.exp(logs).sum(1) <= 1 + 1e-5).all()


def test_the_head_makes_the_logits_of_the_final_states(llm: LLM, found: States) -> None:
    rows = found.final.view(ml_dtypes.bfloat16).astype(np.float32)
    weights = loader.read(loader.inspect(loader.resolve("embedded"), "float32"))
    logits = rows @ np.asarray(weights.head.weight).T  # type: ignore[union-attr]
    assert (logits.argmax(1) == found.top_ids[:, 0]).mean() > 0.97  # states are rounded to bfloat16
    assert np.allclose(np.take_along_axis(logits, found.top_ids[:, :1].astype(np.int64), 1), found.top_logits[:, :1], atol=0.2)


def test_a_text_has_the_same_numbers_alone_and_beside_others(found: States, tokens: list[int]) -> None:
    short, long = (slice(int(found.starts[i]), int(found.starts[i]) + 40) for i in (1, 2))
    assert np.array_equal(found.tokens[short], found.tokens[long])
    for name in ("final", "top_ids"):
        assert (getattr(found, name)[short] == getattr(found, name)[long]).mean() > 0.99
    assert np.allclose(found.log_sum[short], found.log_sum[long], atol=1e-3)


def test_layers_are_those_of_the_runner(llm: LLM, found: States, tokens: list[int], tmp_path: Path) -> None:
    alone = next(rows for _, rows in states._passes(llm.runner, [text(tokens[:40])], Taps(hidden=frozenset({2}), logits=True)))
    kept = found.layers[2][found.starts[1] : found.starts[2]].view(ml_dtypes.bfloat16).astype(np.float32)
    assert np.allclose(kept, alone.hidden[2], rtol=0.01, atol=0.01)
    assert found.layers.keys() == {2} and not np.allclose(kept, found.final[1:41].view(ml_dtypes.bfloat16).astype(np.float32), atol=0.1)


def test_no_time_makes_one_group_of_texts(llm: LLM, tokens: list[int], tmp_path: Path) -> None:
    made = states.write(llm.runner, [text(tokens[:200]), text(tokens[:100])], tmp_path / "states", seconds=0)
    assert made.starts.tolist() == [0, 200] and len(made.tokens) == len(made.final) == len(made.log_sum) == 200


def test_an_interruption_leaves_no_folder_and_the_old_one(llm: LLM, tokens: list[int], tmp_path: Path) -> None:
    def stop(rows: int) -> None:
        raise KeyboardInterrupt

    used = llm.runner.memory.used
    for there in ([], ["states"]):
        with pytest.raises(KeyboardInterrupt):
            states.write(llm.runner, [text(tokens[:9])], tmp_path / "states", tick=stop)
        assert [path.name for path in tmp_path.iterdir()] == there
        states.write(llm.runner, [text(tokens[:5])], tmp_path / "states")
    assert len(States.open(tmp_path / "states").tokens) == 5 and llm.runner.memory.used == used


@pytest.mark.parametrize("lost", ["about.json", "state-final.npy", "starts.npy"])
def test_an_incomplete_folder_is_refused(llm: LLM, tokens: list[int], tmp_path: Path, lost: str) -> None:
    states.write(llm.runner, [text(tokens[:5])], tmp_path / "states")
    (tmp_path / "states" / lost).unlink()
    with pytest.raises(CheckpointError, match="not a complete folder of states"):
        States.open(tmp_path / "states")
