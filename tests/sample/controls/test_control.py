"""Controls at their stages: what they see, in which order, what is refused, and that a check is a draw from the masked distribution."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest

from redraft.config import SamplingParams
from redraft.core.noise import Stream, gumbel, key
from redraft.errors import InvalidInput, RedraftError
from redraft.sample.controls.control import MOST, OpenedControls, Stage
from redraft.sample.sampler import NoToken, Sampler
from tests.contracts.algebra import LEAST_P, chi_square_p
from tests.sample.controls.toys import TOYS, Toy
from tests.sample.toy import begun, step

V = 12
LOGITS, FILTERED, CHECK = TOYS


def test_stages_and_order() -> None:
    sampler = Sampler(V, frozenset())
    seq = begun(sampler, [1, 2], temperature=0.5, top_k=4, control=[FILTERED, LOGITS])
    row = sampler.row(np.arange(V) / 2.0, seq, [7])
    assert row.ids.tolist() == [7, 10], "7 got its bonus after the temperature, four were kept, then every other one"
    np.testing.assert_allclose(row.values, [-4 + 3, -1])


def test_no_control_costs_nothing() -> None:
    sampler = Sampler(V, frozenset())
    for control in (None, "none", "", ()):
        assert sampler.check(SamplingParams(control=control)) == ()
        assert SamplingParams(control=control) == SamplingParams()


def test_a_check_draws_from_the_masked_distribution() -> None:
    """The same token as with a mask and the same noise, so also the same distribution; greedy takes the likeliest that is left."""
    sampler = Sampler(V, frozenset())
    logits = np.log(np.arange(1, V + 1) / sum(range(1, V + 1)))
    allowed = np.array([token for token in range(V) if token % 3 != 1])
    seqs = [begun(sampler, [1] * 4, seed=i, control=CHECK) for i in range(2500)]
    drawn = step(sampler, seqs, logits=lambda *_: logits).draw(range(len(seqs)))
    masked = [int(allowed[(logits[allowed] + gumbel(key(i, Stream.TARGET, 4), allowed)).argmax()]) for i in range(2500)]
    assert drawn == masked
    probs = np.exp(logits[allowed])
    assert chi_square_p(np.bincount(drawn, minlength=V)[allowed], 2500 * probs / probs.sum()) >= LEAST_P
    greedy = [begun(sampler, [1] * n, temperature=0, control=CHECK) for n in (3, 4, 5)]
    distribution = step(sampler, greedy, logits=lambda *_: logits)
    assert distribution.draw(range(3)) == [11, 11, 10], "11 leaves 2"
    assert [distribution.allows(row, 11) for row in range(3)] == [True, True, False]
    filtered = [begun(sampler, [1] * 4, seed=i, top_k=2, control=CHECK) for i in range(50)]
    assert set(step(sampler, filtered, logits=lambda *_: logits).draw(range(50))) == {11}, "filters first, then the check"


def test_the_distribution_of_a_check_is_what_it_draws_from() -> None:
    sampler = Sampler(V, frozenset())
    seq = begun(sampler, [1] * 4, top_p=0.9, control=CHECK)
    (probs,) = step(sampler, [seq], logits=lambda *_: np.zeros(V)).probs([0])
    assert probs.sum() == pytest.approx(1) and not probs[1::3].any() and np.count_nonzero(probs) == 7


@dataclass(frozen=True)
class Never(Toy):
    stage: Stage = Stage.CHECK

    def accepts(self, seq: Any, drafted: list[int], token: int) -> bool:
        return False


@pytest.mark.parametrize("temperature", [0, 1])
def test_nothing_that_may_follow_is_an_error_of_the_text(temperature: float) -> None:
    sampler = Sampler(V, frozenset())
    seq = begun(sampler, [1, 2], temperature=temperature, control=Never())
    with pytest.raises(NoToken, match="control: no token that the filters leave may follow token 1") as error:
        step(sampler, [seq], logits=lambda *_: np.zeros(V)).draw([0])
    assert error.value.seq is seq
    with pytest.raises(NoToken):
        step(sampler, [seq], logits=lambda *_: np.zeros(V)).probs([0])


@pytest.mark.parametrize("control", TOYS)
def test_what_raises_is_an_error_of_the_text(control: Toy) -> None:
    sampler = Sampler(V, frozenset())
    seq = begun(sampler, range(9), prompt_len=1, control=Toy(control.stage, fails=True))
    with pytest.raises(RedraftError, match="control: it raised KeyError: 'a fault'") as error:
        step(sampler, [seq]).draw([0])
    assert error.value.seq is seq  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("control", "said"),
    [
        (7, "SamplingParams.control = 7: names of controls or objects that are controls are needed"),
        (Toy, "names of controls or objects"),
        (["momentum", 7], "names of controls or objects"),
        ("momentun", "no control method 'momentun': "),
        ("momentum:alpha=-1", "momentum:alpha=-1.0: must be 0 to 10"),
        ("momentum:beta=1", "unknown option 'beta' of momentum"),
        ("+".join(["momentum"] * 9), "control has 9 parts: at most 8 are allowed"),
    ],
)
def test_what_is_refused(control: Any, said: str) -> None:
    with pytest.raises(InvalidInput, match=said):
        Sampler(V, frozenset()).check(SamplingParams(control=control))


def test_controls_are_opened_once_and_their_number_is_bounded() -> None:
    opened = Sampler(V, frozenset()).vocabulary.shared(OpenedControls)
    calls = []

    @dataclass(frozen=True)
    class Counted(Toy):
        number: int = 0

        def open(self, vocabulary: Any) -> Toy:
            calls.append(self.number)
            return self

    for number in (0, 0, *range(1, MOST), 0, MOST, 1):
        opened.get(Counted(Stage.FILTERED, number=number))
    assert calls == [*range(MOST + 1), 1], "1 was the one that was not used for the longest time"
