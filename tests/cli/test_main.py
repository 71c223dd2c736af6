"""What holds for all verbs: nothing heavy for help, errors on one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from redraft import __version__
from tests.cli.conftest import Ran

LIGHT = """
import sys
from redraft.cli.main import run
assert run(sys.argv[1:]) == 0
heavy = {"torch", "transformers", "tokenizers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["serve", "--help"], ["methods"], ["methods", "token-recycling"], ["--version"]],
    ids=" ".join,
)
def test_help_and_methods_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


def test_help_names_every_verb(redraft: Callable[..., Ran]) -> None:
    code, out, _ = redraft("--help")
    assert code == 0
    assert all(f" {verb} " in out for verb in ("generate", "chat", "compare", "methods", "explain"))


def test_version(redraft: Callable[..., Ran]) -> None:
    assert redraft("--version") == (0, f"redraft {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "told"),
    [
        (["generate", "--temperature", "-1"], 2, "--temperature = -1.0: must be at least 0"),
        (["generate", "--temperature", "warm"], 2, "'--temperature'"),
        (["generate", "--dtype", "float8"], 2, "'bfloat16'"),
        (["generate", "--stop", ""], 2, "an empty string is not allowed"),
        (["generate", "--max-tokens", "0"], 2, "--max-tokens = 0: must be at least 1"),
        (["generate", "--threads", "0"], 2, "--threads = 0: must be at least 1 and at most 1024"),
        (["generate", "--cache-fraction", "2"], 2, "--cache-fraction = 2.0: must be more than 0 and at most 0.95"),
        (["bench", "ops", "100m", "--threads", "-1"], 2, "'--threads'"),
        (["bench", "decode", "100m", "--redraft", "threads=0"], 2, "redraft threads=0: ModelConfig.threads = '0'"),
        (["generate", "--colour"], 2, "--colour"),
        (["generate", "--draft", "token-recyclin"], 2, "did you mean 'token-recycling'?"),
        (["generate", "--draft", "copyspec:gama=2"], 2, "allowed: gamma, block, latest"),
        (["generate", "--draft", "copyspec:gamma=two"], 2, "not an int"),
        (["generate", "--verify", "couple"], 2, "did you mean 'coupled'?"),
        (["generate", "--backend", "tortch"], 2, "did you mean 'torch'?"),
        (["generate", "--device", "gpu"], 2, "auto, cpu, cuda or cuda:N"),
        (["generate", "--prompt", ""], 2, "prompt is empty"),
        (["generate", "--prompt", "x" * 300], 2, "max_model_len = 256"),
        (["generate", "--max-model-len", "512"], 2, "the checkpoint's context is 256"),
        (["generate", "--cache-memory", "1000"], 1, "cannot hold one sequence of max_model_len"),
        (["explain", "--draft", "nonsense"], 2, "no draft method 'nonsense': "),
        (["explain", "--scheduler", "sarati"], 2, "did you mean 'sarathi'?"),
        (["methods", "copy-spec"], 2, "did you mean 'copyspec'"),
        (["chatt"], 2, "'chat'"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_error_is_one_line(redraft: Callable[..., Ran], tiny: str, arguments: list[str], code: int, told: str) -> None:
    if arguments[0] in ("generate", "explain"):
        arguments = [
            arguments[0],
            tiny,
            *([] if "--prompt" in arguments or arguments[0] == "explain" else ["--prompt", "x"]),
            *arguments[1:],
        ]
    got, out, err = redraft(*arguments)
    assert (got, out) == (code, "")
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert told in err


def test_a_missing_checkpoint_is_one_line(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    code, out, err = redraft("generate", str(tmp_path / "none"), "--prompt", "x")
    assert (code, out) == (1, "")
    hint = "no such folder, and not a hub id (org/name or org/name@revision)"
    assert err == f"error: {tmp_path}/none: {hint}; the model 'embedded' ships with Redraft\n"
