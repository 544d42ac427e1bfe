"""Replies that attack: whatever a server sends is read or refused, in linear time, and nothing is lost."""

import asyncio
import contextlib
import dataclasses
import itertools
import json
import random
import re
import subprocess
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import httpx2
import openai
import pytest
from conftest import ROOT, run
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from scripted_server import ScriptedServer, says
from test_attacks import MARKS

from augcon.data import Example, Pair, Query, Reply, Request, RootContext
from augcon.demo.rules import reply_to
from augcon.demo.tiny_model import make_tiny_model
from augcon.errors import one_line
from augcon.llm import dialect, failures
from augcon.llm.client import LLM, Endpoint
from augcon.llm.dialect import Dialect
from augcon.llm.limit import figures
from augcon.llm.servers import Server
from augcon.llm.store import Store
from augcon.method.answers import AnswerRules, Graded, answer_query, try_examples
from augcon.method.diversity import likeness
from augcon.method.judging import compare, grade
from augcon.method.pairs import make_pair
from augcon.method.questions import Draft
from augcon.method.tree import TreeRules, fill_root
from augcon.text import checks, parse
from augcon.text.parse import Unparseable
from augcon.text.prompts import Prompts, disarm, load_prompts
from augcon.text.units import clean, language, length, sentences, words

BOTH = [load_prompts("zh"), load_prompts("en")]
CONTEXT = (
    "面包店早上六点开门，因为工人要吃早饭。The baker sold 1,200 rolls in 1885, says Ann Lee of NASA, twice as many as "
    "一八八四年。"
)
QUESTION = "面包店为什么六点开门？"
QUERY = Query("0:0:", 0, CONTEXT, QUESTION)
ROOT_CONTEXT = RootContext(0, 0, 0, len(CONTEXT), length(CONTEXT), 2, CONTEXT, "Bread 面包")
EXAMPLE = Example("阳台公约", "阳台能装晾衣架吗？", "不可以，护栏外面不能加装晾衣架，花架也一样。")

# What the readers look for, in pieces: labels of ours and of models, marks, numbers, thinking, phrases of the checks.
LABELS = [
    *(label for p in BOTH for label in p.labels.model_dump(exclude={"halves"}).values()),
    *(label for p in BOTH for label in (*p.labels.halves, *p.judge.scores, *p.judge.answers, p.judge.verdict)),
    *(verdict for p in BOTH for verdict in p.judge.verdicts),
    *[
        "提问",
        "问",
        "Query",
        "Q",
        "上下文 1",
        "段落②",
        "Passage A",
        "Half Two",
        "Cut after",
        "切分处",
        "答",
        "得分",
        "Score",
    ],
]
PHRASES = [
    *[
        "根据上下文，",
        "文中提到",
        "本文介绍",
        "作者认为",
        "这段文字",
        "原文里",
        "抱歉，我无法回答",
        "作为AI，我",
        "没有足够的信息回答",
    ],
    *[
        "According to the passage, ",
        "the text says ",
        "As an AI language model, I ",
        "I'm sorry, but I can't ",
        "the author ",
    ],
    *["as noted above ", "mentioned in the article", "There is no information provided", "this excerpt "],
]
NUMBERS = [
    "1",
    "10",
    "3/5",
    "8 / 10",
    "5分",
    "[1]–[2]",
    "1,200",
    "3.5",
    "21st",
    "twenty-five ",
    "三千四百",
    "十二",
    "1940s",
    "１２",
    "²",
]
NAMES = [
    "Ann Lee",
    "U.S.",
    "NASA",
    "Zürich",
    "《阿Q》",
    "“高收”",
    "「租」",
    '"x"',
    "鲁迅",
    "北京大学",
    "World Health Organization ",
]
STRUCTURE = [
    *":：\n \t*_#>`-•·/.,。，？?!（）()【】[]“”「」\"'<>|&\\{}%$",
    "\n\n",
    "---",
    "\n***\n",
    "```",
    "**",
    "1. ",
    "\r\n",
]
THINKING = ["<think>", "</think>", "<thinking>", "</thinking>", "<think", "</think"]
ODD = [
    *"\x00\x07\x85\u2028\u200b\u2060\ufeff\ud800\udfff\u0301\u0327\u200d\u202e\u3000\ue000\uffff𠮷ไ👩ﷺİıß",
    "\ud83d\ude00",
]
TEXT = [
    "甲",
    "面包店早上六点开门",
    "因为工人要吃早饭。",
    "The baker sold 1,200 rolls",
    "word ",
    QUESTION,
    EXAMPLE.answer,
    CONTEXT,
]
EMPTY = ["空", "（空）", "None", "N/A", "-"]
PIECES = [*LABELS, *PHRASES, *NUMBERS, *NAMES, *STRUCTURE, *THINKING, *ODD, *TEXT, *EMPTY, *MARKS]

QUESTIONS = [
    *TEXT,
    *(example.question for p in BOTH for example in p.cst.examples),
    "（一个问句）",
    "“为什么六点开门？”",
    "长" * 1001,
]

NOISE = st.lists(st.sampled_from(STRUCTURE + ODD + TEXT), max_size=3).map("".join)
FREE = st.lists(st.sampled_from(PIECES), max_size=30).map("".join) | st.text(st.characters(), max_size=80)
LINES = st.lists(
    st.tuples(
        NOISE, st.sampled_from(LABELS + EMPTY), st.sampled_from(["：", ": ", "", "**：", "\n", " ：\n"]), FREE
    ).map("".join),
    max_size=6,
).map("\n".join)


@st.composite
def well_formed(draw: st.DrawFn) -> str:
    """A reply in the form that was asked for, with anything in its places."""
    prompts = draw(st.sampled_from(BOTH))
    name = draw(st.sampled_from(["split", "focus", "answer", "grade", "grades", "verdict"]))
    text, number = draw(FREE), draw(st.sampled_from(NUMBERS) | st.integers(0, 11).map(str))
    if name == "split":
        asked = draw(st.sampled_from(QUESTIONS) | st.sampled_from(TEXT).map(lambda begun: begun + text))
        reply = prompts.cst_reply(asked, (draw(FREE), draw(FREE)))
    elif name == "focus":
        reply = f"{prompts.line(prompts.labels.question, text)}\n{prompts.line(prompts.labels.cut, number)}"
    elif name == "answer":
        text = draw(
            st.sampled_from(["", EXAMPLE.answer, CONTEXT, QUESTION, MARKS[0], "**甲**", "The author"]) | st.just(text)
        )
        reply = f"{prompts.line(prompts.labels.question, QUESTION)}\n{prompts.line(prompts.labels.answer, text)}"
    elif name == "grade":
        reply = prompts.line(prompts.labels.grade, number)
    elif name == "grades":
        reply = "\n".join(
            prompts.line(score, draw(st.sampled_from(["1", "5", "5/5", "3分"]))) for score in prompts.judge.scores
        )
    else:
        reply = prompts.line(prompts.judge.verdict, draw(st.sampled_from(prompts.judge.verdicts)))
    return draw(NOISE) * draw(st.booleans()) + reply + draw(NOISE) * draw(st.booleans())


REPLIES = st.one_of(FREE, LINES, well_formed())


def asks(reply: str) -> Callable[[Request], Any]:
    """A server that always says the same; some short replies are cut off, and so not read."""

    async def ask(request: Request) -> Reply:
        return Reply(reply, complete=len(reply) % 7 > 0 or len(reply) > 1000)

    return ask


def grow(reply: str, prompts: Prompts, **rules: Any) -> None:
    """All that step 1 does with a reply: trees over a root context, and a worse question for the scorer."""
    few = TreeRules(tries=2, max_passes=1, leaf_length=10, min_length=5, **rules)
    grown = asyncio.run(fill_root(asks(reply), prompts, ROOT_CONTEXT, few))
    assert {node.path for node in grown.nodes if node.path} <= {f"{node.path}{n}" for node in grown.nodes for n in "12"}
    assert "".join(node.context + (node.query or "") for node in grown.nodes).encode()
    pair = asyncio.run(make_pair(asks(reply), prompts, ROOT_CONTEXT, few, "both", QUERY))
    assert pair if isinstance(pair, str) else pair.neg_query.encode()


def answer(reply: str, prompts: Prompts) -> None:
    """All that step 3 does with a reply: an answer, and an answer to an example with its grade."""
    rules = AnswerRules(answer_tries=2, tries=2)
    answered = asyncio.run(answer_query(asks(reply), prompts, [EXAMPLE], QUERY, CONTEXT, rules))
    assert (answered.text is None) == bool(answered.reason) and (answered.text or "").encode() is not None
    assert isinstance(asyncio.run(try_examples(asks(reply), prompts, [], EXAMPLE, rules)), Graded)


def judge(reply: str, prompts: Prompts) -> None:
    """All that judge.py does with a reply."""
    asyncio.run(grade(asks(reply), prompts, Pair(QUESTION, reply), AnswerRules(tries=2)))
    asyncio.run(compare(asks(reply), prompts, Pair(QUESTION, reply), Pair(QUESTION, "甲"), True, AnswerRules(tries=2)))


def offer(question: str, prompts: Prompts) -> None:
    """A question that the parser lets through, as it is checked."""
    with contextlib.suppress(Unparseable):
        question = parse.parse_question(question, prompts)
        assert 5 <= len(question) <= 1000 and "\n" not in question
        Draft(CONTEXT, QUESTION, "Bread").offer(question)


def only_in_text(reply: str, prompts: Prompts) -> None:
    """The checks of questions and answers, each with a reply in every place."""
    assert isinstance(checks.points_at_text(reply, CONTEXT) or checks.points_at_text(QUESTION, reply), bool)
    assert isinstance(
        checks.mentions_text(reply, CONTEXT, QUESTION) or checks.mentions_text("文中说", reply, reply), bool
    )
    assert isinstance(checks.is_refusal(reply, CONTEXT) or checks.is_refusal("我无法回答。", reply), bool)


def grounded(reply: str, prompts: Prompts) -> None:
    """The names and numbers of a question; of at most a thousand characters, as the parser lets no more through."""
    checks.ungrounded(clean(reply)[: parse.LONGEST_QUESTION], CONTEXT)
    checks.ungrounded(QUESTION + "1885", clean(reply)[:20_000])


def measured(reply: str, prompts: Prompts) -> None:
    """What is measured of a half."""
    said = parse.without_thinking(reply)
    assert disarm(disarm(said)) == disarm(said)
    assert "".join(sentences(said)) == said and length(said) >= 0 and language(said)
    assert sum(map(len, words(said))) <= len(said) and len(one_line(said)) <= 300
    likeness(said[:1000], QUESTION)


def parsed(reader: Callable[..., Any], *more: Any) -> Callable[[str, Prompts], None]:
    def read(reply: str, prompts: Prompts) -> None:
        with contextlib.suppress(Unparseable):
            reader(reply, *more, prompts)

    return read


READERS: dict[str, Callable[[str, Prompts], None]] = {
    "split": parsed(parse.parse_split),
    "focus": parsed(parse.parse_focus),
    "question": parsed(parse.parse_question),
    "bare answer": parsed(parse.bare_answer, QUESTION),
    "answer": parsed(lambda reply, prompts: checks.parse_answer(reply, QUERY, prompts, [EXAMPLE])),
    "grade": parsed(parse.parse_grade),
    "grades": parsed(parse.parse_grades),
    "verdict": parsed(parse.parse_verdict),
    "question as checked": offer,
    "checks": only_in_text,
    "names and numbers": grounded,
    "measures": measured,
    "trees": grow,
    "trees cut in the middle": lambda reply, prompts: grow(reply, prompts, bad_split="cut"),
    "trees that name a sentence": lambda reply, prompts: grow(reply, prompts, split="focus"),
    "answers": answer,
    "judging": judge,
}
CASES = 1000
LONG = [pytest.param(CASES, id="short"), pytest.param(5 * CASES, id="long", marks=pytest.mark.nightly)]
of_any_speed = {"deadline": None, "database": None, "suppress_health_check": list(HealthCheck)}


@pytest.mark.parametrize("cases", LONG)
def test_whatever_a_model_writes_is_read_or_refused(cases: int):
    @settings(max_examples=cases, **of_any_speed)
    @given(REPLIES, st.sampled_from(BOTH))
    def check(reply: str, prompts: Prompts) -> None:
        for read in READERS.values():
            read(reply, prompts)

    check()


# What surrounds a reply

JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**70), 2**70)
    | st.floats()
    | st.sampled_from(["", "length", "x", "\ud800"]),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.sampled_from(["content", "text", "x"]), inner, max_size=3)
    ),
    max_leaves=5,
)


@st.composite
def responses(draw: st.DrawFn) -> str:
    """A response of OpenAI's form with anything at one or two places in it, or cut short."""
    whole: dict[str, Any] = {
        "choices": [{"finish_reason": "stop", "text": "t", "message": {"content": "c", "reasoning_content": None}}],
        "usage": {
            "prompt_tokens": 7,
            "completion_tokens": 3,
            "prompt_tokens_details": {"cached_tokens": 1},
            "completion_tokens_details": {"reasoning_tokens": 0},
        },
    }
    for _ in range(draw(st.integers(1, 2))):
        place: Any = whole
        while isinstance(place, (dict, list)) and place:
            key = draw(st.sampled_from(sorted(place) if isinstance(place, dict) else range(len(place))))
            inside = place[key]
            if not isinstance(inside, (dict, list)) or not inside or draw(st.integers(0, 3)) == 0:
                place[key] = draw(JSON | REPLIES)
                break
            place = inside
    text = json.dumps(whole, ensure_ascii=draw(st.booleans()))
    return draw(st.just(text) | st.integers(0, len(text)).map(lambda end: text[:end]) | FREE)


class Silent(Store):
    """A store that holds nothing."""

    def __init__(self) -> None:
        pass


def llm(completions: bool = False) -> LLM:
    return LLM(Endpoint("http://127.0.0.1:9/v1", completions=completions), Silent())


@pytest.mark.parametrize("cases", LONG)
def test_whatever_surrounds_a_reply_is_read_or_a_bad_reply(cases: int):
    async def run_it() -> None:
        clients, said = [llm(), llm(completions=True)], list[str]()

        @settings(max_examples=cases, **of_any_speed)
        @given(responses())
        def check(answer: str) -> None:
            for client in clients:
                sent = client._body(Request([{"role": "user", "content": "q"}], 0, 10))
                client._post = lambda *_: asyncio.sleep(0, answer)  # type: ignore[method-assign,assignment]
                call = client._call(client.servers.all[0], sent)
                try:
                    reply = drive(call)
                    assert isinstance(reply.text, str) and reply.text.encode() is not None
                    assert json.loads(json.dumps(dataclasses.asdict(reply))) == dataclasses.asdict(reply)
                    assert min(reply.prompt_tokens, reply.cached_tokens, reply.written_tokens) >= 0
                except failures.BadReply as error:
                    said.append(str(error))
            with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
                dialect.look(answer)
            assert all(isinstance(value, float) for value in figures(answer).values())

        check()
        assert said and all("\n" not in each and len(each) < 1000 for each in said)
        for client in clients:
            await client.servers.close()

    asyncio.run(run_it())


def drive(call: Any) -> Any:
    """The result of a coroutine that waits for nothing but ``asyncio.sleep(0)``."""
    while True:
        try:
            call.send(None)
        except StopIteration as done:
            return done.value


CLIENT = openai.AsyncOpenAI(api_key="x", base_url="http://127.0.0.1/v1")


def error_of(status: int, body: str, headers: dict[str, str]) -> openai.APIStatusError:
    """The error that the client makes of a refusal."""
    request = httpx2.Request("POST", "http://127.0.0.1/v1")
    response = httpx2.Response(status, content=body.encode("utf-8", "surrogatepass"), headers=headers, request=request)
    return CLIENT._make_status_error_from_response(response)


WAITS = st.sampled_from(
    ["", "0.5", "-1", "inf", "nan", "1e999", "soon", "Wed, 21 Oct 2099 07:28:00 GMT", "Thu, 99 Foo 1e9"]
)
NAMED = st.sampled_from(
    ["stop", "seed", "temperature", "max_tokens", "x", "chat_template_kwargs", "4 stop strings", "model"]
)


@settings(max_examples=CASES, **of_any_speed)
@given(
    st.sampled_from([400, 401, 404, 413, 422, 429, 500, 503]),
    st.dictionaries(
        st.sampled_from(["error", "detail", "message", "param", "code", "loc", "msg"]), JSON | NAMED | REPLIES
    ).map(lambda inner: json.dumps({"error": inner} if len(inner) % 2 else inner))
    | responses(),
    st.text(st.characters(codec="latin-1", exclude_categories=["Cc"]), max_size=20) | WAITS,
)
def test_whatever_a_refusal_says_it_has_a_meaning(status: int, body: str, wait: str):
    error = error_of(status, body, {"Retry-After": wait} if wait.isascii() else {})
    final = failures.final(error, False, "http://x", "m", {})
    assert final is None or ("\n" not in str(final) and len(str(final)) < 1000)
    assert isinstance(failures.too_long(error), bool) and failures.kind(error) == f"status {status}"
    assert 0 <= failures.retry_after(error, 600) <= 600
    sent = {"model": "m", "messages": [], "stop": ["a", "b"], "seed": 1, "temperature": 0, "max_tokens": 9, "top_p": 1}
    heeding = Dialect().heeding(error, sent, frozenset())
    assert heeding is None or (heeding != Dialect() and heeding.apply(sent))


@pytest.mark.parametrize("depth", [50, 400, 900, 5_000, 100_000])
@pytest.mark.parametrize("opening", ["[", '{"error":', '{"message":', '{"error":[{"detail":'])
def test_a_refusal_nested_ever_deeper_has_a_meaning_too(depth: int, opening: str):
    closing = "".join({"[": "]", "{": "}"}[mark] for mark in reversed(opening) if mark in "[{")
    error = error_of(400, opening * depth + "1" + closing * depth, {})
    assert failures.final(error, False, "http://x", "m", {}) is not None
    assert not failures.too_long(error) and Dialect().heeding(error, {"stop": ["a"], "model": "m"}, frozenset()) is None
    nested: Any = "stop"
    for _ in range(depth):  # which some Pythons can read and others cannot
        nested = [nested] if opening == "[" else {"error": nested}
    error.body = nested
    assert not dialect.parameter_named(error, ["stop"])


LISTED = JSON.map(lambda inner: json.dumps({"data": inner})) | JSON.map(lambda one: json.dumps({"data": [{"id": one}]}))


def test_whatever_a_list_of_models_is_it_is_read_or_passed_over():
    async def run_it() -> None:
        server = Server("http://127.0.0.1:9/v1", Endpoint("x").api_key, 1, 1)
        listing = b""

        def answer(_: httpx2.Request) -> httpx2.Response:
            return httpx2.Response(200, content=listing, headers={"content-type": "application/json"})

        server.client._client = httpx2.AsyncClient(transport=httpx2.MockTransport(answer))

        async def find() -> None:
            assert await server.find_models(1) is None
            assert all(f"{name}{root}".encode() is not None for name, root in server.served.items())

        @settings(max_examples=CASES // 4, **of_any_speed)
        @given(LISTED | responses())
        def check(said: str) -> None:
            nonlocal listing
            listing = said.encode("utf-8", "surrogatepass")
            with asyncio.Runner() as runner:
                runner.run(find())

        await asyncio.to_thread(check)

    asyncio.run(run_it())


# Time

RUNS = [
    *" \n\t\u3000*-`#>[]【（“”\"'：:9/，.。·a甲\u200b\u200d\ud800",
    "1. ",
    "\n---",
    "问题：",
    "片段2：\n",
    "\nAnswer:",
    "Part 1",
]
RUNS += [
    "<think>",
    "</think>",
    "<",
    "<|",
    "]~",
    "\u0301\u0327",
    "<think>\n片段1：甲 9/10“a",
    "三百",
    "twenty ",
    "U.S. ",
    "“甲",
    "A b",
]
RUNS += [
    "在文中",
    "根据",
    "the text ",
    "抱歉",
    "sorry, ",
    "一二三四",
    "1,234",
    "鲁迅 ",
    "ไ",
    "👩\u200d",
    "[[[[",
    "{{",
    '{"a":',
    "\\",
]
FORMS = [
    "R",
    "R甲R",
    f"问题：{QUESTION}R\n片段1：R甲R\n片段2：R乙R",
    "<think>R</think>R评分R：R8R/R10R。",
    "问题R：R\n答案：**R甲R**",
]


def look(reply: str, _: Prompts) -> None:
    whole = {"choices": [{"finish_reason": "stop", "message": {"content": reply}}]}
    for answer in (reply, json.dumps(whole), json.dumps(whole)[:-9]):
        with contextlib.suppress(ValueError, LookupError, TypeError, AttributeError, RecursionError):
            dialect.look(answer)
        figures(answer)
    error = error_of(400, json.dumps({"error": {"message": reply, "param": reply}}), {})
    failures.final(error, False, "http://x", "m", {})
    Dialect().heeding(error, {"stop": ["a"], "seed": 1, "model": "m"}, frozenset())


TIMED = {**READERS, "protocol": look}
# By size: in both, a quadratic reader would take 400 times as long for a reply 20 times as long.
SIZES = [
    pytest.param(1_500, 30_000, id="short"),
    pytest.param(50_000, 1_000_000, id="long", marks=pytest.mark.nightly),
]


@pytest.mark.parametrize(("small", "large"), SIZES)
@pytest.mark.parametrize("reader", TIMED)
def test_the_time_for_a_reply_is_linear_in_its_length(reader: str, small: int, large: int):
    def seconds(form: str, piece: str, size: int) -> float:
        reply = form.replace("R", (piece * (size // len(piece)))[: size // form.count("R")])
        began = time.process_time()
        TIMED[reader](reply, BOTH[0])
        return time.process_time() - began

    checks.ungrounded("鲁迅为什么去北京？", "甲")  # a first call loads jieba
    for piece, form in zip(RUNS, itertools.cycle(FORMS), strict=False):
        assert seconds(form, piece, large) < 60 * seconds(form, piece, small) + 0.5, (piece, form)


# Through the front door


def nasty(seed: int) -> Callable[[dict[str, Any], int], Any]:
    """A server of which every other reply is odd, the others the demonstration's; the same for the same request."""

    def script(body: dict[str, Any], before: int) -> Any:
        chance = random.Random(f"{seed} {json.dumps(body, sort_keys=True)}")
        plain = reply_to(body.get("messages") or body["prompt"], body["seed"])
        odd = "".join(chance.choices(PIECES, k=chance.randrange(40))) * chance.choice([1, 1, 1, 500])
        mixed = "".join(part + chance.choice(PIECES) for part in re.split(r"(?<=[\n：:])", plain))
        reply = chance.choice(
            [plain, plain, plain, odd, mixed, plain + odd, odd + plain, f"<think>{odd}</think>{plain}"]
        )
        return says(reply, chance.choice(["stop"] * 9 + ["length"]))

    return script


def lines(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


def ends_well(done: "subprocess.CompletedProcess[str]") -> bool:
    """Whether a run ended with a result or an error of one line. True for a result."""
    told = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert "Traceback" not in done.stderr and len(told) == (done.returncode != 0), done.stderr[-2000:]
    return done.returncode == 0


@pytest.mark.parametrize("seed", [1, *(pytest.param(seed, marks=pytest.mark.nightly) for seed in range(2, 12))])
def test_a_run_over_odd_replies_accounts_for_all_and_leaves_files_that_can_be_read(tmp_path: Path, seed: int):
    results, articles = tmp_path / "r", datasets.load_from_disk(ROOT / "DailyM")["train"]["article"]
    chosen = (15,) if seed == 1 else (0, 15)
    (tmp_path / "c.jsonl").write_text("".join(json.dumps({"article": articles[n]}) + "\n" for n in chosen))
    (tmp_path / "asked.txt").write_text("面包店为什么六点开门？\nWhy does it open at six?\n问三？\n问四？\n")

    async def run_all() -> None:
        async with ScriptedServer(nasty(seed)) as server:

            async def play(script: str, *flags: object) -> bool:
                ended = await asyncio.to_thread(run, script, "--api-base", server.url, "--results", results, *flags)
                return ends_well(ended)

            assert await play("step1_gen_q.py", "--corpus", tmp_path / "c.jsonl", "--negatives", 4, "--max-passes", 1)
            queries = results / "queries.json"
            by_hand = json.loads(queries.read_text("utf-8"))
            by_hand["0"].append([CONTEXT, "\u3000 How many rolls\x00 were sold? \n"])
            (results / "filtered_queries.json").write_text(json.dumps(by_hand))
            answered = await play("step3_gen_a.py", "--candidates", 1 + (seed > 1))
            assert await play("inference.py", "--questions", tmp_path / "asked.txt")
            await play("judge.py")
            assert answered

    asyncio.run(run_all())
    nodes, roots = lines(results / "nodes.jsonl"), lines(results / "contexts.jsonl")
    places = {(node["root"], node["pass"], node["path"]) for node in nodes}
    assert len(places) == len(nodes) and {node["root"] for node in nodes} == {root["root"] for root in roots}
    for root, number, path in places:
        assert not path or {(root, number, path[:-1]), (root, number, path[:-1] + "1")} <= places
    queries = json.loads((results / "queries.json").read_text("utf-8"))
    asked = [[node["context"], node["query"]] for node in nodes if node["query"]]
    assert list(itertools.chain.from_iterable(queries.values())) == asked
    kept, dropped = lines(results / "sft_origins.jsonl"), lines(results / "dropped_queries.jsonl")
    ids = [row["id"] for row in (*kept, *dropped)]
    assert len(ids) == len(set(ids)) == len(asked) + 1
    pairs = datasets.load_from_disk(results / "sft_data").to_list()
    assert [pair["question"] for pair in pairs] == [row["question"] for row in kept]
    assert len(datasets.load_from_disk(results / "outputs")) == 4
    for text in (*(pair["answer"] for pair in pairs), *(query for _, query in asked)):
        assert text.strip() and disarm(text) == text == clean(text)
    assert ends_well(run("export.py", "--results", results, "--format", "messages", "--with-context"))
    assert ends_well(run("report.py", "--results", results))
    if seed > 1:  # DeepSpeed takes its time
        make_tiny_model(tmp_path / "tiny", [pair["answer"] for pair in pairs], 400)
        assert ends_well(run("finetune.py", "--results", results, "--model", tmp_path / "tiny", "--dry-run"))
