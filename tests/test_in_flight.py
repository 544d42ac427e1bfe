"""How many requests are in flight, against servers of known capacity on a clock that leaps (see simulation.py)."""

import asyncio
import contextlib
import dataclasses
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterable
from pathlib import Path
from typing import Any

import openai
import pytest
from conftest import Engine
from pydantic import SecretStr
from simulation import Fixed, SlotServer, now, replace_servers, simulate, spread

from augcon.data import Reply, Request
from augcon.errors import UserError
from augcon.llm.client import LLM, Endpoint
from augcon.llm.limit import START, figures
from augcon.llm.servers import Server
from augcon.llm.store import Store
from augcon.ordered import map_in_order

IN_MEMORY = Path(":memory:")
NEVER = float("inf")


def request(number: int, root: int | None = None) -> Request:
    return Request([{"role": "user", "content": f"question {number}"}], 0.5, 4096, root=root)


@contextlib.asynccontextmanager
async def client(*fakes: SlotServer, **changes: Any) -> AsyncIterator[LLM]:
    """The real client of such servers."""
    api_base = ",".join(f"http://server-{n}/v1" for n in range(len(fakes)))
    with Store(IN_MEMORY) as store:
        async with LLM(Endpoint(api_base, **changes), store) as llm:
            replace_servers(llm, *fakes)
            yield llm


@dataclasses.dataclass
class Run:
    """When each reply came, the limits second by second, and the counts."""

    ends: list[float]
    limits: list[int]
    counts: Counter[str]

    @property
    def seconds(self) -> float:
        return self.ends[-1]

    def rate(self, since: float, until: float) -> float:
        """Replies a second."""
        return sum(since <= end < until for end in self.ends) / (until - since)


async def ask_all(fake: SlotServer, number: int, fixed: int = 0, **changes: Any) -> Run:
    """Asks for so many replies, with the limit that follows the server or a fixed one."""
    ends: list[float] = []
    limits: list[int] = []

    async def watch() -> None:
        while True:
            limits.append(llm.servers.all[0].limit.value)
            await asyncio.sleep(1)

    async def ask(asked: Request) -> Reply:
        reply = await llm.ask(asked)
        ends.append(now())
        return reply

    async with client(fake, **changes) as llm:
        if fixed:
            Fixed.at(fixed, llm.servers.all[0])
        watching = asyncio.create_task(watch())
        numbers = [item async for item, _ in map_in_order(ask, map(request, range(number)), llm.servers.room)]
        watching.cancel()
        assert numbers == [request(n) for n in range(number)]
    return Run(ends, limits, llm.counts)


def steady(slots: int, mean: float, tells: bool = True) -> SlotServer:
    return SlotServer(lambda _: slots, lambda asked: spread(asked, mean), tells)


@pytest.mark.parametrize(("slots", "mean"), [(4, 10), (32, 2), (64, 1)])
def test_without_tuning_a_server_is_as_busy_as_with_the_best_fixed_number(slots: int, mean: float):
    number = 60 * slots
    best = simulate(ask_all(steady(slots, mean), number, fixed=slots + slots // 8 + 1))
    for tells in (True, False):
        fake = steady(slots, mean, tells)
        run = simulate(ask_all(fake, number))
        assert best.seconds / run.seconds > 0.9, f"tells: {tells}"
        assert not fake.given_up and not [kind for kind in run.counts if kind.startswith("retries")]
        assert tells is False or max(run.limits[10:]) < 1.5 * slots + START  # the queue is short


@pytest.mark.parametrize("tells", [True, False])
@pytest.mark.parametrize(("before", "after"), [(256, 32), (32, 256)])
def test_the_limit_follows_a_server_that_changes_in_the_middle_of_a_run(before: int, after: int, tells: bool):
    fake = SlotServer(lambda t: before if t < 30 else after, lambda asked: spread(asked, 2), tells)
    run = simulate(ask_all(fake, 4_400))
    assert run.rate(20, 30) > 0.9 * before / 2
    assert run.rate(45, 55) > 0.9 * after / 2
    assert not fake.given_up


@pytest.mark.parametrize("tells", [True, False])
def test_a_server_far_slower_than_expected_loses_no_request_to_its_queue(tells: bool):
    """800 requests for 4 slots of 10 seconds: a fixed 256 lose the last of each wave to the time-out."""
    fake = steady(4, 10, tells)
    run = simulate(ask_all(fake, 800))
    assert not fake.given_up and run.counts["calls"] == 800
    old = steady(4, 10)
    simulate(ask_all(old, 400, fixed=256))
    assert old.given_up > 100


def hard(asked: str, tries: Counter[str], long: int) -> float:
    """0.3% never come when asked first; of the others, 1% take ``long`` times as long."""
    tries[asked] += 1
    place = int(1000 * spread(f"place {asked}", 1) - 500)
    if place < 3 and tries[asked] == 1:
        return NEVER
    return spread(asked, 1) * (long if 10 <= place < 20 else 1)


@pytest.mark.parametrize("tells", [True, False])
def test_neither_lost_nor_long_replies_keep_a_server_from_being_busy(tells: bool):
    tries, others = Counter[str](), Counter[str]()
    easy = steady(64, 1, tells)
    without = simulate(ask_all(easy, 3_000, request_timeout=60))
    lossy = SlotServer(lambda _: 64, lambda asked: hard(asked, tries, long=1), tells)
    lost = simulate(ask_all(lossy, 3_000, request_timeout=60))
    assert lost.counts["retries: timeout"] == sum(times > 1 for times in tries.values()) >= 5
    assert without.seconds / lost.seconds > 0.9  # also the end, where the last are lost
    both = SlotServer(lambda _: 64, lambda asked: hard(asked, others, long=40), tells)
    run = simulate(ask_all(both, 3_000, request_timeout=120))
    until = run.ends[int(0.95 * len(run.ends))]  # what began last cannot be hurried
    assert both.busy / 64 > 0.9 * until


def test_a_request_that_is_taken_for_lost_too_early_is_asked_once_more_and_never_given_up():
    """The last one takes three times as long as any before it."""
    last = "question 299"
    fake = SlotServer(lambda _: 64, lambda asked: 6 if last in asked else spread(asked, 1.3))
    run = simulate(ask_all(fake, 300))
    assert run.counts["calls"] == 301 and run.counts["retries: timeout"] == 1


def test_a_bound_on_requests_in_flight_is_kept():
    fake = steady(256, 1)
    most = 0

    async def main() -> None:
        nonlocal most
        async with client(fake, max_in_flight=10) as llm:
            async for _ in map_in_order(llm.ask, map(request, range(500)), llm.servers.room):
                most = max(most, fake.running)

    simulate(main())
    assert most == 10


class RateLimited(SlotServer):
    """Refuses, with status 429, what goes beyond its slots."""

    refused = 0

    async def post(self, path: str, *, body: dict[str, Any], cast_to: type[str]) -> str:
        if self.running >= self.slots(now()):
            self.refused += 1
            raise status(429)
        return await super().post(path, body=body, cast_to=cast_to)


ASKED = openai.DefaultHttpxClient().build_request("POST", "http://server-0/v1/chat/completions")


def status(code: int) -> openai.APIStatusError:
    """What the OpenAI client raises."""
    kind = openai.RateLimitError if code == 429 else openai.InternalServerError
    response = type("Response", (), {"status_code": code, "headers": {}, "request": ASKED})()
    return kind("no", response=response, body=None)


def test_where_too_much_is_refused_less_is_sent():
    fake = RateLimited(lambda _: 40, lambda asked: spread(asked, 1), tells=False)
    run = simulate(ask_all(fake, 2_400))
    assert run.rate(10, 50) > 0.8 * 40
    assert fake.refused < 0.2 * 2_400


def test_the_figures_of_all_engines_are_added_up():
    text = """# HELP vllm:num_requests_running Number of requests in model execution batches.
vllm:num_requests_running{engine="0",model_name="m"} 3.0
vllm:num_requests_running{engine="1",model_name="m"} 4.0
vllm:num_requests_waiting{engine="0",model_name="m"} 1.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="m",reason="capacity"} 1.0
vllm:num_preemptions_total{engine="0",model_name="m"} 2.0
vllm:num_preemptions_created{engine="0",model_name="m"} 1.79e+09
python_gc_objects_collected_total{generation="0"} 10.0
"""
    read = figures(text)
    assert (read["num_requests_running"], read["num_requests_waiting"], read["num_preemptions"]) == (7, 1, 2)
    assert figures("<html>404</html>") == {}


@pytest.mark.parametrize("end", ["/v1", "/v1/", "/", ""])
def test_the_figures_of_a_server_are_found_beside_its_api(engine: Engine, end: str):
    async def main() -> dict[str, float]:
        server = Server(engine.address + end, SecretStr("EMPTY"), most=1, timeout=10)
        try:
            return await server.read_figures()
        finally:
            await server.client.close()

    assert {"num_requests_running", "num_requests_waiting"} <= asyncio.run(main()).keys()


# Several servers


async def ask_several(fakes: Iterable[SlotServer], number: int, roots: Callable[[int], int | None]) -> LLM:
    async with client(*fakes, server_wait=30) as llm:
        asked = (request(n, roots(n)) for n in range(number))
        async for _ in map_in_order(llm.ask, asked, llm.servers.room):
            pass
    return llm


class Watched(SlotServer):
    """Notes what it is asked, and is out of order from ``down`` to ``up`` on the clock."""

    def __init__(self, slots: int, down: float = NEVER, up: float = NEVER, mean: float = 1) -> None:
        super().__init__(lambda _: slots, lambda asked: spread(asked, mean))
        self.down, self.again = down, up
        self.asked: list[tuple[float, str]] = []

    async def post(self, path: str, *, body: dict[str, Any], cast_to: type[str]) -> str:
        self.asked.append((now(), body["messages"][-1]["content"]))
        if self.down <= now() < self.again:
            raise status(500)
        return await super().post(path, body=body, cast_to=cast_to)


def test_several_servers_get_as_much_as_each_can_take():
    small, large = Watched(8), Watched(64)
    simulate(ask_several([small, large], 2_000, lambda n: n // 10))
    assert small.busy / 8 == pytest.approx(large.busy / 64, rel=0.1)


def test_what_is_asked_about_one_root_context_goes_to_one_server():
    one, other = Watched(16), Watched(16)
    simulate(ask_several([one, other], 2_000, lambda n: n // 10))
    seen = [{int(text.split()[1]) // 10 for _, text in fake.asked} for fake in (one, other)]
    assert len(seen[0] & seen[1]) < 0.3 * 200


def test_a_server_that_dies_is_left_out_until_it_is_back(capsys: pytest.CaptureFixture[str]):
    sound, frail = Watched(16), Watched(16, down=20, up=60)
    llm = simulate(ask_several([sound, frail], 3_000, lambda n: n))
    away = [text for at, text in frail.asked if 22 <= at < 60]
    assert set(away) == {"1"} and 30 <= len(away) <= 40  # a probe a second, and nothing else
    back = [text for at, text in frail.asked if 60 <= at < 62 and text != "1"]
    assert len(back) >= 16  # at once as much as before
    assert llm.counts["retries: status 500"] <= 2 * 20  # what was under way
    printed = capsys.readouterr().out
    assert "server-1/v1 has not answered since" in printed and "the others go on" in printed
    assert "answers again" in printed


def test_servers_that_are_all_gone_for_too_long_end_the_run_in_one_line():
    fakes = Watched(16, down=20), Watched(16, down=30)
    with pytest.raises(UserError, match=r"has not answered for .* no reply is lost") as caught:
        simulate(ask_several(fakes, 3_000, lambda n: n))
    assert "\n" not in str(caught.value)
