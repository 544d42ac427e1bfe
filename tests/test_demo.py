"""The demonstration engine: OpenAI's API over rules, honest about being no language model."""

import json
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest
from datasets import load_from_disk
from hypothesis import given, settings
from hypothesis import strategies as st

from augcon.data import Example, Query
from augcon.demo.engine import MODEL, cut
from augcon.demo.rules import halve, recognise, reply_to
from augcon.method.diversity import DiverseQueries, rouge_l_precision
from augcon.method.pairs import NEGATIVES
from augcon.text.checks import parse_answer
from augcon.text.parse import parse_split
from augcon.text.prompts import Prompts, as_text, load_prompts
from augcon.text.units import language, length, words

ROOT = Path(__file__).parents[1]
ZH, EN = load_prompts("zh"), load_prompts("en")
CONTEXT = ZH.cst.examples[0].context
MENTIONS = re.compile(r"文本中|本文|文中|上文|上述内容|the text|the passage|the context", re.IGNORECASE)
QA = {
    name: [json.loads(line) for line in (ROOT / file).read_text(encoding="utf-8").splitlines()]
    for name, file in (("zh", "qa_examples.jsonl"), ("en", "qa_examples_en.jsonl"))
}


def question(context: str, seed: int, prompts=ZH, **variant) -> str:
    """The question of a reply to a Context-Split-Tree prompt."""
    first = reply_to(prompts.cst_messages(context, **variant), seed).split("\n")[0]
    assert first.startswith(prompts.line(prompts.labels.question, ""))
    return first.removeprefix(prompts.line(prompts.labels.question, ""))


# Determinism


def test_the_same_request_gets_the_same_reply_and_another_seed_another():
    messages = ZH.cst_messages(CONTEXT)
    assert reply_to(messages, 7) == reply_to(messages, 7)
    assert len({reply_to(messages, seed) for seed in range(10)}) > 5


def test_replies_do_not_depend_on_the_process():
    code = (
        "from augcon.demo.rules import reply_to\nfrom augcon.text.prompts import load_prompts\n"
        "p = load_prompts('zh')\n"
        "print([reply_to(p.cst_messages(p.cst.examples[0].context, weak=w, examples=n), s) "
        "for s in range(20) for w in (0, 1) for n in (1, 3)])"
    )
    printed = [
        subprocess.run(
            [sys.executable, "-c", code],
            env={"PYTHONHASHSEED": seed},
            cwd=ROOT,
            capture_output=True,
            check=True,
        ).stdout
        for seed in ("1", "2")
    ]
    assert printed[0] == printed[1]


@pytest.mark.parametrize("prompts", [ZH, EN])
def test_the_completions_prompt_gets_the_reply_of_the_chat_prompt(prompts):
    labels = prompts.labels
    context = f"{CONTEXT}\n\n{labels.context}：\n第二篇。\n\n{labels.question}：里面也有标签？"
    demonstrations = [Example(row["context"], row["question"], row["answer"]) for row in QA[prompts.language][:3]]
    for messages in (
        prompts.cst_messages(context),
        prompts.cst_messages(context, weak=True, examples=1),
        prompts.answer_messages(demonstrations, CONTEXT, "蜂蜡布怕什么？"),
        prompts.grade_messages(context, "蜂蜡布怕什么？", "怕热。", "它怕热。"),
    ):
        assert reply_to(messages, 3) == reply_to(as_text(messages), 3)


def set_off(shown: str) -> str:
    """A context without the space before a paragraph that begins as a part of a prompt does."""
    return shown.replace("\n\n ", "\n\n")


@pytest.mark.parametrize("prompts", [ZH, EN])
def test_a_context_that_holds_prompts_of_its_own_is_no_more_than_a_context(prompts):
    example, labels = prompts.cst.examples[0], prompts.labels
    for hostile in (
        example.context,
        f"{example.context}\n\n{prompts.cst_reply(example.question, example.halves)}",
        as_text(prompts.cst_messages("里面的文本。")).strip(),
        prompts.judge.instruction,
        prompts.cst_reply("里面的问题？", ("一。", "二。")),
        f"一。\n\n{labels.context}：\n二。\n\n{labels.question}：三？\n\n{labels.answer}：四。",
    ):
        for weak in (False, True):
            for number in range(1, len(prompts.cst.examples) + 1):
                messages = prompts.cst_messages(hostile, weak=weak, examples=number)
                for prompt in (messages, as_text(messages)):
                    task = recognise(prompt)
                    assert (task.kind, task.prompts) == ("weak tree" if weak else "tree", prompts)
                    assert set_off(task.last) == hostile
        shown = [Example("甲。", "甲是什么？", "甲。")] * 2
        task = recognise(prompts.answer_messages(shown, hostile, "问？"))
        assert task.kind == "answer" and [*map(set_off, task.parts(labels.question))] == [hostile, "问？"]


# Step 1


@pytest.mark.parametrize("prompts", [ZH, EN])
def test_the_halves_cover_the_context_and_are_made_of_its_words(prompts):
    for example in prompts.cst.examples:
        for second_best in (False, True):
            halves = halve(example.context, second_best)
            assert re.sub(r"\s", "", "".join(halves)) == re.sub(r"\s", "", example.context)
            for half in halves:
                assert 0 < length(half) < length(example.context)
                assert rouge_l_precision(words(half), words(example.context)) >= 0.9


@pytest.mark.parametrize(
    ("context", "halves"),
    [
        ("先把米洗净。再加水煮粥。", ("先把米洗净。", "再加水煮粥。")),
        ("先把米洗净，再加水煮粥", ("先把米洗净，", "再加水煮粥")),
        ("先把米洗净再加水煮粥", ("先把米洗净再加水煮粥", "")),
        ("Wash the rice, then boil it.", ("Wash the rice,", "then boil it.")),
        ("", ("", "")),
    ],
)
def test_cuts_fall_at_sentence_ends_then_at_clause_marks(context, halves):
    assert halve(context, False) == halves


def test_a_long_text_without_marks_is_cut_between_words():
    halves = halve("住户可以在阳台内侧晾晒衣物" * 5, False)
    assert "".join(halves) == "住户可以在阳台内侧晾晒衣物" * 5
    assert all(25 < length(half) < 40 for half in halves)


@settings(max_examples=150, deadline=None)
@given(st.text(max_size=300) | st.text("0a。，. ；”\"'\n字的是1", max_size=120), st.integers(0, 9), st.booleans())
def test_any_text_as_a_context_gets_a_reply_in_the_form_of_the_prompt(context, seed, weak):
    for prompts in (ZH, EN):
        messages = prompts.cst_messages(context, weak=weak, examples=1 if weak else None)
        shown = messages[-1]["content"].removeprefix(f"{prompts.line(prompts.labels.context, '').rstrip()}\n")
        reply = reply_to(messages, seed)
        asked = reply.split("\n")[0].removeprefix(prompts.line(prompts.labels.question, ""))
        assert len(asked) >= 5 and len(asked.splitlines()) == 1
        options = [halve(shown, second_best) for second_best in (False, True)]
        assert reply in [prompts.cst_reply(asked, halves) for halves in options]
        for first, second in options:
            assert [part == part.strip() for part in (first, second)] == [True, True]
            if second:
                assert max(length(first), length(second)) < length(shown)
            else:
                assert first == shown.strip()


@settings(max_examples=60, deadline=None)
@given(st.text(max_size=200), st.text(max_size=60), st.text(max_size=60))
def test_any_text_gets_an_answer_and_a_grade(context, asked, answer):
    assert reply_to(ZH.answer_messages([], context, asked), 0)
    assert reply_to(as_text(EN.answer_messages([Example(context, asked, answer)], context, asked)), 0)
    grade = reply_to(EN.grade_messages(context, asked, context, answer), 0)
    assert 1 <= int(grade.removeprefix("Grade: ")) <= 10


@pytest.mark.parametrize("prompts", [ZH, EN])
@pytest.mark.parametrize("variant", NEGATIVES.values(), ids=NEGATIVES)
def test_a_weaker_prompt_gets_mostly_questions_that_say_less_of_the_context(prompts, variant):
    def names_something(asked: str, context: str) -> bool:
        if prompts is ZH:
            return any(asked[i : i + 6] in context for i in range(len(asked) - 5))
        return any(phrase in context for phrase in re.findall(r"(?=(\b\w+ \w+ \w+ \w+\b))", asked))

    contexts = [row["context"] for row in QA[prompts.language]]
    shares = [
        sum(
            names_something(question(context, seed, prompts, **of), context)
            for context in contexts
            for seed in range(9)
        )
        for of in ({}, variant)
    ]
    assert shares[0] > 0.6 * 9 * len(contexts) and shares[1] < 0.4 * 9 * len(contexts)


def grow(context: str, seed: int, prompts: Prompts) -> Iterator[str]:
    """The questions of a tree, as AugCon reads them."""
    if length(context) >= 20:
        split = parse_split(reply_to(prompts.cst_messages(context), seed), prompts)
        yield split.query
        for half in split.halves if split.halves[1] else ():
            yield from grow(half, seed, prompts)


def root_contexts(context: str) -> Iterator[str]:
    if length(context) <= 500:
        yield context
    else:
        for half in halve(context, False):
            yield from root_contexts(half)


def test_a_few_trees_over_each_root_context_of_the_bundled_corpus_hold_its_quota():
    articles = load_from_disk(ROOT / "DailyM")["train"]["article"]
    roots = [context for article in articles for context in root_contexts(article)]
    assert {language(context) for context in roots} == {"zh", "en"}
    passes = Counter()
    for root in roots:
        kept = DiverseQueries(0.7)
        trees = (grow(root, seed, load_prompts(language(root))) for seed in range(6))
        passes[next((n for n, tree in enumerate(trees) if kept.offer_all(tree) >= 1.15 * length(root) / 35), 6)] += 1
    assert passes[6] <= 0.02 * len(roots) and passes[0] >= 0.8 * len(roots)


def test_questions_stand_alone_and_are_of_a_sensible_length():
    articles = load_from_disk(ROOT / "DailyM")["train"]["article"]
    contexts = [context for article in articles for context in root_contexts(article) if language(context) == "zh"]
    dependent = 0
    for context in contexts:
        for seed in range(5):
            asked = question(context, seed)
            dependent += bool(re.search("[他她它我你]|本文|上述", asked))
            assert 5 <= length(asked) <= 45 and asked.endswith("？") and not re.search("[{}]", asked)
    assert dependent <= 0.05 * 5 * len(contexts)


def test_a_reply_takes_little_time():
    contexts = [*root_contexts(load_from_disk(ROOT / "DailyM")["train"]["article"][0])]
    question(contexts[0], 0)
    started, asked = time.process_time(), 0
    for seed in range(4):
        asked += sum(1 for context in contexts for _ in grow(context, seed, load_prompts(language(context))))
    assert asked > 300 and (time.process_time() - started) / asked < 1 / 500


# Step 3


@pytest.mark.parametrize("prompts", [ZH, EN])
def test_answers_come_from_the_context_and_do_not_mention_it(prompts):
    rows = QA[prompts.language]
    demonstrations = [Example(row["context"], row["question"], row["answer"]) for row in rows[:3]]
    for row in rows[3:]:
        answer = reply_to(prompts.answer_messages(demonstrations, row["context"], row["question"]), 0)
        assert rouge_l_precision(words(answer), words(row["context"])) > 0.9
        assert not MENTIONS.search(answer)
    context = "本文介绍一种怕热的蜂蜡布。它怕什么，如上文所述。蜂蜡布怕热，"
    assert reply_to(ZH.answer_messages([], context, "蜂蜡布怕什么？"), 0) == "蜂蜡布怕热。"


@pytest.mark.parametrize("prompts", [ZH, EN])
def test_answers_to_its_own_questions_pass_the_checks(prompts):
    examples = [Example(row["context"], row["question"], row["answer"]) for row in QA[prompts.language]]
    for example in examples[3:]:
        for seed in range(9):
            asked = question(example.context, seed, prompts)
            reply = reply_to(prompts.answer_messages(examples[:3], example.context, asked), seed)
            assert parse_answer(reply, Query("", 0, example.context, asked), prompts, examples[:3]) == reply
            assert not re.search("没有更多|nothing more", reply)


def test_longer_demonstrations_get_longer_answers():
    row = QA["zh"][2]
    short, long = ([Example("上下文。", "问？", "答" * size)] for size in (10, 200))
    sizes = [length(reply_to(ZH.answer_messages(shown, row["context"], row["question"]), 0)) for shown in (short, long)]
    assert sizes[0] < sizes[1]


@pytest.mark.parametrize("prompts", [ZH, EN])
def test_a_grade_is_a_number_from_1_to_10_and_the_reference_itself_gets_the_best(prompts):
    row, other = QA[prompts.language][:2]
    grades = []
    for answer in (row["answer"], row["answer"][: len(row["answer"]) // 2], other["answer"]):
        reply = reply_to(prompts.grade_messages(row["context"], row["question"], row["answer"], answer), 0)
        assert re.fullmatch(prompts.line(prompts.labels.grade, r"(?:[1-9]|10)"), reply)
        grades.append(int(re.findall(r"\d+", reply)[0]))
    assert grades[0] == 10 > grades[1] > grades[2] >= 1


# Any other prompt


@pytest.mark.parametrize("asked", ["你好，请写一首诗。", "Hello, please write a poem."])
def test_any_other_prompt_is_told_that_this_is_no_language_model(asked):
    reply = reply_to([{"role": "user", "content": asked}], 0)
    assert ("不是语言模型" in reply) == ("你好" in asked) and ("not a language model" in reply) == ("Hello" in asked)


def test_large_and_hostile_contexts_take_time_in_proportion():
    started = time.monotonic()
    for text in (
        "字" * 200_000,
        "（" * 200_000,
        "<!--" * 50_000,
        "[a](" * 50_000,
        "\n" * 200_000,
    ):
        assert reply_to(ZH.cst_messages(text), 0)
        assert reply_to(ZH.answer_messages([], text, "问？"), 0)
    assert time.monotonic() - started < 8


@pytest.mark.parametrize(
    ("stops", "limit", "expected"),
    [
        ([], None, ("问题：米。片段1", "stop", 8)),
        (["片段1"], None, ("问题：米。", "stop", 5)),
        (["段", "米"], None, ("问题：", "stop", 3)),
        ([], 4, ("问题：米", "length", 4)),
        (["米"], 3, ("问题：", "stop", 3)),
        (["不在"], 2, ("问题", "length", 2)),
    ],
)
def test_replies_are_cut_before_a_stop_string_and_at_the_limit(stops, limit, expected):
    assert cut("问题：米。片段1", stops, limit) == expected


# Over HTTP


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


def start(port: int, *arguments: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "augcon.demo.engine", "--port", str(port), *arguments]
    return subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    """The address of a running engine, which must end cleanly on SIGTERM."""
    port = free_port()
    process = start(port)
    address = f"http://127.0.0.1:{port}"
    for _ in range(200):
        try:
            urllib.request.urlopen(f"{address}/health", timeout=5)
            break
        except OSError:
            time.sleep(0.05)
    yield address
    process.send_signal(signal.SIGTERM)
    output, _ = process.communicate(timeout=10)
    assert process.returncode == 0
    assert "NOT a language model" in output and "Traceback" not in output


def call(address: str, body: object = None) -> tuple[int, object]:
    """Status and content of a GET, or of a POST of ``body``."""
    data = None if body is None else body if isinstance(body, bytes) else json.dumps(body).encode()
    try:
        with urllib.request.urlopen(urllib.request.Request(address, data), timeout=20) as response:
            status, content = response.status, response.read()
    except urllib.error.HTTPError as error:
        status, content = error.code, error.read()
    return status, json.loads(content) if content[:1] == b"{" else content.decode()


def request(**fields: object) -> dict[str, object]:
    return {"model": MODEL, "messages": ZH.cst_messages(CONTEXT), "seed": 1, "temperature": 0.85, **fields}


def test_the_model_list_says_what_the_engine_is(server):
    status, models = call(f"{server}/v1/models")
    assert status == 200 and [model["id"] for model in models["data"]] == [MODEL]
    assert models["data"][0]["owned_by"] == "augcon demonstration rules, not a language model"


def test_a_chat_completion_has_the_shape_of_openai(server):
    status, response = call(f"{server}/v1/chat/completions", request(structured_outputs={"regex": "x"}, stop=[]))
    choice = response["choices"][0]
    assert status == 200 and response["object"] == "chat.completion" and response["model"] == MODEL
    assert choice["message"]["content"] == reply_to(ZH.cst_messages(CONTEXT), 1)
    assert choice["finish_reason"] == "stop" and "not-a-language-model" in response["system_fingerprint"]
    usage = response["usage"]
    assert usage["completion_tokens"] == length(choice["message"]["content"])
    assert usage["total_tokens"] == usage["prompt_tokens"] + usage["completion_tokens"]


def test_a_completion_gives_the_same_as_text(server):
    body = {"model": MODEL, "prompt": as_text(ZH.cst_messages(CONTEXT)), "seed": 1, "stop": ["\n片段1"]}
    status, response = call(f"{server}/v1/completions", body)
    assert status == 200 and response["choices"][0]["text"] == reply_to(ZH.cst_messages(CONTEXT), 1).split("\n")[0]


def test_at_a_low_temperature_the_seed_makes_no_difference(server):
    replies = [
        call(f"{server}/v1/chat/completions", request(temperature=0.2, seed=seed))[1]["choices"] for seed in (1, 2)
    ]
    assert replies[0] == replies[1]


def test_max_tokens_is_honoured(server):
    _, response = call(f"{server}/v1/chat/completions", request(max_tokens=9))
    choice = response["choices"][0]
    assert length(choice["message"]["content"]) == 9 == response["usage"]["completion_tokens"]
    assert choice["finish_reason"] == "length"


@pytest.mark.parametrize(
    "fields",
    [
        {"messages": None},
        {"messages": []},
        {"messages": [1]},
        {"messages": [{"role": "user", "content": 5}]},
        {"model": None},
        {"stop": "one"},
        {"seed": "one"},
        {"temperature": "hot"},
        {"max_tokens": 1.5},
    ],
)
def test_ill_typed_fields_are_a_400_in_the_shape_of_openai(server, fields):
    status, response = call(f"{server}/v1/chat/completions", request(**fields))
    assert status == 400 and set(response["error"]) == {"message", "type", "param", "code"}
    assert next(iter(fields)) in response["error"]["message"]


@pytest.mark.parametrize("body", [b"", b"{", b"[]", b"\xff", b"[" * 200_000, b"{}"])
def test_what_is_no_request_is_a_400(server, body):
    for path in ("chat/completions", "completions"):
        status, response = call(f"{server}/v1/{path}", body)
        assert status == 400 and response["error"]["message"]


def test_an_unknown_model_is_a_404_that_names_it(server):
    status, response = call(f"{server}/v1/chat/completions", request(model="gpt-none"))
    assert status == 404 and "gpt-none" in response["error"]["message"]


def test_an_unknown_path_is_a_404_in_the_shape_of_openai(server):
    status, response = call(f"{server}/v1/embeddings", {})
    assert status == 404 and set(response["error"]) == {"message", "type", "param", "code"}


def test_large_bodies_pass(server):
    status, _ = call(f"{server}/v1/chat/completions", request(messages=ZH.cst_messages("字" * 400_000)))
    assert status == 200


def test_metrics_are_in_prometheus_format_and_count(server):
    def figures() -> dict[str, float]:
        _, page = call(f"{server}/metrics")
        lines = [line for line in page.splitlines() if not line.startswith("#")]
        matches = [re.fullmatch(rf'(vllm:\w+)\{{model_name="{MODEL}"\}} (\d+)', line) for line in lines]
        return {match[1]: float(match[2]) for match in matches}

    before = figures()
    call(f"{server}/v1/chat/completions", request())
    after = figures()
    assert after["vllm:request_success_total"] == before["vllm:request_success_total"] + 1
    assert after["vllm:num_requests_running"] == 0


def test_a_port_in_use_is_one_line_and_status_1(server):
    process = start(int(server.rpartition(":")[2]))
    output, _ = process.communicate(timeout=20)
    assert process.returncode == 1 and len(output.splitlines()) == 1 and "in use" in output


def test_every_reply_takes_the_latency():
    port = free_port()
    process = start(port, "--latency", "0.3")
    try:
        for _ in range(200):
            try:
                call(f"http://127.0.0.1:{port}/health")
                break
            except OSError:
                time.sleep(0.05)
        started = time.monotonic()
        call(f"http://127.0.0.1:{port}/v1/chat/completions", request())
        assert 0.3 <= time.monotonic() - started < 3
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=10) == 0
    finally:
        process.kill()
