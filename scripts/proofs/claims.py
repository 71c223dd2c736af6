"""What the papers behind Redraft's methods claim, each in small. A run takes seconds to minutes of one core.

Without a name the claims are listed. NAME is a method, seam=method, a claim, or all. The verdict follows from the 95 % bootstrap
interval over samples: it must lie on one side of the border. docs/claims.md quotes the runs. The claims of serving are in
scripts/prove serving-claims.

Example: scripts/prove claims token-recycling copyspec --model smollm2
"""

from __future__ import annotations

import argparse
import sys
import textwrap
import time
from pathlib import Path

from redraft.errors import RedraftError
from scripts.claims import claim as claims
from scripts.claims.claim import Claim, Result
from scripts.claims.lab import Lab
from scripts.claims.registry import chosen, every

WIDTH = 80
PAGE = Path(__file__).resolve().parents[2] / "docs" / "claims.md"
BEGIN, END = "<!-- claims -->", "<!-- end -->"


def show(claim: Claim, result: Result) -> None:
    verdict = claim.verdict(result.interval, result.samples)
    lines = [claim.name, f"  claim: {claim.says}", f"  small: {claim.small}", f"  {claim.value}, {claim.expected} expected:",
             f"  {result}, {result.samples} samples: {verdict}", *(f"  {note}" for note in result.notes),
             f"  {result.seconds:g} s of a processor"]  # fmt: skip
    for line in lines:
        print(textwrap.fill(line, WIDTH, subsequent_indent="    "), flush=True)


def listed() -> None:
    for claim in every():
        print(textwrap.fill(f"{claim.name:<28}{claim.says}", WIDTH, subsequent_indent=" " * 28))


def page(text: str, table: list[str]) -> str:
    """The page with the table between its marks."""
    before, rest = text.split(BEGIN)
    return "\n".join([before + BEGIN, *table, END + rest.split(END)[1]])


def keep(results: list[Result]) -> None:
    """Adds the results to those that are kept, and writes the page anew."""
    known = claims.read() | {one.name: one for one in results}
    claims.write(known[name] for name in sorted(known))
    PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), claims.table(every(), known)), encoding="utf-8")


def command(claim: Claim, limit: int | None, seed: int) -> str:
    return f"scripts/prove claims {claim.name}" + (f" --limit {limit}" if limit else "") + (f" --seed {seed}" if seed else "")


def main() -> None:
    parser = argparse.ArgumentParser(prog="prove claims", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME")
    parser.add_argument("--model", default="smollm2", help="folder of SmolLM2-135M-Instruct")
    parser.add_argument("--limit", type=int, help="samples; default: as each claim says")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--heads", type=Path, help="folder with trained parts, each in a folder of the method's name")
    parser.add_argument("--json", type=Path, metavar="FILE", help="write the results there")
    parser.add_argument("--write", action="store_true", help="add them to scripts/claims/results.json and docs/claims.md")
    given = parser.parse_args()
    if given.limit is not None and given.limit < 2:
        parser.error(f"--limit {given.limit}: 2 or more is allowed")
    if not given.names and not given.write:
        listed()
        return
    try:
        wanted = chosen(given.names)
    except ValueError as error:
        parser.error(str(error))
    lab, results, failed = Lab(given.model, given.limit, given.seed, heads=given.heads), [], []
    for claim in wanted:
        began = time.process_time()
        try:
            found = claim.run(lab)
        except (RedraftError, SystemExit) as error:
            failed.append(f"{claim.name}: {error}")
            continue
        results.append(Result.of(claim, found, time.process_time() - began, command(claim, given.limit, given.seed)))
        show(claim, results[-1])
        if given.write:
            keep(results)
    if given.json:
        claims.write(results, given.json)
    if given.write:
        keep(results)
    if failed:
        sys.exit("\n".join(failed))


if __name__ == "__main__":
    main()
