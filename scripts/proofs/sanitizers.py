"""The kernels under sanitizers of addresses, undefined behaviour and threads, for each instruction set that this machine has.

The suite runs the best set only (tests/ops/test_kernels.py). Takes about three minutes.
"""

from __future__ import annotations

import os
import sys

import pytest


def main() -> None:
    os.environ["REDRAFT_EVERY_SET"] = "1"  # before the tests are imported
    sys.exit(pytest.main(["tests/ops/test_kernels.py", "-v", *sys.argv[1:]]))


if __name__ == "__main__":
    main()
