"""What papers claim of serving with many workers, in small, on simulated time. Without names all claims are run.

Each line gives a ratio, the mean over seeds with its 95 % interval, and what it says about the claim. docs/claims-serving.md quotes them.

Example: scripts/prove serving-claims distserve --seeds 3
"""

from __future__ import annotations

import argparse
import importlib

CLAIMS = ("distserve", "gaps", "splitwise", "epd", "semi-pd", "nexus", "lamina", "pearl")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help=", ".join(CLAIMS))
    parser.add_argument("--seeds", type=int, default=3, help="2 to 10; default 3")
    given = parser.parse_args()
    if not 2 <= given.seeds <= 10:
        parser.error(f"--seeds {given.seeds}: 2 to 10 is allowed")
    for name in given.names or CLAIMS:
        claim = importlib.import_module(f"scripts.claims.{name.replace('-', '_')}")
        print(f"{name}\n{claim.__doc__}")
        for line in claim.run(given.seeds):
            print(line, flush=True)
        print()


if __name__ == "__main__":
    main()
