"""Popular servers and services, as fakes: what they refuse is found out, left out and remembered; thinking is ended."""

import asyncio
import dataclasses
import itertools
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import datasets
import pytest
from conftest import ROOT, Engine, run, says_one_line
from endpoints import SERVICES, THINKING, Body, Endpoint, Service, openai_error, template
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import step1_gen_q
from augcon.data import Request
from augcon.errors import UserError
from augcon.llm import client
from augcon.llm.client import LLM
from augcon.llm.dialect import ROOM, Dialect, look
from augcon.llm.store import Store
from augcon.run.results import Results
from config import Settings

# Of each service: the probes that find out its dialect, what is refused among them, and what is said.
FOUND: dict[str, tuple[int, int, str]] = {
    "plain": (1, 0, ""),
    "vLLM": (1, 0, ""),
    "vLLM, Qwen3": (2, 0, "thinking is turned off (chat_template_kwargs)"),
    "vLLM, R1": (
        13,
        0,
        "the model thinks before it replies, which costs time and money (reasoning_effort minimal may ",
    ),
    "SGLang, Qwen3": (2, 0, "thinking is turned off (chat_template_kwargs)"),
    "llama.cpp": (1, 0, ""),
    "llama.cpp, Qwen3": (2, 0, "thinking is turned off (chat_template_kwargs)"),
    "Ollama": (1, 0, ""),
    "Ollama, qwen3": (6, 0, "thinking is turned off (reasoning_effort)"),
    "OpenAI": (1, 0, ""),
    "OpenAI, gpt-5": (
        11,
        9,
        "it refuses stop, top_p, temperature; max_tokens is max_completion_tokens here; the model thinks before it "
        "replies, which costs time and money (reasoning_effort minimal may keep that short), and may write 8,192",
    ),
    "OpenAI, o3": (12, 11, "(reasoning_effort low may keep that short), and may write 8,192 tokens more for each"),
    "DeepSeek": (1, 0, ""),
    "DeepSeek, thinking": (5, 0, "thinking is turned off (thinking)"),
    "DeepSeek, reasoner": (7, 1, "max_tokens is not sent here; the model thinks before it replies"),
    "DashScope, Qwen3": (2, 1, "thinking is turned off (enable_thinking)"),
    "Gemini": (7, 5, "it refuses seed; thinking is turned off (reasoning_effort)"),
    "OpenRouter": (5, 1, "it refuses seed; thinking is turned off (reasoning)"),
    "TGI": (2, 1, "it refuses top_p"),
    "Mistral": (2, 1, "it refuses seed"),
}


@pytest.fixture(scope="module")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two short texts, one in each language."""
    path = tmp_path_factory.mktemp("corpus") / "two.jsonl"
    texts = [(ROOT / name).read_text().splitlines()[1] for name in ("qa_examples.jsonl", "qa_examples_en.jsonl")]
    path.write_text("".join(json.dumps({"article": json.loads(text)["context"]}) + "\n" for text in texts))
    return path


@pytest.fixture
def store(tmp_path: Path) -> Iterator[Store]:
    with Store(tmp_path / "replies.sqlite") as store:
        yield store


async def step_1(corpus: Path, results: Path, api_base: str, **changes: Any) -> dict[str, list[list[str]]]:
    """Step 1 in this process: the queries."""
    given = {"corpus": str(corpus), "results": str(results), "api_base": api_base, "negatives": 2, "max_passes": 2}
    made, chosen = Results(results), Settings(**{**given, "api_model": "model", **changes})
    with made.held(), Store(made.store) as store:
        await step1_gen_q.make_queries(chosen, made, store)
    return json.loads(made.queries.read_text())


def figures(results: Path) -> dict[str, Any]:
    (asked,) = json.loads((results / "figures.json").read_text())["step 1"]["asked"]
    return asked


@pytest.fixture(scope="module")
def expected(engine: Engine, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[bool, Any]:
    """The queries of the demonstration engine, and those where the seed makes no difference."""

    async def seedless() -> Any:
        async with Endpoint(SERVICES["plain, no seed"]) as plain:
            return await step_1(corpus, tmp_path_factory.mktemp("seedless") / "results", plain.url)

    results = tmp_path_factory.mktemp("engine") / "results"
    seeded = asyncio.run(step_1(corpus, results, engine.api, api_model=""))
    return {True: seeded, False: asyncio.run(seedless())}


def said(printed: str) -> str:
    """The line about what is unusual in a server."""
    lines = [line for line in printed.splitlines() if line.startswith("server:  ") and " serves " not in line]
    return "\n".join(lines).removeprefix("server:  ")


@pytest.mark.parametrize("name", FOUND)
def test_step_1_works_at_a_service_as_it_does_anywhere_and_asks_it_nothing_twice(
    name: str, corpus: Path, tmp_path: Path, expected: dict[bool, Any], capsys: pytest.CaptureFixture[str]
):
    service, (probes, refused, words) = SERVICES[name], FOUND[name]

    async def main() -> None:
        async with Endpoint(service) as server:
            queries = await step_1(corpus, tmp_path / "r", server.url)
            assert queries == expected[service.sampled] and sum(map(len, queries.values())) > 5
            assert (len(server.probes), len(server.refused)) == (probes, refused)
            assert server.cut_off == 0 and figures(tmp_path / "r")["calls"] == len(server.asked)
            assert all(body in server.probes for body in server.refused)
            first = capsys.readouterr().out
            assert words in said(first) and bool(words) == bool(said(first))
            before = len(server.bodies)
            assert await step_1(corpus, tmp_path / "r", server.url) == queries
            assert len(server.bodies) == before and said(capsys.readouterr().out) == said(first)

    asyncio.run(asyncio.wait_for(main(), 60))


@pytest.mark.parametrize("name", ["OpenAI, gpt-5", "DashScope, Qwen3", "TGI"])
def test_steps_1_and_3_work_through_the_front_door(name: str, by_engine: list[Any], corpus: Path, tmp_path: Path):
    async def main() -> None:
        async with Endpoint(SERVICES[name]) as server:
            assert await asyncio.to_thread(front_door, server.url, corpus, tmp_path / "r") == by_engine
            assert server.cut_off == 0 and all(body in server.probes for body in server.refused)
            before = len(server.bodies)
            assert await asyncio.to_thread(front_door, server.url, corpus, tmp_path / "r") == by_engine
            assert len(server.bodies) == before

    asyncio.run(main())
    assert by_engine[1]


@pytest.fixture(scope="module")
def by_engine(engine: Engine, corpus: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Any]:
    return front_door(engine.api, corpus, tmp_path_factory.mktemp("by engine") / "r", "")


def front_door(api_base: str, corpus: Path, results: Path, model: str = "model") -> list[Any]:
    """Steps 1 and 3 as processes, where all queries are kept: the queries and the pairs."""
    flags = ["--api-base", api_base, "--api-model", model, "--results", results]
    step_1 = run("step1_gen_q.py", *flags, "--corpus", corpus, "--negatives", 0, "--max-passes", 2)
    assert step_1.returncode == 0, step_1.stderr
    (results / "filtered_queries.json").write_text((results / "queries.json").read_text())
    step_3 = run("step3_gen_a.py", *flags, "--candidates", 2, "--qa-examples", ROOT / "qa_examples_en.jsonl")
    assert step_3.returncode == 0, step_3.stderr
    assert bool(said(step_1.stdout)) == bool(said(step_3.stdout)) == bool(model)
    return [
        json.loads((results / "queries.json").read_text()),
        datasets.load_from_disk(results / "sft_data").to_list(),
    ]


# What is sent


async def ask(store: Store, server: Endpoint, *prompts: str, pattern: str | None = None, **changes: Any) -> LLM:
    """Asks for some replies, and returns the client."""
    async with LLM(client.Endpoint(server.url, **{"structured_output": False, **changes}), store) as llm:
        await llm.connect("model")
        for prompt in prompts:
            messages = [{"role": "user", "content": prompt}]
            await llm.ask(Request(messages, 0.2, 1000, end=tuple("abcd"), text_end=("e",), pattern=pattern))
        return llm


def sent_to(name: str | Service, store: Store, *prompts: str, **how: Any) -> tuple[list[Body], LLM, Endpoint]:
    """The bodies that a service got, without the probes."""

    async def main() -> tuple[list[Body], LLM, Endpoint]:
        async with Endpoint(SERVICES[name] if isinstance(name, str) else name) as server:
            llm = await ask(store, server, *(prompts or ("x",)), **how)
            return server.asked, llm, server

    return asyncio.run(asyncio.wait_for(main(), 20))


def test_a_body_is_that_of_before_where_nothing_is_unusual(store: Store):
    (body,), llm, server = sent_to("vLLM", store)
    assert body == {
        **{"model": "model", "messages": [{"role": "user", "content": "x"}], "temperature": 0.2, "max_tokens": 1000},
        **{"seed": 0, "top_p": 1, "top_k": -1, "min_p": 0, "repetition_penalty": 1, "stop": list("abcd")},
    }
    assert llm.dialect == Dialect() and len(server.probes) == 1 and llm.counts["calls"] == 1
    assert server.probes[0].keys() == body.keys()


def test_thinking_that_stays_has_room_in_every_limit(store: Store):
    (body,), llm, _ = sent_to("vLLM, R1", store)
    assert body["max_tokens"] == 1000 + ROOM and llm.dialect.room == ROOM > THINKING
    (body,), *_ = sent_to("OpenAI, gpt-5", store)
    assert body["max_completion_tokens"] == 1000 + ROOM and body["reasoning_effort"] == "minimal"
    assert not {"max_tokens", "temperature", "top_p", "stop"} & body.keys() and "seed" in body


def test_the_record_says_what_is_the_same_in_every_request(store: Store):
    _, llm, _ = sent_to("OpenRouter", store, extra_body='{"provider": {"sort": "price"}}')
    assert llm.sampling == {
        **{"top_p": 1, "provider": {"sort": "price"}, "reasoning": {"enabled": False}},
        "seed": None,
    }
    assert json.dumps(llm.sampling) and sent_to("plain", store)[1].sampling == {"top_p": 1}


def test_stop_strings_beyond_the_most_are_left_out(store: Store):
    (body,), llm, _ = sent_to("OpenAI", store, completions=True)
    assert body["stop"] == list("abcd") and "it takes 4 stop strings at most" in llm.dialect.describe()
    (body,), *_ = sent_to("plain", store, completions=True)
    assert body["stop"] == list("abcde")


def test_structured_output_is_left_out_where_it_is_refused(store: Store):
    (body,), llm, server = sent_to("OpenAI", store, pattern="a+", structured_output=True)
    assert "structured_outputs" not in body and llm.dialect.describe() == "it refuses structured_outputs"
    assert len(server.probes) == 2
    (body,), *_ = sent_to("vLLM", store, pattern="a+", structured_output=True)
    assert body["structured_outputs"] == {"regex": "a+"}


def test_further_parameters_go_into_every_request_and_are_never_left_out(store: Store):
    bodies, _, server = sent_to("plain", store, "x", "y", extra_body='{"provider": {"order": ["a"]}, "top_p": 0.9}')
    assert all(body["provider"] == {"order": ["a"]} and body["top_p"] == 0.9 for body in server.bodies)
    assert len(bodies) == 2
    with pytest.raises(UserError, match="'top_p' is not supported"):
        sent_to("OpenAI, gpt-5", store, extra_body='{"top_p": 0.9}')


def test_who_sets_the_thinking_has_it_that_way_and_room_for_it(store: Store):
    wanted = {"chat_template_kwargs": {"enable_thinking": True}}
    (body,), llm, server = sent_to("vLLM, Qwen3", store, extra_body=json.dumps(wanted))
    assert body["chat_template_kwargs"] == wanted["chat_template_kwargs"] and body["max_tokens"] == 1000 + ROOM
    assert not llm.dialect.switch and len(server.probes) == 2


@pytest.mark.parametrize(
    ("flag", "parts"),
    [
        ("{", ["--extra-body", "must be a JSON object", "'{'"]),
        ("[1]", ["--extra-body", "must be a JSON object", "'[1]'"]),
        ('{"stream": true, "n": 2}', ["--extra-body", "cannot set n, stream"]),
    ],
)
def test_further_parameters_that_are_none_are_refused_in_one_line(tmp_path: Path, flag: str, parts: list[str]):
    done = run("step1_gen_q.py", "--results", tmp_path / "r", "--extra-body", flag)
    assert says_one_line(done, *parts)


def test_other_further_parameters_make_other_results(corpus: Path, tmp_path: Path):
    async def main() -> None:
        async with Endpoint(SERVICES["plain"]) as server:
            await step_1(corpus, tmp_path / "r", server.url, extra_body='{"top_k": 5}')
            made = json.loads((tmp_path / "r" / "run.json").read_text())["step 1"]["made_with"]
            assert made["sampling"] == {"top_p": 1, "top_k": 5} and made["extra_body"] == '{"top_k": 5}'
            with pytest.raises(UserError, match="extra_body was"):
                await step_1(corpus, tmp_path / "r", server.url)

    asyncio.run(main())


def test_where_there_is_no_seed_another_sample_is_asked_for_all_the_same(store: Store):
    async def main() -> None:
        async with Endpoint(SERVICES["Mistral"]) as server, LLM(client.Endpoint(server.url), store) as llm:
            await llm.connect("model")
            for sample in (0, 1, 0):
                await llm.ask(Request([{"role": "user", "content": "x"}], 0.2, 1000, sample))
            assert len(server.asked) == 2 and llm.counts["replayed"] == 1

    asyncio.run(main())


# Several servers


def test_what_one_of_several_servers_refuses_is_left_out_for_all(store: Store):
    async def main() -> None:
        names = ("plain", "TGI", "Mistral", "TGI")
        servers = [Endpoint(SERVICES[name] if name != "Mistral" else mistral) for name in names]
        async with servers[0], servers[1], servers[2], servers[3]:
            addresses = ",".join(server.url for server in servers)
            async with LLM(client.Endpoint(addresses, structured_output=False), store) as llm:
                await llm.connect("model")
                for number in range(20):
                    await llm.ask(Request([{"role": "user", "content": f"{number}"}], 0.2, 10, root=number))
        assert set(llm.dialect.left_out) == {"seed", "top_p"}
        asked = [body for server in servers for body in server.asked]
        assert len(asked) == 20 and not any({"seed", "top_p"} & body.keys() for body in asked)
        assert sum(len(server.refused) for server in servers) == 2  # each once, at whichever server came first
        assert all(len(server.probes) <= 4 for server in servers)

    mistral = dataclasses.replace(SERVICES["Mistral"], models=("model",))
    asyncio.run(asyncio.wait_for(main(), 20))


def test_a_switch_that_one_of_several_servers_refuses_gives_way_to_room(store: Store):
    def strict(body: Body) -> Any:
        return (
            openai_error("Unknown field: chat_template_kwargs", None, None) if "chat_template_kwargs" in body else None
        )

    async def main() -> None:
        one, two = Endpoint(SERVICES["vLLM, Qwen3"]), Endpoint(Service(refuses=strict, thinks=template))
        async with one, two, LLM(client.Endpoint(f"{one.url},{two.url}"), store) as llm:
            await llm.connect("model")
            assert llm.dialect.room == ROOM and not llm.dialect.switch

    asyncio.run(asyncio.wait_for(main(), 20))


def test_where_thinking_stays_the_other_servers_are_not_asked_about_it_again(store: Store):
    async def main() -> None:
        one, two = Endpoint(SERVICES["vLLM, R1"]), Endpoint(SERVICES["vLLM, R1"])
        async with one, two, LLM(client.Endpoint(f"{one.url},{two.url}", structured_output=False), store) as llm:
            await llm.connect("model")
            assert (len(one.probes), len(two.probes)) == (FOUND["vLLM, R1"][0], 2) and llm.dialect.room == ROOM

    asyncio.run(asyncio.wait_for(main(), 20))


def test_where_room_for_thinking_is_more_than_the_window_there_is_no_limit(store: Store):
    def small(body: Body) -> Any:
        too_long = "This model's maximum context length is 8000 tokens; max_tokens is too large."
        return openai_error(too_long, None, None) if body.get("max_tokens", 0) > 8000 else None

    (body,), llm, server = sent_to(dataclasses.replace(SERVICES["vLLM, R1"], refuses=small), store)
    assert "max_tokens" not in body and "max_tokens is not sent here" in llm.dialect.describe()
    assert len(server.refused) == 1


# What no probe can help


@pytest.mark.parametrize("name", ["OpenAI, gpt-5", "DashScope, Qwen3", "TGI"])
def test_a_wrong_key_and_an_unknown_model_are_one_line(name: str, tmp_path: Path, corpus: Path):
    async def main() -> None:
        async with Endpoint(SERVICES[name], key="right") as server:
            flags = ["--api-base", server.url, "--corpus", corpus, "--results", tmp_path / "r"]
            for key, model, parts in (
                ("wrong", "model", ["refuses the key", "AUGCON_API_KEY"]),
                ("right", "typo", ["'typo'", "--api-model"]),
            ):
                how = ["--api-key", key, "--api-model", model]
                done = await asyncio.to_thread(run, "step1_gen_q.py", *flags, *how)
                assert says_one_line(done, *parts), done.stderr

    asyncio.run(main())


def test_a_service_that_refuses_all_is_one_line(store: Store):
    for message in ("no", "The account is suspended", "Unknown field: messages"):
        service = Service(refuses=lambda body: openai_error(message, None, None))  # noqa: B023
        with pytest.raises(UserError, match=f"refuses all requests .*400.: {message}") as caught:
            sent_to(service, store)
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="refuses even a short request: maximum context length"):
        sent_to(Service(refuses=lambda body: openai_error("maximum context length is 8", None, None)), store)
    with pytest.raises(UserError, match="Insufficient Balance"):
        sent_to(Service(refuses=lambda body: (402, {"error": {"message": "Insufficient Balance"}})), store)


def test_nothing_is_remembered_of_a_server_that_was_never_in_order(store: Store):
    tries = itertools.count()

    def unwell(body: Body) -> Any:
        return (503, {"error": {"message": "loading"}}) if next(tries) < 2 else SERVICES["TGI"].refuses(body)

    bodies, llm, server = sent_to(Service(refuses=unwell), store)
    assert llm.dialect.left_out == ("top_p",) and len(server.probes) >= 3 and "top_p" not in bodies[-1]


# Whatever is refused

PARAMETERS = ("temperature", "max_tokens", "max_completion_tokens", "seed", "top_p", "stop", "top_k", "min_p")
WAYS: list[Callable[[str], Any]] = [
    lambda name: openai_error(f"Unsupported parameter: '{name}'", name, "unsupported_parameter"),
    lambda name: openai_error(f"Unrecognized request argument supplied: {name}", None, None),
    lambda name: (422, {"detail": [{"type": "extra_forbidden", "loc": ["body", name], "msg": "no", "input": "stop"}]}),
    lambda name: (400, {"object": "error", "message": f"[{{'loc': ('body', '{name}'), 'msg': 'no'}}]", "code": 400}),
    lambda name: (422, {"error": f"Input validation error: `{name}` must be otherwise", "error_type": "validation"}),
    lambda name: (400, {"error": f"参数{name}无效"}),
]


@given(
    refused=st.sets(st.sampled_from(PARAMETERS)),
    way=st.sampled_from(WAYS),
    most=st.integers(0, 5),
    owner=st.sampled_from(["vllm", "other"]),
    completions=st.booleans(),
    strict=st.booleans(),
)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_whatever_a_server_refuses_is_found_out_with_few_probes(
    refused: set[str], way: Callable[[str], Any], most: int, owner: str, completions: bool, strict: bool
):
    def refuse(body: Body) -> Any:
        if wrong := sorted(refused & body.keys()):
            return way(wrong[0])
        unknown = body.keys() & {"chat_template_kwargs", "enable_thinking", "reasoning", "thinking", "reasoning_effort"}
        if strict and unknown:
            return way(min(unknown))
        if len(body.get("stop", ())) > most:
            return openai_error(f"at most {most} of stop" if most else "stop is not supported", "stop", None)
        return None

    with Store(Path(":memory:")) as store:
        bodies, llm, server = sent_to(
            Service(refuses=refuse, owner=owner, thinks=template if strict else lambda body: False),
            store,
            completions=completions,
        )
    assert len(bodies) == 1 and not refused & bodies[0].keys() and len(server.probes) <= 2 * len(PARAMETERS) + 4
    assert all(body in server.probes for body in server.refused)
    gone = refused & (server.probes[0].keys() - {"max_tokens"})
    assert gone - {"stop"} <= set(llm.dialect.left_out) <= gone | {"stop"}
    assert len(bodies[0].get("stop", ())) <= most
    assert bool(llm.dialect.describe()) == (llm.dialect != Dialect())


@pytest.mark.parametrize(
    ("message", "thinks"),
    [
        ({"content": "391"}, False),
        ({"content": "<think>\n\n</think>\n\n391"}, False),
        ({"content": "391", "reasoning_content": ""}, False),
        ({"content": "391", "reasoning_content": "Hmm."}, True),
        ({"content": "", "reasoning": "Hmm."}, True),
        ({"content": "<think>Hmm."}, True),
        ({"content": "Hmm.</think>391"}, True),
        ({"content": "\n<thinking>Hmm.</thinking>"}, True),
    ],
)
def test_thinking_is_seen_wherever_it_stands(message: dict[str, Any], thinks: bool):
    assert look(json.dumps({"choices": [{"message": message, "finish_reason": "stop"}]})).thinks == thinks


@pytest.mark.parametrize(("finish", "thinks"), [("length", True), ("stop", False)])
def test_a_reply_without_a_word_that_is_cut_off_shows_thinking(finish: str, thinks: bool):
    assert look(json.dumps({"choices": [{"message": {"content": None}, "finish_reason": finish}]})).thinks == thinks


def test_a_dialect_is_read_as_it_was_written():
    for dialect in (Dialect(), Dialect(("seed", "stop"), "", 4, {"thinking": {"type": "disabled"}}, ROOM)):
        assert Dialect.read(dialect.write()) == dialect
