"""Calls in the form of Granite 3, however the text is cut."""

from __future__ import annotations

from redraft.serve.parsers.granite import Granite
from tests.serve.parsers.cuts import every_cut


def test_calls() -> None:
    one, two = '{"name": "weather", "arguments": {"place": "Oslo"}}', '{"name": "clock", "arguments": {}}'
    calls = [("weather", '{"place": "Oslo"}'), ("clock", "{}")]
    assert every_cut(Granite, f"<|tool_call|>[{one}, {two}]") == ("", "", calls)
    assert every_cut(Granite, f"I look. <|tool_call|> [{one}]<|/tool_call|>") == ("I look.", "", calls[:1])
    assert every_cut(Granite, "<|tool_call|>none") == ("<|tool_call|>none", "", [])
