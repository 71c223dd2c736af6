from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from redraft.config import EngineConfig
from redraft.errors import InvalidInput
from redraft.serve.config import ServeConfig


def test_defaults_serve_this_machine_only() -> None:
    config = ServeConfig()
    assert (config.host, config.port, config.api_key, config.allow_origins) == ("127.0.0.1", 8000, (), ())
    assert (config.max_queue, config.request_timeout, config.idle_timeout, config.keep_alive) == (256, 600, 60, 10)
    assert (config.shutdown_timeout, config.max_body, config.max_n, config.max_logprobs, config.max_stop) == (30, 4 << 20, 16, 20, 16)
    assert (config.metrics_prefix, config.log_level, config.response_role) == ("redraft:", "info", "assistant")


def test_every_field_says_what_it_is_and_none_is_the_engine_s() -> None:
    assert [name for name, field in ServeConfig.model_fields.items() if not field.description] == []
    assert set(ServeConfig.model_fields) & set(EngineConfig._homes()) == set()


def test_every_number_has_limits() -> None:
    for name, field in ServeConfig.model_fields.items():
        if field.annotation in (int, float):
            for far in (-1, 1e18, float("nan")):
                with pytest.raises(InvalidInput, match=rf"^ServeConfig\.{name} = "):
                    ServeConfig(**{name: far if field.annotation is float or far != far else int(far)})


@pytest.mark.parametrize(
    ("values", "expected"),
    [
        ({"host": ""}, "ServeConfig.host = ''"),
        ({"keep_alive": 0}, "more than 0"),
        ({"root_path": "llm/"}, "ServeConfig.root_path = 'llm/'"),
        ({"metrics_prefix": "a-b"}, "ServeConfig.metrics_prefix = 'a-b'"),
        ({"log_level": "loud"}, "'critical'"),
        ({"allow_origins": ("http://a/b",)}, "'http://a/b' is neither"),
        ({"allow_origins": "http://a,http://b/"}, "is neither"),
        ({"served_model_name": ("a", " ")}, "empty string"),
        ({"prot": 1}, "did you mean 'port'"),
        ({"keep": "streaming-lm"}, "no keep method 'streaming-lm': did you mean 'streaming-llm'?"),
        ({"codec": "int8:x=1"}, "unknown option 'x' of int8"),
        ({"read": "page-top-k:pages"}, "is not option=value"),
        ({"depth": ""}, "no depth method ''"),
        ({"instances": ""}, "ServeConfig.instances = '': prefill=N,decode=M is allowed"),
        ({"router": "splitwise"}, "router = 'splitwise' splits requests: it needs instances"),
        ({"instances": "prefill=1,decode=0"}, "with numbers from 1 to 999"),
        ({"tool_call_parser": "hermez"}, "ServeConfig.tool_call_parser = 'hermez': deepseek, "),
        ({"reasoning_parser": "hermes"}, "gpt-oss, magistral, think, none are allowed"),
        ({"ssl_keyfile": "/none/key.pem"}, "ServeConfig.ssl_keyfile = '/none/key.pem': no such file"),
        ({"ssl_certfile": "/"}, "ServeConfig.ssl_certfile = '/': is a directory"),
        ({"ssl_keyfile": __file__}, "together or not at all"),
        ({"uds": "/none/socket"}, "the folder does not exist"),
        ({"uds": "/tmp/" + "s" * 103}, "at most 107 bytes"),
        ({"chat_template": "/none.jinja"}, "neither a template nor a file that can be read: No such file"),
        ({"chat_template": __file__ + "c"}, "neither a template"),
        ({"chat_template": "{% if %}"}, "the template does not parse, line 1: "),
        ({"chat_template": "{{ messages | nothing }}"}, "the template does not parse, line 1: No filter"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, dict) else "",
)
def test_what_is_wrong_is_reported_in_one_line(values: dict[str, Any], expected: str) -> None:
    with pytest.raises(InvalidInput) as error:
        ServeConfig(**values)
    assert expected in str(error.value)
    assert "\n" not in str(error.value)


def test_what_is_right_is_taken(tmp_path: Path) -> None:
    keys = {"ssl_keyfile": Path(__file__), "ssl_certfile": Path(__file__)}
    origins = ("*", "https://a.example:8443", "chrome-extension://abc")
    config = ServeConfig(**keys, allow_origins=origins, root_path="/a/b", metrics_prefix="", uds=tmp_path / "s", port=0, request_timeout=0)
    assert config.but(keep="streaming-llm:sinks=2,recent=64", codec="none").keep == "streaming-llm:sinks=2,recent=64"
    assert config.but(codec="none").codec is None
    assert config.but(api_key="one").api_key == ("one",)


@pytest.mark.parametrize("key", ["", "two words", "schlüssel", "line\n", 5])
def test_a_key_is_never_reported(key: Any) -> None:
    with pytest.raises(InvalidInput) as error:
        ServeConfig(api_key=("hidden-1", key))
    assert "ServeConfig.api_key" in str(error.value)
    assert "= (hidden): " in str(error.value)
    assert "hidden-1" not in str(error.value)
    config = ServeConfig(api_key=("secret-1", "secret-2"))
    assert "secret" not in f"{config!r} {config} {config.model_dump()} {config.model_dump_json()}"
    assert config.but(port=1).api_key == ("secret-1", "secret-2")


def test_a_template_is_a_file_or_itself(tmp_path: Path) -> None:
    text = "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% break %}{% endfor %}"
    path = tmp_path / "chat.jinja"
    path.write_text(text + "ä", encoding="utf-8")
    assert ServeConfig(chat_template=text).chat_template == text
    config = ServeConfig(chat_template=str(path))
    path.unlink()
    assert config.but(port=1).chat_template == text + "ä"
    path.write_text("no marks")
    with pytest.raises(InvalidInput, match="the file is not a template"):
        ServeConfig(chat_template=str(path))
    path.write_bytes(b"{{ \xff }}")
    with pytest.raises(InvalidInput, match="it is not UTF-8"):
        ServeConfig(chat_template=str(path))
