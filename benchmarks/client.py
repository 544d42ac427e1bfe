"""CPU time of a call: AugCon's client side by side with the OpenAI client as it comes.

Sends the same tree prompts to the demonstration engine, 64 at a time, through the OpenAI client's typed method over
its default transport and over aiohttp, and through AugCon's client (limits, retries and the store included).

    python benchmarks/client.py [--calls 2000]
"""

import argparse
import asyncio
import dataclasses
import sys
import tempfile
import time
from collections.abc import Awaitable, Callable
from pathlib import Path

import openai

ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

from conftest import demo_engine  # noqa: E402

from augcon.data import Request  # noqa: E402
from augcon.llm.client import LLM, Endpoint  # noqa: E402
from augcon.llm.store import Store  # noqa: E402
from augcon.method.contexts import split_article  # noqa: E402
from augcon.ordered import map_in_order  # noqa: E402
from augcon.run.rows import read_column  # noqa: E402
from augcon.text.prompts import load_prompts  # noqa: E402

IN_FLIGHT = 64


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--calls", type=int, default=2000)
    calls = parser.parse_args().calls
    contexts = [
        context for article in read_column(str(ROOT / "DailyM"), "article") for context in split_article(article, 500)
    ]
    prompts = load_prompts("zh")
    requests = [Request(prompts.cst_messages(contexts[n % len(contexts)]), 0.85, 1024, sample=n) for n in range(calls)]
    engine = demo_engine()
    try:
        asyncio.run(compare(engine.api, requests))
    finally:
        engine.stop()


async def compare(api: str, requests: list[Request]) -> None:
    print("| client | CPU a call | of the first |\n|---|---|---|")
    first = None
    for name, transport in (
        ("OpenAI, typed, default transport", None),
        ("OpenAI, typed, aiohttp", openai.DefaultAioHttpClient()),
    ):
        async with openai.AsyncOpenAI(base_url=api, api_key="-", http_client=transport) as client:
            milliseconds = await measure(lambda request, client=client: typed(client, request), requests)
        first = first or milliseconds
        print(f"| {name} | {milliseconds:.2f} ms | {milliseconds / first:.2f} |")
    with tempfile.TemporaryDirectory() as folder, Store(Path(folder) / "replies.sqlite") as store:
        async with LLM(Endpoint(api, max_in_flight=IN_FLIGHT), store) as llm:
            await llm.connect("any")
            milliseconds = await measure(llm.ask, requests)
    print(f"| AugCon, with retries and store | {milliseconds:.2f} ms | {milliseconds / first:.2f} |")


async def typed(client: openai.AsyncOpenAI, request: Request) -> None:
    await client.chat.completions.create(
        model="augcon-demo-not-an-llm",
        messages=request.messages,
        temperature=request.temperature,
        max_tokens=request.max_tokens,
        seed=request.sample,
    )


async def measure(call: Callable[[Request], Awaitable[object]], requests: list[Request]) -> float:
    """Milliseconds of CPU a call, this process alone; some calls to warm up come first."""
    warm = [dataclasses.replace(request, sample=-1 - n) for n, request in enumerate(requests[:100])]
    async for _ in map_in_order(call, warm, lambda: IN_FLIGHT):
        pass
    started = time.process_time()
    async for _ in map_in_order(call, requests, lambda: IN_FLIGHT):
        pass
    return 1000 * (time.process_time() - started) / len(requests)


if __name__ == "__main__":
    main()
