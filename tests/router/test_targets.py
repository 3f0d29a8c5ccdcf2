"""How two choices compare where there are targets."""

from antiphon.config import RouterConfig
from antiphon.router.targets import Predicted, Targets


def test_targets_compare_by_the_larger_ratio():
    targets = Targets(RouterConfig(target_ttft_seconds=2.0, target_itl_seconds=0.1))
    late, stalled, fine = Predicted(3.0, 0.05), Predicted(0.5, 0.12), Predicted(0.5, 0.04)
    assert [targets.are_safe(p) for p in (late, stalled, fine)] == [False, False, True]
    assert targets.better(late, [stalled]) == 0
    assert targets.better(stalled, [late]) is None
    assert targets.better(late, [stalled, fine]) == 1
    assert targets.better(late, []) is None
    assert targets.better(stalled, [Predicted(0.5, 0.119)]) is None  # no clear difference


def test_within_the_safe_share_only_clearly_quicker_counts():
    targets = Targets(RouterConfig(target_ttft_seconds=2.0, target_itl_seconds=0.1))
    slow = Predicted(0.9, 0.04)
    assert not targets.are_safe(slow)
    assert targets.better(slow, [Predicted(0.85, 0.04)]) is None
    assert targets.better(slow, [Predicted(0.5, 0.05)]) == 0
    assert targets.better(slow, [Predicted(0.5, 0.06)]) is None  # not at a stream's cost


def test_nothing_strains_without_targets():
    targets = Targets(RouterConfig())
    assert not targets.are_set
    assert targets.are_safe(Predicted(1e9, 1e9))
