"""The server's page in Chromium, with a real model: screenshots, accessibility by axe-core, and frame times with thousands of tokens.

axe-core comes from the npm registry (npm must be installed) into a temporary folder. Chromium reaches no other host than the server.
Exit code 1 if axe finds anything serious, a script fails, or the policy refuses something.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from playwright.sync_api import Browser, Page, Route, sync_playwright

ROOT = Path(__file__).resolve().parents[2]
FLAGS = ["--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"]
FLAGS += ["--disable-component-update", "--disable-sync"]
AXE = "axe-core@4.14.1"
SERIOUS = ("serious", "critical")
PROMPT = "Write a Python class for a stack, then write the same class again with type hints."
COPY = "Copy this list five times: red, orange, yellow, green, blue, indigo, violet, brown, black, white."
LONG = "Write a very long story about a lighthouse."
PATIENCE = 240.0  # seconds until a reply is complete
LARGEST = 200_000  # bytes of a screenshot
FRAMES = """() => {
  window.frames_ = []; window.tasks_ = []; window.measuring_ = true;
  let before = performance.now();
  const next = (now) => { window.frames_.push(now - before); before = now; if (window.measuring_) requestAnimationFrame(next); };
  requestAnimationFrame(next);
  const seen = (list) => window.tasks_.push(...list.getEntries().map((entry) => entry.duration));
  new PerformanceObserver(seen).observe({entryTypes: ["longtask"]});
}"""
SCROLL = """async () => {
  const box = document.getElementById("scroll");
  for (let i = 0; i <= 120; i += 1) {
    box.scrollTop = (box.scrollHeight * i) / 120;
    await new Promise(requestAnimationFrame);
  }
}"""


@contextlib.contextmanager
def server(model: str, draft: str) -> Iterator[str]:
    """The address of a server of this model."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    url = f"http://127.0.0.1:{port}/"
    command = [sys.executable, "-m", "redraft", "serve", model, "--draft", draft, "--port", str(port), "--log-level", "warning"]
    process = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.DEVNULL)
    try:
        until = time.monotonic() + PATIENCE
        while not answers(f"{url}ready"):
            if process.poll() is not None or time.monotonic() > until:
                sys.exit("the server did not start")
            time.sleep(0.2)
        yield url
    finally:
        process.terminate()
        process.wait()


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(url, timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def axe_core(folder: Path) -> str:
    """The script of axe-core."""
    subprocess.run(["npm", "pack", "--silent", AXE], cwd=folder, check=True, stdout=subprocess.DEVNULL)
    (archive,) = folder.glob("axe-core-*.tgz")
    shutil.unpack_archive(archive, folder)
    return (folder / "package" / "axe.min.js").read_text(encoding="utf-8")


class Proof:
    def __init__(self, browser: Browser, url: str, axe: str, out: Path) -> None:
        self.browser, self.url, self.axe, self.out = browser, url, axe, out
        self.wrong: list[str] = []

    def open(self, url: str = "", **options: Any) -> Page:
        page = self.browser.new_context(**{"viewport": {"width": 1440, "height": 900}, **options}).new_page()
        page.set_default_timeout(PATIENCE * 1000)
        page.on("pageerror", lambda error: self.wrong.append(f"script: {error}"))
        page.on("console", lambda said: self.wrong.append(f"console: {said.text}") if said.type == "error" else None)
        page.context.route(lambda other: not other.startswith((self.url, "file:", "data:", "blob:")), self.refuse)
        page.goto(url or self.url)
        if not url:
            page.wait_for_selector("#prompt:enabled")
            page.locator("#set-temperature").evaluate("field => { field.value = 0 }")  # it may be out of view
        return page

    def refuse(self, route: Route) -> None:
        self.wrong.append(f"asked for {route.request.url}")
        route.abort()

    def send(self, page: Page, text: str = PROMPT, button: str = "#send") -> None:
        page.fill("#prompt", text)
        page.click(button)
        page.wait_for_selector("#stop:visible")
        page.wait_for_selector("#send:visible")
        page.wait_for_timeout(300)

    def check(self, page: Page, state: str) -> None:
        """Prints what axe finds."""
        page.evaluate(f"() => {{ {self.axe} }}")
        found = page.evaluate("() => axe.run()")
        kinds = [f"{one['impact']}: {one['id']} ({len(one['nodes'])})" for one in found["violations"]]
        print(f"  {state:<24} {len(found['passes'])} rules pass, {', '.join(kinds) or 'nothing found'}")
        for one in found["violations"]:
            if one["impact"] in SERIOUS:
                self.wrong.append(f"axe, {state}: {one['id']}: {one['nodes'][0]['html'][:200]}")

    def shoot(self, page: Page, name: str) -> None:
        path = self.out / f"page-{name}.png"
        page.screenshot(path=path)
        size = path.stat().st_size
        print(f"  {path.name:<24} {size / 1000:.0f} kB")
        if size > LARGEST:
            self.wrong.append(f"{path.name} has {size} bytes")


def card(page: Page, drafted: int) -> None:
    """Shows the card of a drafted token in view."""
    tokens = page.locator(".drafted")
    tokens.nth(min(drafted, tokens.count() - 1)).hover()
    page.wait_for_selector(".card:visible")
    page.wait_for_timeout(300)


def looks(proof: Proof, trace: Path) -> None:
    print("axe-core and screenshots")
    for scheme in ("light", "dark"):
        page = proof.open(color_scheme=scheme)
        proof.check(page, f"empty, {scheme}")
        proof.send(page)
        page.locator("#scroll").evaluate("box => { box.scrollTop = 0 }")
        card(page, 24)
        proof.check(page, f"reply and card, {scheme}")
        if scheme == "light":
            proof.shoot(page, "light")
        page.mouse.move(2, 2)
        page.click("#new")
        page.select_option("#set-method", "auto")
        proof.send(page, COPY, "#both")
        page.wait_for_selector(".verdict:visible")
        proof.check(page, f"both ways, {scheme}")
        if scheme == "dark":
            proof.shoot(page, "dark")
        page.context.close()
    page = proof.open(viewport={"width": 360, "height": 740}, color_scheme="light", has_touch=True)
    proof.send(page)
    page.locator("#scroll").evaluate("box => { box.scrollTop = 0 }")
    page.locator(".drafted").nth(3).click()
    page.wait_for_timeout(300)
    proof.check(page, "narrow, card")
    proof.shoot(page, "narrow")
    page.keyboard.press("Escape")
    page.click("text=Settings")
    proof.check(page, "narrow, settings")
    page.context.close()
    page = proof.open(trace.as_uri())
    page.wait_for_selector(".token")
    card(page, 12)
    proof.check(page, "trace")
    page.context.close()


def frames(proof: Proof, count: int, folder: Path) -> None:
    """Times of frames while a long reply streams, while it is opened from a file, and while it is scrolled."""
    page = proof.open()

    def longer(route: Route) -> None:
        body = route.request.post_data_json | {"ignore_eos": True, "max_tokens": count}
        route.continue_(post_data=json.dumps(body))

    page.route("**/v1/chat/completions", longer)
    page.evaluate(FRAMES)
    began = time.monotonic()
    proof.send(page, LONG)
    seconds = time.monotonic() - began
    print(f"frame times with {page.locator('.token').count()} tokens on the page, milliseconds")
    measured(page, f"streamed in {seconds:.0f} s")
    with page.expect_download() as download:
        page.click("#save")
    saved = folder / "long.json"
    download.value.save_as(saved)
    page.context.close()
    page = proof.open()
    page.evaluate(FRAMES)
    page.set_input_files("#file", saved)
    page.wait_for_function(f"() => document.querySelectorAll('.token').length >= {count * 9 // 10}")
    page.wait_for_timeout(500)
    measured(page, f"opened, {saved.stat().st_size / 1e6:.1f} MB")
    page.evaluate(FRAMES)
    page.evaluate(SCROLL)
    measured(page, "scrolled in 121 steps")
    page.evaluate(FRAMES)
    page.locator("#scroll").evaluate("box => { box.scrollTop = box.scrollHeight / 2 }")
    page.wait_for_timeout(200)
    for y in range(160, 740, 10):
        page.mouse.move(600, y)
    measured(page, "pointed at 58 places")
    page.context.close()


def measured(page: Page, what: str) -> None:
    times, tasks = page.evaluate("() => { window.measuring_ = false; return [window.frames_.slice(1), window.tasks_]; }")
    times.sort()
    at = [statistics.median(times), times[int(0.95 * len(times))], times[int(0.99 * len(times))], times[-1]]
    numbers = "  ".join(f"{name} {value:.1f}" for name, value in zip(("median", "p95", "p99", "most"), at, strict=True))
    print(f"  {what:<24} {len(times)} frames: {numbers}; tasks over 50 ms: {len(tasks)}, most {max(tasks, default=0):.0f}")


def main() -> None:
    parser = argparse.ArgumentParser(prog="scripts/prove page", description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2", help="a model with a chat template")
    parser.add_argument("--draft", default="union:parts=suffix+ngram+token-recycling", help="the server's drafter")
    parser.add_argument("--tokens", type=int, default=5000, help="of the long reply")
    parser.add_argument("--out", type=Path, default=ROOT / "docs", help="folder of the screenshots")
    parser.add_argument("--chromium", default=shutil.which("chromium"), help="the browser")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name, contextlib.ExitStack() as stack:
        folder = Path(name)
        trace = folder / "trace.html"
        command = [sys.executable, "-m", "redraft", "generate", options.model, "--draft", options.draft, "--prompt", PROMPT]
        command += ["--max-tokens", "300", "--temperature", "0", "--trace", str(trace)]
        subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        axe = axe_core(folder)
        url = stack.enter_context(server(options.model, options.draft))
        browser = stack.enter_context(stack.enter_context(sync_playwright()).chromium.launch(executable_path=options.chromium, args=FLAGS))
        print(f"Chromium {browser.version}, {AXE}, {options.model}, drafts by {options.draft}")
        proof = Proof(browser, url, axe, options.out)
        looks(proof, trace)
        frames(proof, options.tokens, folder)
    print("\n".join(proof.wrong) or "nothing serious was found")
    sys.exit(bool(proof.wrong))


if __name__ == "__main__":
    main()
