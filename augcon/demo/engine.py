"""The demonstration engine: an OpenAI-compatible server that answers AugCon's prompts by rules.

It lets people without a GPU run the real scripts on their own corpus. It is not a language model: what it
writes shows the form of AugCon's data, not its quality.
"""

import argparse
import asyncio
import json
import math
import sys
import time
from typing import Any

from aiohttp import web

from augcon.demo.rules import reply_to
from augcon.text.prompts import load_prompts
from augcon.text.units import length, units

MODEL = "augcon-demo-not-an-llm"
COLD = 0.3  # temperature below which the seed makes no difference


class RequestError(Exception):
    """What is wrong with a request: the message, the field or None, and OpenAI's code for that or None."""


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and isinstance(value.get("role"), str) and isinstance(value.get("content"), str)


_CHECKS = {  # of values other than null
    "model": lambda value: isinstance(value, str),
    "messages": lambda value: isinstance(value, list) and value and all(map(_is_message, value)),
    "prompt": lambda value: isinstance(value, str),
    "stop": lambda value: (
        isinstance(value, str | list) and value != "" and all(isinstance(mark, str) and mark for mark in value)
    ),
    "seed": lambda value: type(value) is int,
    "temperature": lambda value: type(value) in (int, float) and 0 <= value < math.inf,
    "max_tokens": lambda value: type(value) is int and value > 0,
    "max_completion_tokens": lambda value: type(value) is int and value > 0,
    "n": lambda value: type(value) is int and value == 1,
    "stream": lambda value: value is False,
}


async def _body(request: web.Request, needed: str) -> dict[str, Any]:
    """The request's fields other than null. Raises RequestError where they are amiss."""
    try:
        given = json.loads(await request.read()).items()
    except (ValueError, AttributeError, RecursionError, web.RequestPayloadError) as error:
        raise RequestError(f"the body is not a JSON object: {error}", None, None) from error
    body = {name: value for name, value in given if value is not None}
    for name, fits in _CHECKS.items():
        if not fits(body[name]) if name in body else name in ("model", needed):
            raise RequestError(f"'{name}' is missing, malformed, or nothing for the demonstration engine", name, None)
    if body["model"] != MODEL:
        raise RequestError(f"The model `{body['model']}` does not exist.", "model", "model_not_found")
    return body


def cut(reply: str, stops: list[str], max_tokens: int | None) -> tuple[str, str, int]:
    """What a model would have written up to a stop string or the limit, the finish reason, the tokens."""
    reply = reply[: min((at for stop in stops if (at := reply.find(stop)) >= 0), default=len(reply))]
    tokens = length(reply)
    if max_tokens is not None and tokens > max_tokens:
        return "".join(units(reply)[:max_tokens]), "length", max_tokens
    return reply, "stop", tokens


class Engine:
    """The endpoints, and what ``/metrics`` counts; every reply takes ``latency`` seconds."""

    def __init__(self, latency: float) -> None:
        self.latency = latency
        self.running = self.requests = self.prompt_tokens = self.generation_tokens = 0

    async def complete(self, request: web.Request) -> web.Response:
        """POST /v1/chat/completions and /v1/completions."""
        chat = "chat" in request.path
        body = await _body(request, "messages" if chat else "prompt")
        self.running += 1
        try:
            seed = body.get("seed") if body.get("temperature", 1) >= COLD else None
            reply = reply_to(body["messages" if chat else "prompt"], seed)
            await asyncio.sleep(self.latency)
        finally:
            self.running -= 1
        limit = min((body[name] for name in ("max_tokens", "max_completion_tokens") if name in body), default=None)
        stops = [body["stop"]] if isinstance(body.get("stop"), str) else body.get("stop", [])
        written, finish, tokens = cut(reply.text, stops, limit)
        self.requests += 1
        self.prompt_tokens += reply.prompt_tokens
        self.generation_tokens += tokens
        choice = {"message": {"role": "assistant", "content": written}} if chat else {"text": written}
        usage = {"prompt_tokens": reply.prompt_tokens, "completion_tokens": tokens}
        response = {"id": f"augcon-{reply.identity}", "object": "chat.completion" if chat else "text_completion"}
        response |= {"created": int(time.time()), "model": MODEL, "system_fingerprint": "augcon-not-a-language-model"}
        response["choices"] = [{"index": 0, **choice, "logprobs": None, "finish_reason": finish}]
        return _json(response | {"usage": {**usage, "total_tokens": sum(usage.values())}})

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models, and /health."""
        owner = "augcon demonstration rules, not a language model"
        model = {"id": MODEL, "object": "model", "created": int(time.time()), "owned_by": owner}
        return _json({"object": "list", "data": [model]})

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics, under vLLM's names."""
        figures = {"num_requests_running": self.running, "num_requests_waiting": 0, "kv_cache_usage_perc": 0}
        figures |= {"prompt_tokens_total": self.prompt_tokens, "generation_tokens_total": self.generation_tokens}
        figures |= {"request_success_total": self.requests}
        page = "".join(f'vllm:{name}{{model_name="{MODEL}"}} {value}\n' for name, value in figures.items())
        return web.Response(text=page, headers={"Content-Type": "text/plain; version=0.0.4"})


def _json(content: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(content).encode(), status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Every error in OpenAI's shape."""
    try:
        return await handler(request)
    except RequestError as error:
        message, param, code = error.args
        status = 404 if code else 400
    except web.HTTPException as error:  # no such path, method not allowed, body too large
        status, message, param, code = error.status, error.text, None, None
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return _json({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


def main() -> None:
    """Serves until SIGINT or SIGTERM."""
    about = "Answers AugCon's prompts by rules over OpenAI's API. It is NOT a language model."
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on")
    parser.add_argument("--port", default=8000, type=int, help="port to listen on")
    parser.add_argument("--latency", default=0.0, type=float, help="seconds that every reply takes")
    options = parser.parse_args()
    engine = Engine(options.latency)
    app = web.Application(middlewares=[_errors], client_max_size=64 * 2**20)
    reads = {"/v1/models": engine.models, "/health": engine.models, "/metrics": engine.metrics}
    app.add_routes([web.get(path, handler) for path, handler in reads.items()])
    app.add_routes([web.post(f"/v1/{path}completions", engine.complete) for path in ("", "chat/")])
    reply_to(load_prompts("zh").cst_messages("预热。"), None)  # loads what the first request would wait for
    where = {"host": options.host, "port": options.port, "backlog": 1024, "shutdown_timeout": 1.0}
    says = f"{about} Model: {MODEL} at http://{options.host}:{options.port}/v1"
    try:
        web.run_app(app, **where, access_log=None, auto_decompress=False, print=lambda _: print(says, flush=True))
    except (OSError, OverflowError) as error:
        sys.exit(f"cannot listen there; see --host, --port: {error}")


if __name__ == "__main__":
    main()
