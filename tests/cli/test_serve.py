"""The source of a setting: command line before environment before file before default. Errors name it."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from redraft.cli.options import ENGINE
from redraft.cli.serve import ALIASES, NAMES, OTHERS, SERVER, VARIABLES
from redraft.config import EngineConfig
from redraft.serve.config import ServeConfig
from tests.cli.conftest import Ran

Configs = list[tuple[EngineConfig, ServeConfig]]
Serve = Callable[..., Ran]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> Configs:
    """Records the arguments of the server. It ends with 3 if the port is 3."""
    started: Configs = []

    def run(engine: EngineConfig, serve: ServeConfig, sockets: list[Any]) -> int:
        assert sockets == []
        started.append((engine, serve))
        return 3 if serve.port == 3 else 0

    module = types.ModuleType("redraft.serve.run")
    module.run = run  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "redraft.serve.run", module)
    monkeypatch.setattr("redraft.cli.serve.listen", lambda serve: [])
    for variable in os.environ:
        if variable.startswith("REDRAFT_"):
            monkeypatch.delenv(variable)
    return started


@pytest.fixture
def file(tmp_path: Path) -> Callable[[str], str]:
    def write(text: str) -> str:
        (tmp_path / "serve.yaml").write_text(text, encoding="utf-8")
        return str(tmp_path / "serve.yaml")

    return write


def shown(err: str, name: str) -> tuple[str, str]:
    """Value and origin of a setting in what is printed at start."""
    (line,) = re.findall(rf"^  {name} +(.*)$", err, re.M)
    value, origin = re.split(r" {2,}| (?=default$|file$|environment$|command line$)", line, maxsplit=1)
    return value, origin.strip()


def test_nothing_given(redraft: Serve, ran: Configs) -> None:
    code, out, err = redraft("serve")
    assert (code, out) == (0, "")
    assert ran == [(EngineConfig.of(model="embedded", draft="auto"), ServeConfig())]
    assert [line.split() for line in err.splitlines()[1:]] == [
        ["model", "embedded", "default"],
        ["quant", "auto", "default"],
        ["host", "127.0.0.1", "default"],
        ["port", "8000", "default"],
    ]


def test_only_what_differs_is_shown(redraft: Serve, ran: Configs, file: Callable[[str], str], tmp_path: Path) -> None:
    path = file("max-n: 3\nmax-stop: 16\ndraft: auto\nprefix-sharing: false\n")
    _, _, err = redraft("serve", "--config", path, "--uds", str(tmp_path / "socket"), "--quant", "int8", "--max-body", "4194304")
    assert re.findall(r"^  (\S+)", err, re.M) == ["model", "quant", "prefix-sharing", "uds", "max-n"]


def test_the_code_of_the_server_is_that_of_the_command(redraft: Serve, ran: Configs) -> None:
    assert redraft("serve", "--port", "3")[0] == 3


def test_command_line_over_environment_over_file_over_default(
    redraft: Serve, ran: Configs, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch
) -> None:
    path = file("model: a\nport: 1\nhost: one\nmax-n: 1\ndraft: copyspec\nmax-seqs: 1\nthreads: 1\n")
    for name, value in {"MODEL": "b", "PORT": "2", "HOST": "two", "DRAFT": "none", "MAX_NUM_SEQS": "2"}.items():
        monkeypatch.setenv(f"REDRAFT_{name}", value)
    code, _, err = redraft("serve", "c", "--config", path, "--port", "4", "--max-num-seqs", "3", "--draft", "self-skip")
    ((engine, server),) = ran
    assert code == 0
    assert engine == EngineConfig.of(model="c", draft="self-skip", max_seqs=3, threads=1)
    assert server == ServeConfig(port=4, host="two", max_n=1)
    origins = {name: shown(err, name) for name in ("model", "port", "host", "max-n", "quant", "max-seqs", "threads")}
    assert origins == {
        "model": ("c", "command line"),
        "port": ("4", "command line"),
        "host": ("two", "environment"),
        "max-n": ("1", "file"),
        "quant": ("auto", "default"),
        "max-seqs": ("3", "command line"),
        "threads": ("1", "file"),
    }


def test_every_setting_has_a_flag_and_a_variable(redraft: Serve, ran: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "250")
    _, out, _ = redraft("serve", "--help")
    flags = set(re.findall(r"--([a-z-]+)", out))
    assert set(NAMES) == {"model", *SERVER.fields, *ENGINE.fields, *ALIASES}
    assert flags == {
        *(name.replace("_", "-") for name in (*NAMES, "config") if name != "model" and name not in ALIASES),
        "help",
        "no-access-log",
        "no-prefix-sharing",
    }
    assert set(VARIABLES) == {f"REDRAFT_{name.upper()}" for name in ("config", *NAMES)}


@pytest.mark.parametrize("way", ["flag", "variable", "dashes", "underscores"])
def test_values_arrive_as_they_were_meant(
    redraft: Serve, ran: Configs, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, way: str
) -> None:
    given = {"request_timeout": "1.5", "max_num_batched_tokens": "99", "keep": "streaming-llm:sinks=2", "cache_memory": "5000"}
    given |= {"dtype": "float64", "ssl_keyfile": __file__, "ssl_certfile": __file__}
    several = {"api_key": ["k1", "k2"], "served_model_name": ["a:b"], "allow_origins": ["*"]}
    arguments: list[str] = []
    if way == "flag":
        for name, values in {**{name: [value] for name, value in given.items()}, **several}.items():
            arguments += [word for value in values for word in (f"--{name.replace('_', '-')}", value)]
        arguments += ["--no-access-log", "--no-prefix-sharing"]
    elif way == "variable":
        for name, value in {**given, **{name: ", ".join(values) for name, values in several.items()}}.items():
            monkeypatch.setenv(f"REDRAFT_{name.upper()}", value)
        monkeypatch.setenv("REDRAFT_ACCESS_LOG", "off")
        monkeypatch.setenv("REDRAFT_PREFIX_SHARING", "0")
    else:
        text = "".join(f"{name}: {value}\n" for name, value in given.items())
        text += "api_key:\n- k1\n- k2\nserved_model_name: a:b\nallow_origins: ['*']\naccess_log: off\nprefix_sharing: false\n"
        if way == "dashes":
            text = re.sub(r"^\w+", lambda found: found[0].replace("_", "-"), text, flags=re.M)
        monkeypatch.setenv("REDRAFT_CONFIG", file(text))
    code, _, err = redraft("serve", *arguments)
    assert code == 0, err
    keys = {"ssl_keyfile": Path(__file__), "ssl_certfile": Path(__file__), "api_key": ("k1", "k2")}
    expected = ServeConfig(
        request_timeout=1.5, keep="streaming-llm:sinks=2", served_model_name=("a:b",), allow_origins=("*",), access_log=False, **keys
    )
    draft = {"draft": "auto"}
    assert ran == [(EngineConfig.of(token_budget=99, cache_memory=5000, dtype="float64", prefix_sharing=False, **draft), expected)]
    assert shown(err, "api-key")[0] == "(2 keys)"
    assert "k1" not in err


@pytest.mark.parametrize("way", ["flag", "variable", "list", "text"])
def test_adapters_and_the_admin_key(
    redraft: Serve, ran: Configs, file: Callable[[str], str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, way: str
) -> None:
    given = ("french=./fr", "legal=/srv/a=b") if way != "text" else ("french=./fr",)
    arguments: list[str] = []
    if way == "flag":
        arguments = [word for text in given for word in ("--lora", text)]
        arguments += ["--lora-dir", str(tmp_path), "--admin-key", "secret-1"]
    elif way == "variable":
        for name, text in {"LORA": ", ".join(given), "LORA_DIR": str(tmp_path), "ADMIN_KEY": "secret-1"}.items():
            monkeypatch.setenv(f"REDRAFT_{name}", text)
    else:
        loras = "".join(f"\n- {text}" for text in given) if way == "list" else f" {given[0]}"
        arguments = ["--config", file(f"lora:{loras}\nlora-dir: {tmp_path}\nadmin-key: secret-1\n")]
    code, _, err = redraft("serve", *arguments)
    assert code == 0, err
    ((engine, server),) = ran
    assert engine.model.adapters == dict(text.split("=", 1) for text in given)
    assert (server.lora_dir, server.admin_key, server.loads) == (tmp_path, "secret-1", True)
    origin = {"flag": "command line", "variable": "environment"}.get(way, "file")
    assert shown(err, "lora") == (", ".join(given), origin)
    assert shown(err, "admin-key") == ("(a key)", origin)
    assert "secret" not in err


def test_what_is_on_in_the_file_is_off_by_flag(redraft: Serve, ran: Configs, file: Callable[[str], str]) -> None:
    redraft("serve", "--config", file("access-log: true"), "--no-access-log")
    redraft("serve", "--config", file("access-log: false"), "--access-log")
    assert [server.access_log for _, server in ran] == [False, True]


@pytest.mark.parametrize(
    ("arguments", "environment", "text", "error"),
    [
        (["--port", "70000"], {}, None, "--port = 70000: "),
        (["--port", "x"], {}, None, "'--port'"),
        (["--cache-fraction", "2"], {}, None, "--cache-fraction = 2.0: "),
        (["--max-num-seqs", "0"], {}, None, "--max-num-seqs = 0: "),
        (["--keep", "x"], {}, None, "--keep = 'x': no keep method 'x': "),
        (["--ssl-keyfile", "/none"], {}, None, "--ssl-keyfile = "),
        (["--chat-template", "{% x %}"], {}, None, "--chat-template = '{% x %}': the template does not parse, line 1: "),
        (["--max-num-seqs", "2", "--max-seqs", "2"], {}, None, "--max-num-seqs and --max-seqs are one option: give one"),
        ([], {"PORT": "tcp://10.0.0.1:8000"}, None, "REDRAFT_PORT = 'tcp://10.0.0.1:8000': "),
        ([], {"ACCESS_LOG": "maybe"}, None, "REDRAFT_ACCESS_LOG = 'maybe': "),
        ([], {"API_KEY": ""}, None, "REDRAFT_API_KEY = (hidden): an empty string"),
        ([], {"API_KEY": "secret one"}, None, "REDRAFT_API_KEY = (hidden): a key has"),
        ([], {"CHAT_TEMPLATE": "/none"}, None, "REDRAFT_CHAT_TEMPLATE = '/none': neither"),
        ([], {"TOKEN_BUDGET": "0"}, None, "REDRAFT_TOKEN_BUDGET = '0': "),
        ([], {"MAX_NUM_BATCHED_TOKENS": "9", "TOKEN_BUDGET": "9"}, None, "are one option: give one of them"),
        ([], {"CONFIG": "/none.yaml"}, None, "REDRAFT_CONFIG /none.yaml: No such file"),
        (["--config", "/none.yaml"], {"CONFIG": "/other.yaml"}, None, "--config /none.yaml: No such file"),
        (["--lora", "french"], {}, None, "--lora = ['french']: 'french' is not NAME=FOLDER, with a name of "),
        (["--lora", "a b=c"], {}, None, "--lora = ['a b=c']: 'a b=c' is not NAME=FOLDER"),
        (["--lora", "a=b", "--lora", "a=c"], {}, None, ": the name a is given twice"),
        (["--lora", "embedded=a"], {}, None, "--lora = 'embedded': is a name of the model too"),
        (["./some/model", "--lora", "model=a"], {}, None, "--lora = 'model': is a name of the model too"),
        (["--lora-dir", "/none"], {}, None, "--lora-dir = "),
        (["--admin-key", "secret one"], {}, None, "--admin-key = (hidden): a key has"),
        ([], {"ADMIN_KEY": ""}, None, "REDRAFT_ADMIN_KEY = (hidden): an empty string"),
        ([], {"LORA": "a=b,c"}, None, "REDRAFT_LORA = ['a=b', 'c']: 'c' is not NAME=FOLDER"),
        ([], {"LORA": "x=a", "SERVED_MODEL_NAME": "m,x"}, None, "REDRAFT_LORA = 'x': is a name of the model too"),
        ([], {}, "lora: [a=b, c]", "serve.yaml: lora = ['a=b', 'c']: 'c' is not"),
        ([], {}, "lora: {a: b}", "serve.yaml: lora takes one value, not a mapping"),
        ([], {}, "admin-key: [secret-1]", "serve.yaml: admin-key takes one value, not a list"),
        ([], {}, "admin-key: 5", "serve.yaml: admin-key = (hidden): "),
        (["--admin-key", "secret", "--api-key", "secret"], {}, None, "admin_key is an api_key too"),
        ([], {}, "port: 70000", "serve.yaml: port = 70000: "),
        ([], {}, "max_model_len: 1", "serve.yaml: max-model-len = 1: "),
        ([], {}, "prot: 1", "serve.yaml: unknown option 'prot': did you mean 'port'"),
        ([], {}, "max-num-sequences: 1", "did you mean 'max-num-seqs'"),
        ([], {}, "port: {a: 1}", "serve.yaml: port takes one value, not a mapping"),
        ([], {}, "port: [1]", "serve.yaml: port takes one value, not a list"),
        ([], {}, "allow-origins: [[a]]", "serve.yaml: allow-origins.0 = ['a']: "),
        ([], {}, "api-key: {a: secret}", "serve.yaml: api-key takes one value, not a mapping"),
        ([], {}, "api-key: [secret-1, 5]", "serve.yaml: api-key.1 = (hidden): "),
        ([], {}, "api-key: 'secret-1", "serve.yaml: not YAML in UTF-8, line 1"),
        ([], {}, "api-key: !!python/object:secret.X {}", "serve.yaml: not YAML in UTF-8, line 1"),
        ([], {}, "api-key: 2024-13-45", "serve.yaml: not YAML in UTF-8"),
        ([], {}, "[" * 600, "serve.yaml: not YAML"),
        ([], {}, "api-key: \x00", "serve.yaml: not YAML"),
        ([], {}, "draft: off", "serve.yaml: draft = False: YAML reads words"),
        ([], {}, "max-n: yes", "serve.yaml: max-n = True: YAML reads words"),
        ([], {}, "port: 1\nport: 2", "serve.yaml: port is given twice"),
        ([], {}, "max-n: 1\nmax_n: 2", "serve.yaml: max_n is given twice"),
        ([], {}, "max-seqs: 1\nmax-num-seqs: 2", "are one option: give one"),
        ([], {}, "config: x", "serve.yaml: unknown option 'config'"),
        ([], {}, "- port", "serve.yaml: not a mapping"),
        ([], {}, "port", "serve.yaml: not a mapping"),
        ([], {}, "port:", "serve.yaml: port = None: "),
        ([], {}, f"ssl-keyfile: {__file__}", "ssl_keyfile and ssl_certfile must be given together"),
    ],
    ids=lambda value: str(value)[:40],
)
def test_an_error_names_the_setting_as_it_was_written(
    redraft: Serve,
    ran: Configs,
    file: Callable[[str], str],
    monkeypatch: pytest.MonkeyPatch,
    arguments: list[str],
    environment: dict[str, str],
    text: str | None,
    error: str,
) -> None:
    for name, value in environment.items():
        monkeypatch.setenv(f"REDRAFT_{name}", value)
    code, out, err = redraft("serve", *arguments, *([] if text is None else ["--config", file(text)]))
    assert (code, out, ran) == (2, "", [])
    assert error in err
    assert err.startswith("error: ") and err.count("\n") == 1
    assert "secret" not in err


def test_a_file_of_comments_sets_nothing(redraft: Serve, ran: Configs, file: Callable[[str], str]) -> None:
    assert redraft("serve", "--config", file("# nothing\n"))[0] == 0
    assert ran[0][1] == ServeConfig()


def test_a_variable_that_is_no_setting_is_a_warning(redraft: Serve, ran: Configs, monkeypatch: pytest.MonkeyPatch) -> None:
    for variable in ("REDRAFT_PROT", "REDRAFT_port", *OTHERS):
        monkeypatch.setenv(variable, "5")
    code, _, err = redraft("serve")
    assert code == 0
    warnings = [line for line in err.splitlines() if line.startswith("warning: ")]
    assert len(warnings) == 2
    assert "REDRAFT_PROT in the environment is not a setting: did you mean 'REDRAFT_PORT'" in err
    assert ran[0][1].port == 8000


def test_variables_read_elsewhere_are_known() -> None:
    """Else users who set one would get a warning."""
    package = Path(__file__).parents[2] / "redraft"
    sources = [path.read_text(encoding="utf-8") for kind in ("*.py", "*.cpp", "*.h") for path in package.rglob(kind)]
    read = {name for text in sources for name in re.findall(r'(?:environ(?:\.get\(|\[)|getenv\()\s*"(REDRAFT_\w+)"', text)}
    assert read == OTHERS
    assert not OTHERS & set(VARIABLES)


def test_a_template_is_shown_as_it_was_given(redraft: Serve, ran: Configs, tmp_path: Path) -> None:
    path = tmp_path / "chat.jinja"
    path.write_text("{{ messages }}\n")
    _, _, err = redraft("serve", "--chat-template", str(path))
    assert shown(err, "chat-template") == (str(path), "command line")
    assert ran[0][1].chat_template == "{{ messages }}\n"
    _, _, err = redraft("serve", "--chat-template", "{{ messages }}\n")
    assert shown(err, "chat-template") == ("(15 characters)", "command line")


@pytest.mark.parametrize("columns", [80, 100])
def test_the_help_fits_the_terminal(columns: int) -> None:
    environment = {**os.environ, "COLUMNS": str(columns), "TERMINAL_WIDTH": str(columns), "TERM": "dumb"}
    command = [sys.executable, "-m", "redraft", "serve", "--help"]
    printed = subprocess.run(command, capture_output=True, encoding="utf-8", env=environment, check=True).stdout
    assert "--step-timeout" in printed and "--max-body" in printed
    assert [line for line in printed.splitlines() if len(line) > columns or "…" in line] == []
