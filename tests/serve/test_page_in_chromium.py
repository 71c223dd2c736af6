"""The page at `/` in a browser: it is used as people use it, without any other host."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest

from redraft.llm import LLM
from tests.conftest import CHROMIUM
from tests.serve.live import Live

if TYPE_CHECKING:
    from playwright.sync_api import Browser, Page

pytestmark = pytest.mark.browser

PROMPT = "def add(a, b):\n    return a + b\n\ndef sub(a, b):\n"
FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
    "--disable-component-update", "--disable-sync",
)  # fmt: skip
VISIBLE = "[...document.querySelectorAll('{} .token:not(.silent)')].map(token => token.textContent).join('')"
PLAIN = "rgba(0, 0, 0, 0)"


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as made, made.chromium.launch(executable_path=CHROMIUM, args=[*FLAGS]) as running:
        yield running


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Page]]:
    """Opens an address in a new window. At the end no script has failed, nothing was refused by the policy, and no other host was asked."""
    contexts, wrong = [], []

    def refuse(route: Any) -> None:
        wrong.append(route.request.url)
        route.abort()

    def open_at(url: str, *, expected: str = "nothing", stripped: str = "", **options: Any) -> Page:
        context = browser.new_context(**options)
        contexts.append(context)
        context.route(lambda other: not other.startswith((url, "data:", "blob:")), refuse)
        if stripped:  # as a proxy does
            context.route(f"{url}**", lambda route: route.continue_(url=route.request.url.replace(stripped, "/", 1)))
        page = context.new_page()
        page.set_default_timeout(120_000)
        page.on("pageerror", lambda error: wrong.append(str(error)))
        page.on("console", lambda said: wrong.append(said.text) if said.type == "error" and expected not in said.text else None)
        page.goto(url)
        return page

    yield open_at
    for context in contexts:
        context.close()
    assert wrong == []


@pytest.fixture
def page(live: Live, visit: Callable[..., Page]) -> Page:
    """The page of a server, ready to continue a prompt."""
    return ready(visit(f"{live.url}/"))


def ready(page: Page, *, completion: bool = True, **settings: str) -> Page:
    page.wait_for_selector("#prompt:enabled")
    if completion:
        page.check("[name=mode][value=completion]", force=True)
    for name, value in {"temperature": "0", "max_tokens": "48", "seed": "1", **settings}.items():
        page.fill(f"#set-{name}", value)
    return page


def send(page: Page, text: str = PROMPT, button: str = "#send") -> None:
    page.fill("#prompt", text)
    page.click(button)
    page.wait_for_selector("#stop:visible")
    done(page)


def done(page: Page) -> None:
    page.wait_for_selector("#send:visible")
    page.wait_for_function("() => !document.querySelector('[aria-busy]') && document.querySelector('.token')")
    frame(page)


def frame(page: Page) -> None:
    """What waits for the next frame has run."""
    page.evaluate("() => new Promise(done => requestAnimationFrame(() => requestAnimationFrame(done)))")


def reply(page: Page, inside: str = "") -> str:
    return str(page.evaluate(VISIBLE.format(inside)))


def completed(live: Live, text: str, **options: Any) -> str:
    with live.client() as client:
        asked = {"model": "embedded", "prompt": text, "temperature": 0, "max_tokens": 48, **options}
        return str(client.completions.create(**asked).choices[0].text)


def test_a_reply_is_the_servers_with_its_origins_in_colour(live: Live, page: Page) -> None:
    send(page)
    assert reply(page) == completed(live, PROMPT)
    grounds = page.evaluate(
        "[...document.querySelectorAll('.token:not(.rest)')].map(token => [token.className, getComputedStyle(token).backgroundColor])"
    )
    drafted = {ground for names, ground in grounds if "drafted" in names}
    assert len(drafted) == 1 and PLAIN not in drafted
    assert {ground for names, ground in grounds if "drafted" not in names} == {PLAIN}
    counts = dict(re.findall(r"(the model|token-recycling)(\d+) ·", page.text_content(".legend") or ""))
    assert counts["token-recycling"] == str(sum("drafted" in names for names, _ in grounds))
    assert sum(map(int, counts.values())) == len(grounds) == 48
    assert "48 tokens" in (page.text_content(".summary") or "")


def test_a_long_reply_is_cut_into_blocks_at_its_line_ends(live: Live, page: Page) -> None:
    page.fill("#set-max_tokens", "300")
    send(page)
    assert reply(page) == completed(live, PROMPT, max_tokens=300)
    blocks = page.locator(".lines").all_text_contents()
    assert len(blocks) > 1 and all(block.endswith("\n") for block in blocks[:-1])
    assert page.locator(".token:not(.rest)").count() == 300


def test_the_figures_are_the_servers(live: Live, page: Page) -> None:
    send(page)
    tiles = dict(zip(page.locator("#run dt").all_text_contents(), page.locator("#run dd").all_text_contents(), strict=True))
    assert float(tiles["Tokens a step"]) > 1
    assert float(tiles["Tokens/s"].replace(",", "")) > float(tiles["Plain, estimated"].replace(",", "")) > 0
    assert page.locator("#run .bars li").count() >= 1
    page.wait_for_function("() => document.querySelector('#gauges .bars')")
    assert f"{live.llm.engine.memory.blocks:,} pages" in (page.text_content("#gauges") or "")
    names = page.locator("#gauges dt").all_text_contents()
    assert names == ["Tokens/s, all", "Batch", "Queue"]


def test_a_card_shows_the_step_of_a_token(page: Page) -> None:
    send(page)
    assert not page.is_visible(".card")
    page.locator(".drafted").first.hover()
    page.wait_for_selector(".card:visible")
    assert "token-recycling" in (page.text_content(".card header") or "")
    assert re.search(r"^\d", page.text_content(".chance strong") or "")
    assert page.locator(".card .likely li").count() == 5
    assert page.locator(".card .likely .chosen").count() == 1
    assert page.locator(".card .tree .node.kept").count() >= 2
    assert page.locator(".card .tree .node.marked").count() == 1
    assert page.locator(".card .tree .edge.kept").count() == page.locator(".card .tree .node.kept").count()
    page.mouse.move(2, 2)
    page.wait_for_selector(".card", state="hidden")


def test_the_card_is_reached_with_the_keyboard(page: Page) -> None:
    send(page)
    page.focus(".text")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.wait_for_selector(".card:visible")
    assert "#2" in (page.text_content(".card header") or "")
    assert re.search(r"from .*, probability .*%, rank \d+, step \d+", page.text_content("#said") or "")
    page.keyboard.press("End")
    assert "#48" in (page.text_content(".card header") or "")
    before = page.text_content(".card h3")
    page.keyboard.press("ArrowUp")
    assert page.text_content(".card h3") != before
    page.keyboard.press("Enter")
    page.wait_for_selector(".card.pinned:focus")
    page.keyboard.press("Escape")
    assert not page.is_visible(".card")
    assert page.locator(".text:focus").count() == 1


def test_a_message_goes_both_ways(live: Live, page: Page) -> None:
    for order in ("after", "once"):
        page.select_option("#set-order", order)
        send(page, PROMPT, "#both")
        assert (page.text_content(".verdict") or "").startswith("The texts are equal · ")
        assert page.locator(".columns .reply h3").all_text_contents() == ["With drafts", "Without drafts"]
        assert page.locator(".reply").first.locator(".drafted").count() > 0
        assert page.locator(".reply").last.locator(".drafted").count() == 0
        assert reply(page, ".reply:first-child") == reply(page, ".reply:last-child") == completed(live, PROMPT)


def test_what_a_message_chooses_is_sent(page: Page) -> None:
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.select_option("#set-method", "copyspec")
    page.select_option("#set-verifier", "coupled")
    page.select_option("#set-codec", "int8")
    page.fill("#set-budget", "4")
    page.fill("#set-predicted", "return a - b")
    send(page)
    assert sent[0]["speculation"] == {"method": "copyspec", "verifier": "coupled", "budget": 4}
    assert sent[0]["cache"] == {"codec": "int8"}
    assert sent[0]["prediction"] == {"type": "content", "content": "return a - b"}
    assert sent[0]["seed"] == 1 and sent[0]["temperature"] == 0 and sent[0]["max_tokens"] == 48
    page.fill("#set-budget", "5000")
    page.fill("#prompt", PROMPT)
    page.click("#send")
    assert "Drafted tokens a step: " in (page.text_content("#problem") or "")
    assert len(sent) == 1


SCHEMA = {"type": "json_schema", "json_schema": {"name": "reply", "schema": {"type": "object"}}}
GRAMMARS = [
    ("json", '{"type": "object"}', "response_format", SCHEMA),
    ("regex", "[0-9]+", "structured_outputs", {"regex": "[0-9]+"}),
    ("choice", "yes\nno", "structured_outputs", {"choice": ["yes", "no"]}),
    ("grammar", 'root ::= "a"', "structured_outputs", {"grammar": 'root ::= "a"'}),
]


@pytest.mark.parametrize(("kind", "text", "field", "value"), GRAMMARS)
def test_a_grammar_is_sent_and_an_error_is_shown(
    live: Live, visit: Callable[..., Page], kind: str, text: str, field: str, value: Any
) -> None:
    page = ready(visit(f"{live.url}/", expected="status of 400"), completion=False)
    refused = {"error": {"message": "the server's <b>reason</b>", "type": "invalid_request_error", "param": None, "code": None}}
    sent: list[dict[str, Any]] = []

    def answer(route: Any) -> None:
        sent.append(route.request.post_data_json)
        route.fulfill(status=400, json=refused)

    page.route("**/v1/chat/completions", answer)
    page.select_option("#set-grammar", kind)
    page.fill("#set-pattern", text)
    page.fill("#prompt", "hello")
    page.click("#send")
    page.wait_for_selector(".reply .error")
    assert page.text_content(".reply .error") == "the server's <b>reason</b>"
    assert sent[0][field] == value
    assert sent[0]["messages"] == [{"role": "user", "content": "hello"}]


def test_tokens_that_a_grammar_leaves_no_choice_have_its_colour(page: Page) -> None:
    page.select_option("#set-grammar", "regex")
    page.fill("#set-pattern", "[0-9]{4}-[0-9]{2}-[0-9]{2}")
    send(page, "x = ")
    assert re.fullmatch(r"\d{4}-\d\d-\d\d", reply(page))
    assert "grammar" in (page.text_content(".legend") or "")
    page.locator(".token", has_text="-").first.hover()
    page.wait_for_selector(".card:visible")
    assert page.text_content(".card .origin") == "grammar"


def test_a_chat_goes_on_and_its_last_message_can_be_changed(page: Page) -> None:
    sent: list[dict[str, Any]] = []
    page.on("request", lambda request: sent.append(request.post_data_json) if request.method == "POST" else None)
    page.check("[name=mode][value=chat]", force=True)
    page.fill("#set-system", "Be brief.")
    page.fill("#set-max_tokens", "8")
    send(page, "one")
    first = reply(page)
    send(page, "two")
    roles = [[message["role"] for message in body["messages"]] for body in sent]
    assert roles == [["system", "user"], ["system", "user", "assistant", "user"]]
    assert sent[1]["messages"][2]["content"] == first
    page.locator("text=Retry").last.click()
    page.wait_for_function("() => document.querySelectorAll('.turn').length === 4")
    done(page)
    assert sent[2]["messages"] == sent[1]["messages"]
    page.locator("text=Edit").last.click()
    assert page.input_value("#prompt") == "two"
    send(page, "three")
    assert [message["content"] for message in sent[3]["messages"]][::3] == ["Be brief.", "three"]
    assert page.locator(".turn").count() == 4


def test_a_reply_can_be_stopped(live: Live, page: Page) -> None:
    page.fill("#set-max_tokens", "400")
    page.fill("#prompt", PROMPT)
    page.click("#send")
    page.wait_for_selector(".token")
    page.click("#stop")
    done(page)
    assert "stopped" in (page.text_content(".summary") or "") or page.locator(".token").count() >= 400
    live.settle()


def test_a_run_is_saved_and_opened_again(page: Page, tmp_path: Path) -> None:
    send(page, PROMPT, "#both")
    text, verdict = reply(page, ".reply:first-child"), page.text_content(".verdict")
    with page.expect_download() as download:
        page.click("#save")
    saved = tmp_path / "run.json"
    download.value.save_as(saved)
    data = json.loads(saved.read_text(encoding="utf-8"))
    assert data["format"] == "redraft-run" and [turn["role"] for turn in data["turns"]] == ["user", "assistant"]
    page.click("#new")
    assert page.locator(".token").count() == 0
    page.set_input_files("#file", saved)
    page.wait_for_selector(".verdict:visible")
    frame(page)
    assert (reply(page, ".reply:first-child"), page.text_content(".verdict")) == (text, verdict)


def test_a_token_that_a_block_ends_in_is_shown_in_both_blocks(page: Page, tmp_path: Path) -> None:
    origin = {"token": "\n  ab", "token_id": 1, "step": 1, "origin": "model", "probability": 0.5, "rank": 1, "alternatives": []}
    piece = {"at": 1.0, "text": "\n  ab" * 100, "finish_reason": "stop", "provenance": [origin] * 100, "trees": []}
    data = {"format": "redraft-run", "version": 1, "server": {}, "mode": "chat", "turns": replied({"ended": 2.0}, piece)}
    file = tmp_path / "run.json"
    file.write_text(json.dumps(data))
    page.set_input_files("#file", file)
    page.wait_for_selector(".token.rest", state="attached")
    assert reply(page) == piece["text"]
    blocks = page.locator(".lines").all_text_contents()
    assert len(blocks) == page.locator(".rest").count() + 1 and all(block.endswith("\n") for block in blocks[:-1])


def test_nothing_in_a_file_is_run(page: Page, tmp_path: Path) -> None:
    evil = "<img src=x onerror='window.ran=1'><script>window.ran=1</script>"
    origin = {"token": evil, "token_id": 1, "step": 1, "origin": evil, "probability": 0.5, "rank": 1, "alternatives": []}
    node = {"token": evil, "token_id": 1, "parent": -1, "origin": evil, "accepted": True}
    piece = {"at": 1.0, "text": evil, "finish_reason": "stop", "provenance": [origin], "trees": [{"step": 1, "nodes": [node]}]}
    run = {"name": evil, "request": {}, "pieces": [piece], "metrics": {"faults": [evil]}, "error": evil, "ended": 2.0}
    data = {"format": "redraft-run", "version": 1, "server": {}, "mode": "chat"}
    data["turns"] = [{"role": "user", "content": evil}, {"role": "assistant", "runs": [run]}]
    file = tmp_path / "evil.json"
    file.write_text(json.dumps(data))
    page.set_input_files("#file", file)
    page.wait_for_selector(".token")
    page.locator(".token").first.hover()
    page.wait_for_selector(".card:visible")
    assert reply(page) == evil
    assert page.evaluate("[window.ran, document.querySelectorAll('main img, .card img').length]") == [None, 0]
    wrong = [
        ({"format": "other"}, "not a run of Redraft"),
        ({"turns": [{"role": "tool"}]}, "turns[0].role = tool"),
        ({"turns": replied(run, {**piece, "at": "1"})}, "turns[0].runs[0].pieces[0].at: a number"),
        ({"turns": replied(run, {**piece, "trees": [{"step": 1, "nodes": [{**node, "parent": 0}]}]})}, "parent = 0"),
    ]
    for change, error in wrong:
        file.write_text(json.dumps(data | change))
        page.set_input_files("#file", file)
        page.locator("#problem", has_text=error).wait_for()


def replied(run: dict[str, Any], piece: dict[str, Any]) -> list[dict[str, Any]]:
    return [{"role": "assistant", "runs": [run | {"pieces": [piece]}]}]


def test_the_key_stays_in_the_tab(llm: LLM, visit: Callable[..., Page]) -> None:
    with Live(llm.sibling(), api_key=("right-key",)) as live:
        page = visit(f"{live.url}/", expected="status of 401")
        for key in ("wrong-key", "right-key"):
            page.wait_for_selector("#key[open]")
            page.fill("#key-text", key)
            page.click("text=Use it")
        ready(page)
        send(page)
        assert reply(page)
        stored = page.evaluate("[JSON.stringify(sessionStorage), JSON.stringify(localStorage), document.cookie]")
        assert "right-key" in stored[0] and "key" not in stored[1] + stored[2]
        page.context.clear_cookies()


def test_the_page_works_behind_a_proxy_that_adds_a_path(live: Live, visit: Callable[..., Page]) -> None:
    page = ready(visit(f"{live.url}/llm/", stripped="/llm/"))
    asked: list[str] = []
    page.on("request", lambda request: asked.append(request.url))
    send(page)
    assert reply(page) == completed(live, PROMPT)
    assert f"{live.url}/llm/v1/completions" in asked and all(url.startswith(f"{live.url}/llm/") for url in asked)


def test_on_a_narrow_screen_nothing_is_cut(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(f"{live.url}/", viewport={"width": 360, "height": 700}, color_scheme="dark")
    page.wait_for_selector("#prompt:enabled")
    assert not page.is_visible("#settings")
    page.click("text=Settings")
    assert page.is_visible("#settings")
    page.keyboard.press("Escape")
    assert not page.is_visible("#settings")
    page.check("[name=mode][value=completion]", force=True)
    send(page)
    page.locator(".drafted").first.click()
    page.wait_for_selector(".card.pinned")
    assert page.evaluate("document.documentElement.scrollWidth") <= 360
    box = page.locator(".card").bounding_box()
    assert box is not None and box["x"] >= 0 and box["x"] + box["width"] <= 360


def test_colours_follow_the_system_or_the_button(live: Live, visit: Callable[..., Page]) -> None:
    page = visit(f"{live.url}/", color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.click("[aria-label='Colours: system']")
    assert page.evaluate(ground) != dark
    page.click("[aria-label='Colours: light']")
    assert page.evaluate(ground) == dark
    page.reload()
    page.wait_for_selector("[aria-label='Colours: dark']")  # or it fails after its time limit


def test_a_trace_opens_from_disk(visit: Callable[..., Page], redraft: Callable[..., tuple[int, str, str]], tmp_path: Path) -> None:
    file = tmp_path / "out.html"
    options = ("--prompt", PROMPT, "--temperature", "0", "--max-tokens", "40", "--draft", "token-recycling", "--trace", str(file))
    code, out, _ = redraft("generate", *options)
    assert code == 0
    page = visit(file.as_uri())
    page.wait_for_selector(".token")
    assert reply(page) == out.removesuffix("\n")
    assert page.text_content(".turn.user .said") == PROMPT
    page.locator(".drafted").first.hover()
    page.wait_for_selector(".card:visible .tree")
    page.click(".key >> nth=1")
    assert page.locator(".token.dim").count() == page.locator(".token:not(.drafted)").count() > 0
