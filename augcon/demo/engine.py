"""The demonstration engine: a server with as much of OpenAI's API as AugCon's client uses, answering by rules.

It lets people without a GPU run the real scripts on their own corpus. It is not a language model: what it writes shows
the form of AugCon's data, not its quality.
"""

import argparse
import asyncio
import os
import secrets
import sys
import time
from typing import Any

from aiohttp import web
from aiohttp.typedefs import Handler
from pydantic import AliasChoices, BaseModel, Field, ValidationError

from augcon.data import Message
from augcon.demo.rules import reply_to
from augcon.errors import one_line
from augcon.text.prompts import as_text, load_prompts
from augcon.text.units import length, units

MODEL = "augcon-demo-not-an-llm"
COLD = 0.3  # temperature below which the seed makes no difference


class Asked(BaseModel):
    """What AugCon's client asks for, in either endpoint's form. Other fields make no difference."""

    model: str
    prompt: list[Message] | str = Field(validation_alias=AliasChoices("messages", "prompt"), min_length=1)
    temperature: float = 1
    seed: int | None = None
    max_tokens: int | None = None
    stop: list[str] = []


def cut(reply: str, stops: list[str], max_tokens: int | None) -> tuple[str, str, int]:
    """What a model would have written up to a stop string or the limit, the finish reason, the tokens."""
    reply = reply[: min((at for stop in stops if (at := reply.find(stop)) >= 0), default=len(reply))]
    tokens = length(reply)
    if max_tokens is not None and tokens > max_tokens:
        return "".join(units(reply)[:max_tokens]), "length", max_tokens
    return reply, "stop", tokens


class Engine:
    """The endpoints, and what ``/metrics`` counts; ``slots`` replies at once take ``latency`` seconds each."""

    def __init__(self, latency: float, slots: int) -> None:
        self.latency = latency
        self.slots = asyncio.Semaphore(slots)
        self.running = self.waiting = self.requests = 0

    async def complete(self, request: web.Request) -> web.Response:
        """POST /v1/chat/completions and /v1/completions."""
        chat = "chat" in request.path
        asked = Asked.model_validate_json(await request.read())
        if asked.model != MODEL:
            raise web.HTTPNotFound(text=f"The model `{asked.model}` does not exist.")
        self.waiting += 1
        try:
            async with self.slots:
                self.waiting, self.running = self.waiting - 1, self.running + 1
                try:
                    reply = reply_to(asked.prompt, asked.seed if asked.temperature >= COLD else None)
                    await asyncio.sleep(self.latency)
                finally:
                    self.waiting, self.running = self.waiting + 1, self.running - 1
        finally:
            self.waiting -= 1
        self.requests += 1
        written, finish, tokens = cut(reply, asked.stop, asked.max_tokens)
        choice = {"message": {"role": "assistant", "content": written}} if chat else {"text": written}
        prompt = asked.prompt if isinstance(asked.prompt, str) else as_text(asked.prompt)
        usage = {"prompt_tokens": length(prompt), "completion_tokens": tokens}
        response = {
            "id": f"augcon-{self.requests}",
            "object": "chat.completion" if chat else "text_completion",
            "created": int(time.time()),
            "model": MODEL,
            "system_fingerprint": "augcon-not-a-language-model",
            "choices": [{"index": 0, **choice, "finish_reason": finish}],
            "usage": {**usage, "total_tokens": sum(usage.values())},
        }
        return web.json_response(response)

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models, and /health."""
        owner = "augcon demonstration rules, not a language model"
        model = {"id": MODEL, "object": "model", "created": int(time.time()), "owned_by": owner}
        return web.json_response({"object": "list", "data": [model]})

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics, under vLLM's names."""
        figures = {
            "num_requests_running": self.running,
            "num_requests_waiting": self.waiting,
            "request_success_total": self.requests,
        }
        return web.Response(text="".join(f'vllm:{name}{{model_name="{MODEL}"}} {n}\n' for name, n in figures.items()))


@web.middleware
async def _guard(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Refuses who does not bear VLLM_API_KEY, if that is set."""
    given, key = request.headers.get("Authorization", ""), os.environ.get("VLLM_API_KEY")
    if key and request.path.startswith("/v1/") and not secrets.compare_digest(given.encode(), f"Bearer {key}".encode()):
        raise web.HTTPUnauthorized
    return await handler(request)


@web.middleware
async def _errors(request: web.Request, handler: Handler) -> web.StreamResponse:
    """Every error in OpenAI's shape."""
    try:
        return await handler(request)
    except ValidationError as error:
        status, message = 400, one_line(error)
    except web.HTTPException as error:  # no such path or model, method not allowed, body too large
        status, message = error.status, error.text or error.reason
    described = {"message": message, "type": "invalid_request_error", "param": None, "code": None}
    return web.json_response({"error": described}, status=status)


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    about = "Answers AugCon's prompts by rules over OpenAI's API. It is NOT a language model."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", default=8000, type=int, help="port to listen on")
    parser.add_argument("--latency", default=0.0, type=float, help="seconds that every reply takes")
    parser.add_argument("--slots", default=256, type=int, help="replies under way at once; others wait")
    options = parser.parse_args()
    engine = Engine(options.latency, options.slots)
    app = web.Application(middlewares=[_errors, _guard], client_max_size=64 * 2**20)
    reads = {"/v1/models": engine.models, "/health": engine.models, "/metrics": engine.metrics}
    app.add_routes([web.get(path, handler) for path, handler in reads.items()])
    app.add_routes([web.post(f"/v1/{path}completions", engine.complete) for path in ("", "chat/")])
    reply_to(load_prompts("zh").cst_messages("预热。"), None)  # loads what the first request would wait for
    says = f"{about} Model: {MODEL} at http://{options.host}:{options.port}/v1"
    where: dict[str, Any] = {"host": options.host, "port": options.port, "backlog": 1024, "shutdown_timeout": 1}
    try:
        web.run_app(app, **where, access_log=None, print=lambda _: print(says, flush=True))
    except (OSError, OverflowError) as error:
        sys.exit(f"error: cannot listen there; see --host, --port: {error}")


if __name__ == "__main__":
    main()
