"""The identity contract can fail: it detects each planted fault as a wrong token, not as a crash."""

from __future__ import annotations

import numpy as np
import pytest

from redraft import registry
from redraft.kv.store import Store
from redraft.ops.arrays import array
from redraft.sample.sampler import NotNumbers
from tests.arrays import QUICK
from tests.contracts import plain
from tests.contracts.faults import FAULTS, Plant, page_not_zeroed
from tests.contracts.identity import Condition, Different, check

SAMPLED = Condition("oracle", "sampled", arrivals=(0, 3, 0, 5))


def test_nothing_planted_nothing_noticed() -> None:
    seen = check(SAMPLED)
    assert seen.accepted and seen.rejected


@pytest.mark.parametrize("plant", FAULTS, ids=lambda plant: plant.__name__)
def test_a_planted_fault_is_noticed(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises((Different, NotNumbers)):
        check(SAMPLED, strict=False)


@pytest.mark.torch
@pytest.mark.parametrize("plant", [plant for plant in FAULTS if plant is not page_not_zeroed], ids=lambda plant: plant.__name__)
def test_the_definition_notices_it_too(plant: Plant, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(monkeypatch)
    with pytest.raises(Different):
        check(Condition("oracle", "sampled", "reference"), strict=False)


def test_zeroing_is_what_keeps_old_nans_out(monkeypatch: pytest.MonkeyPatch) -> None:
    zero = Store.zero
    page_not_zeroed(monkeypatch)
    monkeypatch.setattr(Store, "zero", zero)
    check(SAMPLED)
    assert np.isnan(array(registry.backend(QUICK)("float64").allocate(plain.tiny()[0], 1).data)).all()
