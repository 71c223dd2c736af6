"""The page of a comparison: its plots and tables hold the figures of the rows, and names cannot break it."""

from __future__ import annotations

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from redraft.bench import charts, files, svg
from redraft.bench.page import Section, whole
from redraft.bench.results import Beside, Row, Speed
from redraft.core.cost import FLAT, CostModel
from tests.bench import fakes, html_page

NAMES = ("none", "suffix", "<b>&\"weird'</b>")


def row(method: str, category: str | None, speed: float, kept: tuple[float, ...] = ()) -> Row:
    given = dict.fromkeys(Row.__dataclass_fields__)
    given |= {"method": method, "mode": "baseline" if method == "none" else "hot", "category": category, "mean_acceptance_length": 1.5}
    given |= {"tokens_per_second": speed, "tokens_per_second_low": 0.9 * speed, "tokens_per_second_high": 1.2 * speed}
    if method != "none":
        given |= {"speedup": speed / 40, "speedup_low": 0.9 * speed / 40, "speedup_high": 1.2 * speed / 40}
    return Row(**cast(Any, given | {"acceptance_by_depth": kept}))


ROWS = [
    row(name, category, 40.0 + 10 * i + (5 if category else 0), (0.5, 0.25)[:i])
    for category in (None, "chat")
    for i, name in enumerate(NAMES)
]


def check_speeds(page: str) -> None:
    """Every speed is in the table and where its dot lies."""
    (_, *lines) = html_page.tables(page)["Tokens a second"]
    places = html_page.dots(html_page.plots(page)[0])
    for one, cells in zip(ROWS, lines, strict=True):
        category, method = one.category or "all prompts", charts.name(one)
        assert cells[:4] == [
            category,
            method,
            f"{one.tokens_per_second:.1f}",
            f"{one.tokens_per_second_low:.1f}-{one.tokens_per_second_high:.1f}",
        ]
        assert places[f"{category}, {method}"] == pytest.approx(one.tokens_per_second, abs=0.1)


def test_speeds_are_in_the_plot_and_in_the_table() -> None:
    page = whole("a", ["b"], [*charts.speeds(ROWS)])
    check_speeds(page)
    assert html_page.tables(page)["Tokens a second"][3][4:7] == ["1.50x", "1.35-1.80", ""]


def test_generation_alone_has_its_own_plot_and_bounds() -> None:
    alone = [replace(one, generation=Speed(100.0 + i, 90.0, 120.0, 2.0, 1.5, 2.5, 1.75)) for i, one in enumerate(ROWS)]
    page = whole("a", ["b"], charts.speeds(alone))
    check_speeds(page)
    assert [cells[2:7] for cells in html_page.tables(page)["Generation alone"][1:]] == [
        [f"{100.0 + i:.1f}", "90.0-120.0", "2.00x", "1.50-2.50", "1.75x"] for i in range(len(ROWS))
    ]
    assert html_page.dots(html_page.plots(page)[1])["all prompts, none"] == pytest.approx(100, abs=0.1)


def test_the_fastest_other_method_is_named() -> None:
    beside = Beside("suffix", "hot", 0.98, 0.9, 1.1, None)
    chooser = replace(
        ROWS[1], method="auto", beside=beside, generation=Speed(1.0, 1.0, 1.0, beside=replace(beside, ratio=1.02, bound=0.97))
    )
    (section,) = charts.beside([*ROWS, chooser])
    assert section.rows == [
        ["all prompts", "auto, hot", "generation", "suffix", "1.02", "0.90-1.10", "0.97"],
        ["all prompts", "auto, hot", "with prompt", "suffix", "0.98", "0.90-1.10", ""],
    ]
    assert charts.beside(ROWS) == []


@pytest.mark.parametrize("planted", ["table", "plot"])
def test_a_wrong_figure_is_found(planted: str) -> None:
    page = whole("a", ["b"], [*charts.speeds(ROWS)])
    x = html_page.plots(page)[0].find(f".//{html_page.SVG}circle").get("cx")  # type: ignore[union-attr]
    wrong = page.replace("<td>40.0</td>", "<td>41.0</td>") if planted == "table" else page.replace(f'cx="{x}"', 'cx="300"', 1)
    with pytest.raises(AssertionError):
        check_speeds(wrong)


def test_acceptance_by_depth() -> None:
    section = charts.acceptance({"none": (), "suffix": (0.5, 0.25), "other": (0.125,)})
    page = whole("a", [], [section])
    assert html_page.tables(page)["Acceptance by depth"] == [["method", "1", "2"], ["suffix", "50.0%", "25.0%"], ["other", "12.5%", "0"]]
    (plot,) = html_page.plots(page)
    assert html_page.dots(plot) == pytest.approx({"suffix, depth 1": 1, "suffix, depth 2": 2, "other, depth 1": 1}, abs=0.01)
    assert charts.acceptance({"none": ()}).text == "No draft was kept."


def with_drafter(drafter: Any) -> Any:
    return SimpleNamespace(engine=SimpleNamespace(drafter=SimpleNamespace(own=SimpleNamespace(drafter=drafter))))


def test_the_cost_is_that_of_the_cost_model() -> None:
    model = CostModel(FLAT)
    model.calibrate({(1, 0): 0.010, (16, 0): 0.020})
    llm, bare = with_drafter(SimpleNamespace(cost=model)), with_drafter(object())
    (_, *lines) = html_page.tables(whole("a", [], [charts.modelled({"none": bare, "auto": llm})]))["Cost of a step"]
    assert [int(cells[1]) for cells in lines] == charts.ROWS
    for cells in lines:
        assert cells[0] == "auto" and float(cells[2]) == pytest.approx(1000 * cast(float, model.seconds(int(cells[1]))), rel=0.01)
    assert "no cost model" not in charts.modelled({"auto": llm}).text and not charts.modelled({"none": bare}).rows


def test_names_are_escaped_and_nothing_is_loaded() -> None:
    page = whole("<script>", ["<img src=http://a>"], [*charts.speeds(ROWS), Section("<x>", "&")], ["</ul>"], code="<pre>")
    assert html_page.loads(page) == [] and "<b>" not in page
    assert any(name.startswith("all prompts, <b>&\"weird'</b>") for name in html_page.dots(html_page.plots(page)[0]))
    assert html_page.loads(page + '<img src="http://a"><script>') == ["http://a", "script"]


@pytest.mark.parametrize(("low", "high", "found"), [(1, 4, [1, 2, 3, 4]), (1, 32, [0, 10, 20, 30, 40]), (1, 1, [1, 2]), (5, 7, [5, 6, 7])])
def test_whole_ticks(low: float, high: float, found: list[float]) -> None:
    assert svg.ticks(low, high, whole=True) == found


@pytest.mark.parametrize("high", [1e-6, 0.3, 1, 7, 99.9, 12345])
def test_ticks_reach_the_ends(high: float) -> None:
    found = svg.ticks(0, high)
    assert found[0] == 0 and found[-1] >= high and 3 <= len(found) <= 9


@pytest.mark.parametrize(("value", "shown"), [((123.4, 120, 130), "123 (120-130)"), ((1.234, 1.234, 1.234), "1.23"), ((0, 0, 0), "0")])
def test_figures_have_three_digits(value: tuple[float, float, float], shown: str) -> None:
    assert svg.spread(*value) == shown


def test_the_command_writes_a_page(tmp_path: Path, redraft: Any) -> None:
    prompts = [{"id": i, "category": "ab"[i % 2], "prompt": f"w1{i} w2{i}"} for i in range(4)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, prompts)))
    folder = fakes.checkpoint(tmp_path / "model")
    words = f"--prompts {tmp_path}/p.jsonl --draft auto --draft ngram --max-tokens 4 --rounds 2 --dtype float32 --html {tmp_path}/o.html"
    assert redraft("compare", str(folder), *words.split())[0] == 0
    page = (tmp_path / "o.html").read_text()
    assert html_page.loads(page) == []
    assert list(html_page.tables(page)) == [
        "Tokens a second",
        "Generation alone",
        "Beside the fastest other method",
        "Acceptance by depth",
        "Cost of a step",
        "Notes",
    ]
    categories = {cells[0] for cells in html_page.tables(page)["Tokens a second"][1:]}
    assert categories == {"all prompts", "a", "b"}


@pytest.mark.parametrize(
    ("path", "reported"), [("/nowhere/a.html", "html = /nowhere/a.html: there is no folder /nowhere"), ("/", "html = /: is a folder")]
)
def test_a_path_that_cannot_be_written_is_refused_first(path: str, reported: str, redraft: Any) -> None:
    code, _, err = redraft("compare", "/no/such/model", "--html", path)
    assert code == 2 and reported in err and err.count("\n") == 1


def test_a_folder_without_the_right_to_write_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "access", lambda path, mode: False)
    with pytest.raises(files.InvalidInput, match="cannot be written to"):
        files.check_writable(tmp_path / "a.html", "html")
