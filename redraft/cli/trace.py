"""The page of one generation, `redraft generate --trace`: the scripts and the style of the server's page, with the tokens, in one file."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from redraft import __version__
from redraft.bench import files
from redraft.config import SamplingParams
from redraft.errors import InvalidInput
from redraft.serve import provenance

if TYPE_CHECKING:
    from redraft.cli.stream import Shown
    from redraft.llm import LLM
    from redraft.outputs import Delta

SCRIPTS = Path(provenance.__file__).with_name("page")
FIRST = "recorded.js"
IMPORT = re.compile(r'^import \{([^}]*)\} from "\./([\w.]+)";\n', re.M)
EXPORT = re.compile(r"^export (?=(?:async )?(?:function\*?|class|const) (\w+))", re.M)
PAGE = """<!doctype html>
<html lang="en" data-theme="system"><head><meta charset="utf-8">
<meta http-equiv="Content-Security-Policy" content="{policy}">
<meta name="viewport" content="width=device-width, initial-scale=1"><meta name="color-scheme" content="light dark">
<title>{title}</title><link rel="icon" href="data:,"><style>{style}</style></head>
<body class="record"><header class="top"><h1>Redraft</h1><p id="about" class="about"></p><div class="actions"></div></header>
<main></main><p id="said" class="unseen" role="status" aria-live="polite"></p>
<script type="application/json" id="run">{data}</script>
<script type="module">{script}</script></body></html>
"""


def traced(params: SamplingParams) -> SamplingParams:
    """The parameters of a generation that can be shown."""
    return params.but(provenance=True, logprobs=provenance.ALTERNATIVES + 1)


def write(path: Path, llm: LLM, prompt: str, params: SamplingParams, shown: Shown, *, chat: bool) -> None:
    """Writes the page whole or not at all. InvalidInput names a file that cannot be written."""
    try:
        files.write_text(path, page(recorded(llm, prompt, params, shown, chat=chat)))
    except OSError as error:
        raise InvalidInput(f"trace = {path}: {error.strerror or error}") from None


def recorded(llm: LLM, prompt: str, params: SamplingParams, shown: Shown, *, chat: bool) -> dict[str, Any]:
    """The run in the form in which the page saves and opens one."""
    server = {
        "model": Path(llm.name).name,
        "backend": llm.runner.backend.name,
        "draft": llm.config.draft,
        "guarantee": llm.promise(params, shown.prompt_tokens),
        "version": f"redraft {__version__}",
    }
    request = {"temperature": llm.params(params).temperature, "seed": str(params.seed)}
    runs = []
    for index in range(params.n):
        pieces = [_piece(llm, at, delta) for at, delta in shown.pieces[index]]
        run = {"name": f"Text {index + 1} of {params.n}" if params.n > 1 else "", "request": request, "pieces": pieces}
        runs.append(run | {"metrics": {"faults": [shown.fault] if shown.fault else []}, "ended": pieces[-1]["at"] if pieces else 0.0})
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "runs": runs}]
    return {"format": "redraft-run", "version": 1, "server": server, "mode": "chat" if chat else "completion", "turns": turns}


def page(data: dict[str, Any]) -> str:
    """One HTML file that loads nothing. Its policy allows its own script and style, by their hashes, and nothing else."""
    style, script = (SCRIPTS / "style.css").read_text(encoding="utf-8"), "\n" + "".join(_modules(FIRST, []))
    assert "</style" not in style and "</script" not in script
    policy = f"default-src 'none'; script-src {_hash(script)}; style-src {_hash(style)}; img-src data:; base-uri 'none'; form-action 'none'"
    title = f"Redraft: {data['server']['model']}"
    plain = json.dumps(data, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return PAGE.format(policy=policy, title=escape(title), style=style, data=plain, script=script)


def _piece(llm: LLM, at: float, delta: Delta) -> dict[str, Any]:
    parts = provenance.parts(llm.tokenizer, delta.token_ids, delta.logprobs, delta.provenance)
    return {"at": round(1000 * at, 2), "text": delta.text, "finish_reason": delta.finish_reason, **parts}


def _modules(name: str, done: list[str]) -> Iterator[str]:
    """The script of this name after those that it imports. Each becomes a function that returns what the module exports."""
    if name in done:
        return
    done.append(name)
    source = (SCRIPTS / name).read_text(encoding="utf-8")
    for _, other in IMPORT.findall(source):
        yield from _modules(other, done)
    body = IMPORT.sub(lambda found: f"const {{{found[1]}}} = {_variable(found[2])};\n", source)
    exported = ", ".join(EXPORT.findall(body))
    yield f"const {_variable(name)} = (() => {{\n{EXPORT.sub('', body)}return {{ {exported} }};\n}})();\n"


def _variable(name: str) -> str:
    return f"$_{name.removesuffix('.js')}"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"
