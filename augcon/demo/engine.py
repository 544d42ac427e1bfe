"""The demonstration engine: an OpenAI-compatible server that answers AugCon's prompts by rules.

It lets people without a GPU run the real scripts on their own corpus. It is not a language model: what it
writes shows the form of AugCon's data, not its quality. The rules are in ``demo_rules/``.

    python -m augcon.demo.engine [--host 127.0.0.1] [--port 8000] [--latency SECONDS]
"""

import argparse
import asyncio
import errno
import json
import logging
import math
import signal
import sys
import time
from typing import Any

from aiohttp import web

from augcon.demo import rules as demo_rules
from augcon.demo.rules import Message
from augcon.text.units import length, units

MODEL = "augcon-demo-not-an-llm"
OWNER = "augcon demonstration rules, not a language model"
FINGERPRINT = "augcon-demonstration-rules-not-a-language-model"
ROLES = ("system", "developer", "user", "assistant")
LARGEST_BODY = 64 * 2**20
LONG_PROMPT = 200_000  # characters from which a reply is made in a thread, so that others need not wait

log = logging.getLogger("augcon.demo.engine")


class RequestError(Exception):
    """What is wrong with a request, in the terms of OpenAI's API."""

    def __init__(self, message: str, param: str | None = None, code: str | None = None) -> None:
        super().__init__(message)
        self.param, self.code = param, code
        self.status = 404 if code == "model_not_found" else 400


# Requests


async def _body(request: web.Request) -> dict[str, Any]:
    """The request's JSON object. Raises RequestError if it is none, or asks for what is not served."""
    try:
        body = json.loads(await request.read())
    except (ValueError, RecursionError, web.RequestPayloadError) as error:
        raise RequestError(f"the body is not valid JSON: {error}") from error
    if not isinstance(body, dict):
        raise RequestError("the body must be a JSON object")
    model = body.get("model")
    if not isinstance(model, str):
        raise RequestError("'model' must be a string", "model")
    if model != MODEL:
        raise RequestError(f"The model `{model}` does not exist.", "model", "model_not_found")
    if body.get("stream") not in (None, False):
        raise RequestError("the demonstration engine does not stream; leave 'stream' out", "stream")
    if body.get("n") is not None and (type(body["n"]) is not int or body["n"] != 1):
        raise RequestError("'n' must be 1", "n")
    return body


def _messages(body: dict[str, Any]) -> list[Message]:
    messages = body.get("messages")
    if not isinstance(messages, list) or not messages:
        raise RequestError("'messages' must be a list of at least one message", "messages")
    for number, message in enumerate(messages):
        where = f"messages[{number}]"
        if not isinstance(message, dict):
            raise RequestError(f"'{where}' must be an object", where)
        if message.get("role") not in ROLES:
            raise RequestError(f"'{where}.role' must be one of {', '.join(ROLES)}", f"{where}.role")
        if not isinstance(message.get("content"), str):
            raise RequestError(f"'{where}.content' must be a string", f"{where}.content")
    return messages


def _stops(body: dict[str, Any]) -> list[str]:
    stop = body.get("stop")
    stops = [] if stop is None else [stop] if isinstance(stop, str) else stop
    if not isinstance(stops, list) or not all(isinstance(mark, str) and mark for mark in stops):
        raise RequestError("'stop' must be a string or a list of strings, none of them empty", "stop")
    return stops


def _max_tokens(body: dict[str, Any]) -> int | None:
    limits = []
    for field in ("max_tokens", "max_completion_tokens"):
        limit = body.get(field)
        if limit is None:
            continue
        if type(limit) is not int or limit < 1:
            raise RequestError(f"'{field}' must be a whole number of at least 1", field)
        limits.append(limit)
    return min(limits, default=None)


def _seed(body: dict[str, Any]) -> int | None:
    """The seed, or None where the temperature is so low that samples hardly differ."""
    seed, temperature = body.get("seed"), body.get("temperature")
    if seed is not None and type(seed) is not int:
        raise RequestError("'seed' must be a whole number", "seed")
    if temperature is None:
        return seed
    if type(temperature) not in (int, float) or not math.isfinite(temperature) or temperature < 0:
        raise RequestError("'temperature' must be a number of at least 0", "temperature")
    return seed if temperature >= demo_rules.COLD else None


# Replies


def cut(reply: str, stops: list[str], max_tokens: int | None) -> tuple[str, str, int]:
    """What a model would have written up to a stop string or the limit, the finish reason, the tokens."""
    end = min((at for stop in stops if (at := reply.find(stop)) >= 0), default=len(reply))
    reply = reply[:end]
    tokens = length(reply)
    if max_tokens is not None and tokens > max_tokens:
        return "".join(units(reply)[:max_tokens]), "length", max_tokens
    return reply, "stop", tokens


class Engine:
    """The endpoints, and what ``/metrics`` counts."""

    def __init__(self, latency: float = 0.0) -> None:
        self.latency = latency
        self.started = int(time.time())
        self.running = self.requests = self.prompt_tokens = self.generation_tokens = 0

    async def chat(self, request: web.Request) -> web.Response:
        """POST /v1/chat/completions."""
        body = await _body(request)
        reply, finish, response = await self._complete(_messages(body), body)
        message = {"role": "assistant", "content": reply}
        choice = {"index": 0, "message": message, "logprobs": None, "finish_reason": finish}
        return _json(response | {"object": "chat.completion", "choices": [choice]})

    async def complete(self, request: web.Request) -> web.Response:
        """POST /v1/completions."""
        body = await _body(request)
        prompt = body.get("prompt")
        if not isinstance(prompt, str):
            raise RequestError("'prompt' must be a string", "prompt")
        reply, finish, response = await self._complete(prompt, body)
        choice = {"index": 0, "text": reply, "logprobs": None, "finish_reason": finish}
        return _json(response | {"object": "text_completion", "choices": [choice]})

    async def _complete(self, prompt: list[Message] | str, body: dict[str, Any]) -> tuple[str, str, dict]:
        """The reply, its finish reason, and what the responses of both endpoints have in common."""
        stops, limit, seed = _stops(body), _max_tokens(body), _seed(body)
        due = time.monotonic() + self.latency
        self.running += 1
        try:
            size = len(prompt) if isinstance(prompt, str) else sum(len(turn["content"]) for turn in prompt)
            work = (prompt, stops, limit, seed)
            written = await asyncio.to_thread(_write, *work) if size > LONG_PROMPT else _write(*work)
            if self.latency:
                await asyncio.sleep(due - time.monotonic())
        finally:
            self.running -= 1
        reply, finish, tokens, prompt_tokens, identity = written
        self.requests += 1
        self.prompt_tokens += prompt_tokens
        self.generation_tokens += tokens
        usage = {"prompt_tokens": prompt_tokens, "completion_tokens": tokens}
        response = {"id": f"augcon-{identity}", "created": int(time.time()), "model": MODEL}
        response |= {"system_fingerprint": FINGERPRINT, "usage": usage}
        usage["total_tokens"] = prompt_tokens + tokens
        return reply, finish, response

    async def models(self, _: web.Request) -> web.Response:
        """GET /v1/models."""
        model = {"id": MODEL, "object": "model", "created": self.started, "owned_by": OWNER}
        return _json({"object": "list", "data": [model]})

    async def health(self, _: web.Request) -> web.Response:
        """GET /health."""
        return web.Response()

    async def metrics(self, _: web.Request) -> web.Response:
        """GET /metrics, under vLLM's names."""
        figures = [
            ("num_requests_running", "gauge", self.running),
            ("num_requests_waiting", "gauge", 0),
            ("kv_cache_usage_perc", "gauge", 0),
            ("prompt_tokens_total", "counter", self.prompt_tokens),
            ("generation_tokens_total", "counter", self.generation_tokens),
            ("request_success_total", "counter", self.requests),
        ]
        page = "".join(
            f'# TYPE vllm:{name} {kind}\nvllm:{name}{{model_name="{MODEL}"}} {value}\n' for name, kind, value in figures
        )
        return web.Response(text=page, headers={"Content-Type": "text/plain; version=0.0.4"})


def _write(
    prompt: list[Message] | str, stops: list[str], limit: int | None, seed: int | None
) -> tuple[str, str, int, int, str]:
    reply = demo_rules.reply_to(prompt, seed)
    return *cut(reply.text, stops, limit), reply.prompt_tokens, reply.identity


def _json(content: dict[str, Any], status: int = 200) -> web.Response:
    return web.Response(body=json.dumps(content).encode(), status=status, content_type="application/json")


@web.middleware
async def _errors(request: web.Request, handler: Any) -> web.StreamResponse:
    """Every error in OpenAI's shape."""
    try:
        return await handler(request)
    except RequestError as error:
        status, message, param, code = error.status, str(error), error.param, error.code
    except web.HTTPException as error:  # no such path, method not allowed, body too large
        status, message, param, code = error.status, error.text or error.reason, None, None
    kind = "NotFoundError" if status == 404 else "BadRequestError"
    return _json({"error": {"message": message, "type": kind, "param": param, "code": code}}, status)


# Server


def application(latency: float = 0.0) -> web.Application:
    """The server's application; every reply takes ``latency`` seconds."""
    engine = Engine(latency)
    app = web.Application(middlewares=[_errors], client_max_size=LARGEST_BODY)
    app.router.add_post("/v1/chat/completions", engine.chat)
    app.router.add_post("/v1/completions", engine.complete)
    app.router.add_get("/v1/models", engine.models)
    app.router.add_get("/health", engine.health)
    app.router.add_get("/metrics", engine.metrics)
    return app


async def serve(host: str, port: int, latency: float) -> None:
    """Serves until SIGINT or SIGTERM. Raises OSError when the address cannot be had."""
    stop = asyncio.Event()
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    runner = web.AppRunner(application(latency), access_log=None, auto_decompress=False, shutdown_timeout=1.0)
    await runner.setup()
    try:
        await web.TCPSite(runner, host, port, backlog=1024).start()
        demo_rules.warm_up()
        address, number = runner.addresses[0][:2]
        address = f"[{address}]" if ":" in address else address
        log.info("AugCon's demonstration engine: it answers by rules and is NOT a language model.")
        log.info("Model %s at http://%s:%d/v1", MODEL, address, number)
        await stop.wait()
    finally:
        await runner.cleanup()


def main(arguments: list[str] | None = None) -> int:
    """Runs the server; returns its exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m augcon.demo.engine",
        description="Answers AugCon's prompts by rules over OpenAI's API. It is not a language model.",
    )
    parser.add_argument("--host", default="127.0.0.1", help="address to listen on (default: %(default)s)")
    parser.add_argument("--port", default=8000, type=int, help="port to listen on (default: %(default)s)")
    parser.add_argument("--latency", default=0.0, type=float, help="seconds that every reply takes (default: 0)")
    options = parser.parse_args(arguments)
    if not (math.isfinite(options.latency) and options.latency >= 0):
        parser.error("--latency must be a number of seconds, at least 0")
    if not 0 <= options.port <= 65535:
        parser.error("--port must be between 0 and 65535")
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    try:
        asyncio.run(serve(options.host, options.port, options.latency))
    except OSError as error:
        reason = "the port is in use" if error.errno == errno.EADDRINUSE else error.strerror or error
        print(f"cannot listen on {options.host}:{options.port}: {reason}; see --host, --port", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
