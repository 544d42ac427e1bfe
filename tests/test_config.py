"""Settings: the paper's defaults, a clear precedence, one line on what is amiss, and no key on any screen."""

import dataclasses
import os
import sys

import pytest
from pydantic import ValidationError

from augcon.errors import UserError
from config import PREFIX, Settings, load_settings, pick

STAGES = ("step 1", "scorer", "step 2", "step 3", "finetune")
PAPER = {
    "max_length": 500,
    "min_length": 20,
    "quota_unit": 35,
    "rouge_threshold": 0.7,
    "query_temperature": 0.85,
    "query_max_tokens": 1024,
    "tries": 4,
    "oversample": 1.15,
    "negatives": 500,
    "model": "Qwen/Qwen1.5-32B-Chat",
    "corpus": "DailyM",
    "text_field": "article",
    "results": "results",
}


@pytest.fixture
def load(monkeypatch):
    """Settings from a command line and an environment."""
    for name in [name for name in os.environ if name.upper().startswith(PREFIX)]:
        monkeypatch.delenv(name)

    def load(*flags: str, groups: tuple[str, ...] = (), **environment: str) -> Settings:
        monkeypatch.setattr(sys, "argv", ["step1_gen_q.py", *flags])
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        return load_settings("What this script does.", *groups)

    return load


@pytest.fixture
def refused(load):
    """The one line that a user is told."""

    def refused(*flags: str, **environment: str) -> str:
        with pytest.raises(UserError) as error:
            load(*flags, **environment)
        assert "\n" not in str(error.value)
        return str(error.value)

    return refused


def test_defaults_are_the_papers(load):
    settings = load()
    assert {name: getattr(settings, name) for name in PAPER} == PAPER


def test_a_flag_outranks_the_environment_and_that_the_file(load):
    assert load().min_length == 20
    assert load(AUGCON_MIN_LENGTH="30").min_length == 30
    assert load("--min-length", "40", AUGCON_MIN_LENGTH="30").min_length == 40
    assert load("--min-length=20", AUGCON_MIN_LENGTH="30").min_length == 20


def test_switches_are_flags_and_environment(load):
    assert load("--completions").completions
    assert load(AUGCON_COMPLETIONS="1").completions
    assert not load("--no-completions", AUGCON_COMPLETIONS="1").completions


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["--nope", "3"], ["--nope"]),
        (["--nope=3"], ["--nope"]),
        (["--min_length", "3"], ["--min_length"]),
        (["--min", "3"], ["--min"]),
        (["stray"], ["stray"]),
        (["--min-length"], ["--min-length", "expected one argument"]),
        (["--min-length", "x"], ["--min-length", "'x'", "integer"]),
        (["--min-length", ""], ["--min-length", "''"]),
        (["--min-length", "0"], ["--min-length", "'0'"]),
        (["--min-length", "2.5"], ["--min-length", "'2.5'"]),
        (["--max-length", "19"], ["--max-length", "'19'"]),
        (["--min-length", "600"], ["--min-length 600", "--max-length 500"]),
        (["--rouge-threshold", "0"], ["--rouge-threshold", "'0'"]),
        (["--rouge-threshold", "1.1"], ["--rouge-threshold", "'1.1'"]),
        (["--rouge-threshold", "nan"], ["--rouge-threshold", "'nan'"]),
        (["--oversample", "0.9"], ["--oversample", "'0.9'"]),
        (["--oversample", "inf"], ["--oversample", "'inf'"]),
        (["--request-timeout", "inf"], ["--request-timeout", "'inf'"]),
        (["--query-temperature", "-1"], ["--query-temperature", "'-1'"]),
        (["--seed", "2147483648"], ["--seed", "'2147483648'"]),
        (["--language", "fr"], ["--language", "'fr'", "'zh'"]),
        (["--api-base", "localhost:8000"], ["--api-base", "'localhost:8000'"]),
        (["--corpus", " "], ["--corpus", "' '"]),
        (["--results", ""], ["--results", "''"]),
        (["--completions=maybe"], ["--completions", "'maybe'"]),
        (["--min-length", "x", "--seed", "y"], ["--min-length", "'x'", "--seed", "'y'"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_an_impossible_command_line_is_told_by_setting_and_value(refused, flags, said):
    message = refused(*flags)
    assert all(part in message for part in said), message


def test_an_impossible_environment_is_told_by_setting_and_value(refused):
    message = refused(AUGCON_MIN_LENGTH="x")
    assert "--min-length" in message and "'x'" in message


def test_an_unknown_variable_is_told_by_name_without_its_value(refused):
    message = refused(AUGCON_APIKEY="sk-secret")
    assert "AUGCON_APIKEY" in message and "sk-secret" not in message


def test_lengths_may_be_equal(load):
    assert load("--min-length", "500").min_length == 500


# The key


def test_the_key_is_had_but_never_shown(load):
    settings = load("--api-key", "sk-secret")
    assert settings.api_key.get_secret_value() == "sk-secret"
    assert "sk-secret" not in f"{settings.describe()} {settings!r} {settings.model_dump_json()}"
    assert all("api_key" not in settings.inputs(stage) for stage in STAGES)


@pytest.mark.parametrize(
    "flags",
    [
        ["--api_key", "sk-secret"],
        ["--api-kye=sk-secret"],
        ["--key", "sk-secret", "--nope"],
        ["--api-key", "sk-secret", "--min-length", "x"],
        ["--api-key", "sk-secret", "--min-length", "600"],
        ["--api-key", "sk-secret", "--seed"],
    ],
    ids=" ".join,
)
def test_no_error_shows_the_key(refused, flags):
    assert "sk-secret" not in refused(*flags, AUGCON_API_KEY="sk-secret")


@pytest.mark.parametrize("key", ["", " ", "sk-secret\nx", "sk-secret x", "sk-secret\x7f", "sk-secret密"])
def test_a_key_that_no_header_takes_is_refused_and_not_shown(refused, key):
    message = refused(AUGCON_API_KEY=key)
    assert message.startswith("--api-key: ") and "secret" not in message


@pytest.mark.parametrize(
    "address",
    ["//h:99999/v1", "//h:abc/v1", "//h:0", "//[::1/v1", "//me:sk-secret@h/v1", "//a..b/v1", "//-/v1", f"//{'h' * 99}"],
)
def test_an_address_where_no_server_can_be_is_refused(refused, address):
    message = refused("--api-base", f"http://localhost/v1,http:{address}")
    assert message.startswith("--api-base: ") and "secret" not in message


def test_an_address_may_have_a_port_or_be_of_ipv6(load):
    for address in ("http://127.0.0.1:8000/v1", "https://[::1]:80/v1", "http://model_server", "https://模型.cn/v1"):
        assert load("--api-base", address).api_base == address


def test_an_unclosed_quote_and_an_unknown_user_are_said(refused):
    assert "quot" in refused("--serve-arguments", "--name 'x")
    for flag in ("--qa-examples", "--corpus", "--results", "--output", "--data"):
        assert "~nouser" in refused(flag, "~nouser/x")


# What is shown


def test_help_names_every_setting_with_its_reason_and_default(load, capsys):
    with pytest.raises(SystemExit) as exit:
        load("--help", AUGCON_API_KEY="sk-secret")
    shown = " ".join(capsys.readouterr().out.split())
    assert exit.value.code == 0
    assert "What this script does." in shown and "sk-secret" not in shown
    for name, field in Settings.model_fields.items():
        assert f"--{name.replace('_', '-')}" in shown
        assert len(field.description) > 15 and " ".join(field.description.split()) in shown
        assert name == "api_key" or f"(default: {field.default})" in shown


def test_describe_names_the_settings_that_were_changed_and_no_others(load):
    assert load().describe() == "settings: all as in --help"
    shown = load("--min-length", "30", "--max-length", "500").describe()
    assert shown == "settings: min_length=30, the others as in --help"
    assert max(map(len, load("--corpus", "x" * 80, "--model", "y" * 80).describe().splitlines())) <= 110


def test_help_shows_the_groups_of_the_script_and_those_of_every_script_last(load, capsys):
    with pytest.raises(SystemExit):
        load("--help", groups=("step 2",))
    shown = capsys.readouterr().out
    assert (
        shown.index("step 2:") < shown.index("--scorer-epochs") < shown.index("every script:") < shown.index("--seed")
    )
    assert "--min-length" not in shown and "step 1" in shown.partition("every script:")[2]  # named, not shown
    assert load("--min-length", "30", groups=("step 2",)).min_length == 30


def test_each_stage_knows_the_settings_that_shape_it(load):
    settings = load("--seed", "7")
    assert settings.inputs("step 1")["seed"] == 7
    assert settings.inputs("step 2") == {"sweep_threshold": 0.9, "refill_threshold": 0.05, "max_refills": 1}
    assert "epochs" in settings.inputs("finetune") and "scorer_epochs" in settings.inputs("scorer")
    shaping = [name for stage in STAGES for name in settings.inputs(stage)]
    assert len(shaping) == len(set(shaping))
    assert not {"results", "corpus", "api_base", "api_key", "max_in_flight", "server_wait", "redo"} & set(shaping)


@dataclasses.dataclass
class Learning:
    epochs: int
    max_tokens: int
    seed: int


def test_a_part_picks_the_settings_named_like_its_fields(load):
    settings = load("--scorer-epochs", "7", "--max-tokens", "99")
    assert pick(Learning, settings) == Learning(4, 99, 42)
    assert pick(Learning, settings, "scorer_") == Learning(7, 2048, 42)


def test_settings_do_not_change_under_way(load):
    with pytest.raises(ValidationError):
        load().seed = 3
