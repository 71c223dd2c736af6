from __future__ import annotations

from redraft.columns import fold


def test_lines_break_between_words_and_hang_deeper() -> None:
    assert fold("  one two", 9) == ["  one two"]
    assert fold("  one two", 8) == ["  one", "    two"]
    assert fold("  one two three", 9, hang=0) == ["  one two", "  three"]


def test_no_word_is_ever_broken() -> None:
    name = "union:parts=copyspec+token-recycling"
    assert fold(f"the drafter {name}", 12) == ["the drafter", f"  {name}"]
