"""The page at `/`: who gets it, with which headers, and what its files may contain."""

from __future__ import annotations

import re
from collections.abc import Iterator

import pytest

from redraft.serve import page
from tests.serve.raw import Live, live

BROWSER = "text/html,application/xhtml+xml,application/xml;q=0.9,image/avif,image/webp,*/*;q=0.8"
POLICY = {
    "default-src 'none'", "script-src 'self'", "style-src 'self'", "connect-src 'self'", "img-src 'self' data:", "base-uri 'none'",
    "form-action 'none'", "frame-ancestors 'none'",
}  # fmt: skip
SCRIPTS = sorted(name for name in page.files() if name.endswith(".js"))
NAMESPACE = "http://www.w3.org/2000/svg"  # a name, which is never loaded
ADDRESS = re.compile(r"""(?:https?:|wss?:|["'(])//[\w.]""")
DANGEROUS = re.compile(
    r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\b|\bFunction\(|DOMParser|createContextualFragment|srcdoc"
    r"|setTimeout\(\s*[\"'`]|javascript:|setAttribute\(\s*[\"']style|\.cssText"
)


@pytest.fixture(scope="module")
def server() -> Iterator[Live]:
    with live(api_key=("a-key",), root_path="/llm") as made:
        yield made


def test_a_browser_gets_the_page_with_a_strict_policy(server: Live) -> None:
    answer = server.ask("GET", "/", Accept=BROWSER)
    assert answer.status == 200
    assert answer.headers["Content-Type"] == "text/html; charset=utf-8"
    assert set(answer.headers["Content-Security-Policy"].split("; ")) == POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    assert answer.headers["Vary"] == "Accept"
    assert answer.body == page.files()["index.html"]


@pytest.mark.parametrize(
    "accept", ["*/*", "application/json", "", "application/json, text/html;q=0.5", "text/html;q=0", "text/html;q=x", "text/plain"]
)
def test_other_clients_get_the_list_of_endpoints(server: Live, accept: str) -> None:
    answer = server.ask("GET", "/", Accept=accept)
    assert answer.headers["Vary"] == "Accept"
    assert answer.json["name"] == "redraft"


@pytest.mark.parametrize("name", sorted(page.files()))
def test_every_file_is_served_without_a_key(server: Live, name: str) -> None:
    answer = server.ask("GET", f"/page/{name}")
    assert answer.status == 200
    assert answer.body == (page.FOLDER / name).read_bytes()
    assert answer.headers["Content-Type"].partition(";")[0] == page.KINDS[name[name.index(".") :]]
    assert set(answer.headers["Content-Security-Policy"].split("; ")) == POLICY
    assert answer.headers["X-Content-Type-Options"] == "nosniff"
    again = server.ask("GET", f"/page/{name}", **{"If-None-Match": answer.headers["ETag"]})
    assert (again.status, again.body) == (304, b"")


def test_no_file_of_the_folder_is_left_out() -> None:
    assert {path.name for path in page.FOLDER.iterdir()} == set(page.files())


@pytest.mark.parametrize("path", ["nothing.js", "..%2fpage.py", "%2e%2e/page.py", "../v1/models", "..%2fserver_info", "style.css%00"])
def test_nothing_else_is_served(server: Live, path: str) -> None:
    answer = server.ask("GET", f"/page/{path}")
    assert answer.status == 404
    assert answer.json["error"]["message"]


def test_what_the_page_asks_for_needs_the_key(server: Live) -> None:
    assert server.ask("GET", "/server_info").status == 401
    assert server.chat().status == 401
    assert server.ask("GET", "/metrics").status == 200


def test_the_page_works_under_a_path_of_a_proxy() -> None:
    """All addresses are relative: to the page, and to the script that asks the server."""
    index = page.files()["index.html"].decode()
    links = re.findall(r'(?:href|src)="([^"]+)"', index)
    assert links and all(link.startswith("page/") and link[5:] in page.files() for link in links)
    server = page.files()["server.js"].decode()
    assert 'new URL("../", import.meta.url)' in server
    asked = [path for name in SCRIPTS for path in re.findall(r'(?:asked|json|streamed)\("([^"]+)"', page.files()[name].decode())]
    assert {"server_info", "metrics"} <= set(asked)
    assert not [path for path in asked if path.startswith("/")]


@pytest.mark.parametrize("name", sorted(page.files()))
def test_no_file_names_another_server(name: str) -> None:
    assert ADDRESS.search(page.files()[name].decode().replace(NAMESPACE, "")) is None


@pytest.mark.parametrize("name", SCRIPTS)
def test_no_script_makes_markup_or_code_from_text(name: str) -> None:
    assert DANGEROUS.search(page.files()[name].decode()) is None


def test_the_page_has_no_script_and_no_style_of_its_own() -> None:
    index = page.files()["index.html"].decode()
    assert re.findall(r"<script[^>]*>(.*?)</script>", index, re.S) == [""]
    assert not re.search(r"<style|\sstyle=|\son\w+=", index)


def test_scripts_import_what_others_export() -> None:
    sources = {name: page.files()[name].decode() for name in SCRIPTS}
    exports = re.compile(r"^export (?:async )?(?:function\*?|class|const) (\w+)", re.M)
    for name, source in sources.items():
        imports = re.findall(r'^import \{([^}]*)\} from "\./([\w.]+)";$', source, re.M)
        assert len(imports) == len(re.findall("^import", source, re.M)), f"{name} has an import of another form"
        for names, other in imports:
            wanted = {one.strip() for one in names.split(",")}
            assert wanted <= set(exports.findall(sources[other])), f"{name} imports {wanted} from {other}"


def test_the_script_finds_every_element_that_it_names() -> None:
    index, main = page.files()["index.html"].decode(), page.files()["main.js"].decode()
    named = set(re.findall(r'\$\("([\w-]+)"\)', main))
    assert named and named <= set(re.findall(r'\sid="([\w-]+)"', index))
