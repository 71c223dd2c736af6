"""Writes the diffs of docs/adding.md from the source files: one method of each kind of cache policy.

python scripts/adding_diffs.py
"""

from __future__ import annotations

import ast
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PAGE = ROOT / "docs" / "adding.md"
START, END = "<!-- diffs: written by scripts/adding_diffs.py -->", "<!-- end of diffs -->"
SHOWN = {  # seam -> method, its file, what of it is shown
    "keep": ("streaming-llm", "redraft/kv/eviction/streaming_llm.py", ("Streaming", "StreamingLLM")),
    "codec": ("int8", "redraft/kv/quantization/int8.py", ("Int8", "Int8Units", "_encode")),
    "read": ("page-top-k", "redraft/kv/sparse_attention/page_top_k.py", ("PageTopK",)),
    "reuse": ("pie", "redraft/kv/reuse/pie.py", ("PIE",)),
    "depth": ("layer-skip", "redraft/layer_skipping/layer_skip.py", ("UnifiedLayerSkipping",)),
}


def added(path: str, names: tuple[str, ...]) -> list[str]:
    """The lines of these classes and functions, without their docstrings."""
    source = (ROOT / path).read_text(encoding="utf-8")
    lines, found = source.splitlines(), []
    for node in ast.parse(source).body:
        if isinstance(node, (ast.ClassDef, ast.FunctionDef)) and node.name in names:
            first = min([node.lineno, *(decorator.lineno for decorator in node.decorator_list)])
            docstrings = {
                line
                for part in ast.walk(node)
                if isinstance(part, (ast.ClassDef, ast.FunctionDef)) and ast.get_docstring(part)
                for line in range(part.body[0].lineno, (part.body[0].end_lineno or 0) + 1 + isinstance(part, ast.ClassDef))
            }
            found += ["", *(lines[i - 1] for i in range(first, (node.end_lineno or 0) + 1) if i not in docstrings)]
    return found[1:]


def diff(path: str, lines: list[str]) -> list[str]:
    return ["```diff", f"+++ {path}", *(f"+{line}" for line in lines), "```", ""]


def registered(name: str, path: str) -> list[str]:
    lines = (ROOT / "redraft" / "registry.py").read_text(encoding="utf-8").splitlines()
    module = path.removesuffix(".py").replace("/", ".")
    return [line for line in lines if f'"{name}": "{module}:' in line]


def contract(name: str) -> list[str]:
    lines = (ROOT / "tests" / "contracts" / "test_policies.py").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if line.strip().startswith(f'"{name}": ')]


def section() -> str:
    parts = [START, ""]
    for seam, (name, path, names) in SHOWN.items():
        parts += [f"### {seam}: `{name}`", ""]
        parts += diff("redraft/registry.py", registered(name, path))
        parts += diff(path, added(path, names))
        if lines := contract(name):
            parts += diff("tests/contracts/test_policies.py", lines)
    return "\n".join([*parts, END])


def page() -> str:
    before, _, rest = PAGE.read_text(encoding="utf-8").partition(START)
    return before + section() + rest.partition(END)[2]


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
    print(f"wrote {PAGE}", file=sys.stderr)
