from redraft.core.plan import Budget
from redraft.core.testing import sequence
from redraft.draft.none import NoDraft


def test_proposes_nothing() -> None:
    drafter = NoDraft().open(None, None)
    seqs = [sequence([1, 2]), sequence([3])]
    assert [len(tree) for tree in drafter.propose(seqs, [Budget(16, 16), Budget(0, 0)])] == [0, 0]
    assert drafter.taps.top_k == 0
