"""Common to all verbs: help imports nothing heavy, errors are one line, exit codes."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from typer.testing import CliRunner

from redraft import __version__
from redraft.cli import habits, main
from redraft.cli.main import app
from redraft.ops import library
from tests.cli.conftest import Ran
from tests.test_llm import MISSING

LIGHT = """
import sys
from redraft.cli.main import run
assert run(sys.argv[1:]) == 0
heavy = {"torch", "transformers", "tokenizers", "huggingface_hub"} & set(sys.modules)
assert not heavy, heavy
"""


@pytest.mark.parametrize(
    "arguments",
    [["--help"], ["generate", "--help"], ["serve", "--help"], ["methods"], ["methods", "token-recycling"], ["cache"], ["--version"]],
    ids=" ".join,
)
def test_help_and_methods_import_nothing_heavy(arguments: list[str]) -> None:
    done = subprocess.run([sys.executable, "-c", LIGHT, *arguments], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout


LAZY = """
import sys
from redraft.cli.main import run
assert run([*sys.argv[2:], "--help"]) == 0
found = [name for name in sys.argv[1].split(",") if name in sys.modules]
assert not found, found
"""
ENGINE = "numpy,redraft.engine,redraft.llm,redraft.models.loader,redraft.ops"


@pytest.mark.parametrize("verb", ["", *main.VERBS, "bench decode", "bench serve"])
def test_help_imports_no_engine_and_without_a_verb_no_options(verb: str) -> None:
    forbidden = ENGINE if verb else f"{ENGINE},pydantic,redraft.config,redraft.cli.options"
    done = subprocess.run([sys.executable, "-c", LAZY, forbidden, *verb.split()], capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "Usage: " in done.stdout, done.stderr


EVERY = """
import importlib, importlib.util, pkgutil
import redraft.bench, redraft.cli
found = [one.name for top in (redraft.bench, redraft.cli) for one in pkgutil.walk_packages(top.__path__, f"{top.__name__}.")]
for name in found:
    absent = name == "redraft.cli.parquet" and not importlib.util.find_spec("pyarrow")  # a form of files that an extra brings
    if name != "redraft.bench.peers.transformers" and not absent:  # it measures what it imports
        importlib.import_module(name)
print(*found)
"""


def test_no_measurement_and_no_verb_imports_pytorch() -> None:
    done = subprocess.run([sys.executable, "-c", MISSING + EVERY], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert {f"redraft.cli.{verb}" for verb in main.VERBS} | {"redraft.bench.peers.limits"} <= set(done.stdout.split())


RUN = """
from redraft.bench import ops
from redraft.cli import doctor, main
doctor.BUFFER = ops.limits.BUFFER = 4 << 20
doctor.ROUNDS = ops.COPIES = 2
ops.limits.peaks = lambda *side: {"float32": 1e11}
raise SystemExit(main.run())
"""
FEW = "--rounds 1 --threads 1"


@pytest.mark.skipif(bool(library.why_not()), reason="no native kernels")
@pytest.mark.parametrize(
    ("command", "printed"),
    [
        ("doctor embedded", "native library"),
        ("explain --draft token-recycling", "runner: backend native on cpu"),
        ("calibrate --texts README.md --samples 1 --output {folder}/profile", "{folder}/profile"),
        ("calibrate --method razor --output {folder}/heads.safetensors", "{folder}/heads.safetensors"),
        ("compare --draft copyspec --limit 1 --rounds 1 --max-tokens 4", "native backend"),
        ("tune --draft copyspec --limit 1 --rounds 2 --max-tokens 4 --best 1", "draft: "),
        (f"bench ops embedded --backend native --quant int4 --rows 1 --cached 32 --shared 32 {FEW}", "all linear layers of a step"),
        (f"bench quant --texts README.md --tokens 32 --length 32 --decoded 2 {FEW}", "int8"),
        ("bench cache --texts README.md --limit 2 --length 100 --memory 0 --turns 1 --policy codec=int8", "perplexity"),
    ],
    ids=lambda value: " ".join(value.split()[:2]),
)
def test_a_measurement_needs_no_pytorch(command: str, printed: str, tmp_path: Path) -> None:
    words, root = command.format(folder=tmp_path).split(), Path(__file__).parents[2]
    done = subprocess.run([sys.executable, "-c", f"{MISSING}{RUN}", *words], capture_output=True, text=True, check=False, cwd=root)
    assert done.returncode == 0, done.stderr[-2000:]
    assert printed.format(folder=tmp_path) in done.stdout


def test_help_names_every_verb(redraft: Callable[..., Ran]) -> None:
    code, out, _ = redraft("--help")
    assert code == 0
    assert all(f" {verb} " in out for verb in ("generate", "chat", "compare", "methods", "explain"))


@pytest.mark.parametrize("name", main.VERBS)
def test_the_line_of_a_verb_is_the_first_of_its_help(name: str) -> None:
    assert main.VERBS[name] == " ".join(main.verb(name).help.split("\n\n")[0].split())


def test_version(redraft: Callable[..., Ran]) -> None:
    assert redraft("--version") == (0, f"redraft {__version__}\n", "")


@pytest.mark.parametrize(
    ("arguments", "code", "expected"),
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
        (["calibrate", "--method", "snapkv"], 2, "these methods need a calibration: "),
        (["calibrate", "--method", "razor", "--samples", "0"], 2, "'--samples'"),
        (["bench", "cache", "--task", "ruler"], 2, "known: facts, multi-request; facts, multi-turn; "),
        (["methods", "copy-spec"], 2, "did you mean 'copyspec'"),
        (["generate", "--lora", "x"], 2, "--lora = ['x']: 'x' is not NAME=FOLDER"),
        (["generate", "--lora", "x=/none/y"], 1, "'/none/y': no adapter: it has no adapter_config.json"),
        (["explain", "--lora", "x=/none/y"], 1, "'/none/y': no adapter: it has no adapter_config.json"),
        (["serve", "--lora-modules", "x=y"], 2, "--lora-modules is --lora here"),
        (["serve", "--enable-lora"], 2, "no option --enable-lora: --lora NAME=FOLDER is enough"),
        (["bench", "cache", "--lora", "x=y"], 2, "no option --lora"),
        (["chatt"], 2, "'chat'"),
        (["chat" * 1000], 2, "No such command 'chatchat"),
        (["serve", "--" + "x" * 5000], 2, "xx; --help lists the options"),
        (["generate", "--cache-memory", "2G"], 2, "--cache-memory = '2G': a whole number of bytes, or a size in KB, MB, GB"),
        (["generate", "--cache-memory", "0MB"], 2, "--cache-memory = '0MB': must be at least 1"),
        (["generate", "--raw", "--chat-template", "{{ messages }}"], 2, "--raw and --chat-template exclude each other"),
    ],
    ids=lambda value: " ".join(value)[:40] if isinstance(value, list) else "",
)
def test_an_error_is_one_line(redraft: Callable[..., Ran], tiny: str, arguments: list[str], code: int, expected: str) -> None:
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
    assert err.count("\n") == 1 and len(err) < 1100
    assert expected in err


@pytest.mark.parametrize(
    ("arguments", "answer"),
    [
        (["serve", "--ctx-size", "4096"], "redraft serve: --ctx-size is --max-model-len here"),
        (["serve", "-c", "4096"], "redraft serve: -c is --max-model-len here"),
        (["serve", "--model", "x"], "redraft serve: --model is the argument MODEL here: redraft serve MODEL"),
        (["chat", "-m", "x"], "redraft chat: -m is the argument MODEL here: redraft chat MODEL"),
        (["generate", "-n", "5"], "redraft generate: -n is --max-tokens here"),
        (["generate", "-n5"], "redraft generate: -n is --max-tokens here"),
        (["generate", "-ngl", "99"], "redraft generate: no option -ngl: a model lies whole on one device, chosen by --device"),
        (["serve", "--gpu-memory-utilization=0.9"], "redraft serve: --gpu-memory-utilization is --cache-fraction here"),
        (["serve", "--tensor-parallel-size", "2"], "redraft serve: no option --tensor-parallel-size: a model lies whole on one device"),
        (["serve", "--data-parallel-size", "2"], "redraft serve: --data-parallel-size is --replicas here"),
        (["serve", "--kv-transfer-config", "{}"], "redraft serve: --kv-transfer-config is --instances here"),
        (["serve", "--speculative-config", "{}"], "--speculative-config is --draft, --draft-model and --draft-rows here"),
        (["generate", "--max_tokens", "5"], "redraft generate: --max_tokens is written --max-tokens"),
        (["bench", "ops", "-m", "x"], "redraft bench ops: -m is the argument MODEL here"),
        (["doctor", "-c", "5"], "redraft doctor: no option -c; --help lists the options"),  # a verb without such an option
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_flags_of_other_engines_are_answered(redraft: Callable[..., Ran], arguments: list[str], answer: str) -> None:
    code, out, err = redraft(*arguments)
    assert (code, out, err.count("\n")) == (2, "", 1)
    assert answer in err and "did you mean" not in err


@pytest.mark.parametrize(
    ("flag", "end"),
    [
        ("--max-token", "did you mean --max-tokens?"),
        ("--temperatrue", "did you mean --temperature?"),
        ("--ctx", "no option --ctx; --help lists the options"),
        ("--colour", "no option --colour; --help lists the options"),
        ("--x", "no option --x; --help lists the options"),
    ],
)
def test_only_near_flags_are_suggested(redraft: Callable[..., Ran], flag: str, end: str) -> None:
    _, _, err = redraft("generate", flag, "1")
    assert err.endswith(f"{end}\n")


def test_the_answers_name_options_that_exist() -> None:
    verbs = map(main.verb, main.VERBS)
    known = {name for verb in verbs for parameter in verb.params for name in (*parameter.opts, *parameter.secondary_opts)}
    assert {word.strip(",") for ours in habits.OURS.values() for word in ours.split() if word.startswith("--")} <= known
    assert not set(habits.OURS) & set(habits.WITHOUT)


@pytest.mark.parametrize(
    "verb",
    ["", *main.VERBS, "bench cache", "bench decode", "bench ops", "bench profile", "bench quant", "bench serve"],
)
def test_help_fits_80_columns(verb: str) -> None:
    shown = CliRunner().invoke(app, [*verb.split(), "--help"], env={"COLUMNS": "80", "TERM": "dumb"})
    assert shown.exit_code == 0
    assert max(map(len, shown.output.splitlines())) <= 80
    assert "\N{HORIZONTAL ELLIPSIS}" not in shown.output, "a name is cut"


def test_a_missing_checkpoint_is_one_line(redraft: Callable[..., Ran], tmp_path: Path) -> None:
    code, out, err = redraft("generate", str(tmp_path / "none"), "--prompt", "x")
    assert (code, out) == (1, "")
    hint = "no such folder, and not a hub id (org/name or org/name@revision)"
    assert err == f"error: {tmp_path}/none: {hint}; the model 'embedded' ships with Redraft\n"
