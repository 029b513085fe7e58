"""Windows: every token scored once, as lm-eval cuts them."""

from __future__ import annotations

import pytest

from popjax.evaluation.windows import rolling, stepped


@pytest.mark.parametrize("tokens", [0, 1, 7, 8, 9, 15, 16, 40])
@pytest.mark.parametrize("context", [1, 3, 8])
def test_rolling_windows_are_those_of_lm_eval(tokens: int, context: int) -> None:
    from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

    ids = list(range(tokens))
    theirs = get_rolling_token_windows(ids, -1, 8, context)
    assert list(rolling(ids, -1, 8, context)) == [make_disjoint_window(pair) for pair in theirs]


@pytest.mark.parametrize("tokens", [1, 3, 4, 5, 9, 12, 31])
def test_stepped_windows_score_each_token_once_after_as_much_context(tokens: int) -> None:
    ids = list(range(tokens))
    first, later = stepped(ids, -1, 8, 4)
    assert first == ([-1], ids[:4])
    assert first[1] + [token for _, scored in later for token in scored] == ids
    for before, scored in later:
        assert [*before, *scored] == list(range(before[0], before[0] + 4 + len(scored)))
        assert len(before) == 4 and len(scored) <= 4


def test_windows_without_room_are_refused() -> None:
    with pytest.raises(ValueError, match=r"context 9 is outside 1\.\.8"):
        list(rolling([1], 0, 8, 9))
    with pytest.raises(ValueError, match=r"context 8 is outside 1\.\.7"):
        stepped([1], 0, 8, 8)
