"""Fakes of the servers and services that people use: each takes, refuses and says what the real one is known to.

None of them is the real thing, nor is any LLM behind them: in-process on loopback, they answer by the demonstration's
rules. They were built after what the services publish and what their users report, as named beside each fact.
"""

import dataclasses
import json
from collections.abc import Callable
from typing import Any

from aiohttp import web

from augcon.demo.engine import COLD, cut
from augcon.demo.rules import reply_to
from augcon.llm.dialect import QUESTION
from augcon.text.prompts import as_text

Body = dict[str, Any]
Refusal = tuple[int, Any]  # a status, and the error as JSON
Rule = Callable[[Body], Refusal | None]
KNOWN = {  # OpenAI's API reference, chat and completions
    *(
        "model",
        "messages",
        "prompt",
        "temperature",
        "top_p",
        "n",
        "stop",
        "max_tokens",
        "max_completion_tokens",
        "seed",
    ),
    *("reasoning_effort", "presence_penalty", "frequency_penalty", "response_format", "user"),
}
THINKING = 300  # tokens


def takes_all(body: Body) -> Refusal | None:
    return None


def never(body: Body) -> bool:
    return False


def openai_error(message: str, param: str | None, code: str | None) -> Refusal:
    """The form of OpenAI's errors (API reference, "Error codes")."""
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": param, "code": code}}


def openai_chat(body: Body) -> Refusal | None:
    """gpt-4o and others: unknown parameters are refused, as are more than 4 stop strings (API reference, "stop")."""
    if unknown := body.keys() - KNOWN:
        return openai_error(f"Unrecognized request argument supplied: {min(unknown)}", None, None)
    if len(stop := body.get("stop", ())) > 4:
        message = f"maximum length 4, but got an array with length {len(stop)} instead."
        return openai_error(f"Invalid 'stop': array too long. Expected an array with {message}", "stop", "array_above")
    return None


def openai_reasoning(*efforts: str) -> Rule:
    """o-series and gpt-5 (guide "Reasoning models", and reports of users of these very messages)."""

    def refuse(body: Body) -> Refusal | None:
        unsupported = "is not supported with this model."
        if "max_tokens" in body:
            message = f"Unsupported parameter: 'max_tokens' {unsupported} Use 'max_completion_tokens' instead."
            return openai_error(message, "max_tokens", "unsupported_parameter")
        for name in ("stop", "top_p"):
            if name in body:
                return openai_error(f"Unsupported parameter: '{name}' {unsupported}", name, "unsupported_parameter")
        if body.get("temperature", 1) != 1:
            message = (
                f"'temperature' does not support {body['temperature']} with this model. Only the default (1) value"
            )
            return openai_error(f"Unsupported value: {message} is supported.", "temperature", "unsupported_value")
        if (effort := body.get("reasoning_effort", "low")) not in efforts:
            message = f"Unsupported value: 'reasoning_effort' does not support '{effort}' with this model."
            return openai_error(message, "reasoning_effort", "unsupported_value")
        if "low" in efforts and "minimal" not in efforts and body.get("max_completion_tokens", 9999) < THINKING:
            message = "Could not finish the message because max_tokens or model output limit was reached."
            return openai_error(f"{message} Please try again with higher max_tokens.", None, None)
        return openai_chat(body)

    return refuse


def mistral(body: Body) -> Refusal | None:
    """Strict: seed is random_seed there (API reference); the error is FastAPI's, within theirs (reports of users)."""
    known = KNOWN - {"seed", "max_completion_tokens", "reasoning_effort"} | {"random_seed", "safe_prompt"}
    wrong = [
        {"type": "extra_forbidden", "loc": ["body", name], "msg": "Extra inputs are not permitted", "input": body[name]}
        for name in body.keys() - known
    ]
    error = {"object": "error", "message": {"detail": wrong}, "type": "invalid_request_error", "param": None}
    return (422, error) if wrong else None


def tgi(body: Body) -> Refusal | None:
    """Its router's validation: top_p below 1, at most 4 stop strings by default (--max-stop-sequences)."""
    told = ""
    if not 0 < body.get("top_p", 0.5) < 1:
        told = "`top_p` must be > 0.0 and < 1.0"
    elif len(body.get("stop", ())) > 4:
        told = f"`stop` supports up to 4 stop sequences. Given: {len(body['stop'])}"
    return (422, {"error": f"Input validation error: {told}", "error_type": "validation"}) if told else None


def ollama(body: Body) -> Refusal | None:
    """It ignores what it does not know; its efforts are its own (documentation, "OpenAI compatibility")."""
    effort = body.get("reasoning_effort", "none")
    if effort in {"none", "low", "medium", "high"}:
        return None
    message = f'invalid reasoning value: \'{effort}\' (must be "high", "medium", "low", or "none")'
    return 400, {"error": {"message": message, "type": "invalid_request_error", "param": None, "code": None}}


def deepseek(body: Body) -> Refusal | None:
    """Parameters that thinking does not heed are ignored, not refused; the limit has one (guide "Thinking Mode")."""
    if body.get("max_tokens", 0) <= 8192:
        return None
    return openai_error("Invalid max_tokens value, the valid range of max_tokens is [1, 8192]", None, "invalid_request")


def dashscope(body: Body) -> Refusal | None:
    """Open Qwen3 models think unless told not to, and then only in streams (reports of users of this message)."""
    if body.get("enable_thinking") is False:
        return None
    message = "parameter.enable_thinking must be set to false for non-streaming calls"
    return openai_error(message, None, "invalid_parameter_error")


def gemini(body: Body) -> Refusal | None:
    """What it does not know is refused, all at once and in a list; seed is among it (reports of users)."""
    told = [f'Invalid JSON payload received. Unknown name "{name}": Cannot find field.' for name in unknown_to_it(body)]
    return (400, [{"error": {"code": 400, "message": "\n".join(told), "status": "INVALID_ARGUMENT"}}]) if told else None


def unknown_to_it(body: Body) -> list[str]:
    return sorted(body.keys() - KNOWN | body.keys() & {"seed"})


def routed(body: Body) -> Refusal | None:
    """OpenRouter hands on a provider's refusal, as text within its own (documentation, "Errors")."""
    if "seed" not in body:
        return None
    raw = json.dumps({"error": {"message": "Argument not supported on this model: seed", "code": "invalid"}})
    metadata = {"raw": raw, "provider_name": "a provider"}
    return 400, {"error": {"message": "Provider returned error", "code": 400, "metadata": metadata}}


@dataclasses.dataclass(frozen=True)
class Service:
    """A kind of server with one model. ``models`` is its list, None if it has none; ``refuses`` are its rules.

    ``thinks`` tells for a request whether the model thinks first, and ``shown`` where: in a field, as "tags" in the
    text, as the "end" tag alone, only as a "count", or "nowhere". ``sampled``: whether the seed makes a difference.
    """

    models: tuple[str, ...] | None = ("model",)
    owner: str = "someone"
    refuses: Rule = takes_all
    thinks: Callable[[Body], bool] = never
    shown: str = "reasoning_content"
    sampled: bool = True


def template(body: Body) -> bool:
    """Qwen3 thinks unless its chat template is told not to (Qwen3's documentation, "Thinking & Non-Thinking Modes")."""
    return body.get("chat_template_kwargs", {}).get("enable_thinking", True)


def always(body: Body) -> bool:
    return True


SERVICES = {
    "plain": Service(),
    # vLLM, documentation: "Reasoning Outputs" names the field, once reasoning_content; unknown fields are ignored.
    "vLLM": Service(owner="vllm"),
    "vLLM, Qwen3": Service(owner="vllm", thinks=template, shown="reasoning"),
    # DeepSeek-R1's template opens the block; without --reasoning-parser only its end is in the text.
    "vLLM, R1": Service(owner="vllm", thinks=always, shown="end"),
    # SGLang, documentation: "Reasoning Parser".
    "SGLang, Qwen3": Service(owner="sglang", thinks=template),
    # llama.cpp, tools/server/README.md: chat_template_kwargs, reasoning_format.
    "llama.cpp": Service(owner="llamacpp"),
    "llama.cpp, Qwen3": Service(owner="llamacpp", thinks=template, shown="tags"),
    "Ollama": Service(("llama3.2:3b", "model"), "library", ollama),
    "Ollama, qwen3": Service(
        owner="library", refuses=ollama, thinks=lambda body: body.get("reasoning_effort") != "none", shown="reasoning"
    ),
    "OpenAI": Service(("gpt-4o", "model"), "system", openai_chat),
    "OpenAI, gpt-5": Service(
        ("gpt-5", "model"),
        "system",
        openai_reasoning("minimal", "low", "medium", "high"),
        thinks=lambda body: body.get("reasoning_effort") != "minimal",
        shown="count",
    ),
    "OpenAI, o3": Service(("o3", "model"), "system", openai_reasoning("low", "medium", "high"), always, "count"),
    "DeepSeek": Service(("deepseek-chat", "model"), "deepseek", deepseek),
    "DeepSeek, thinking": Service(
        owner="deepseek", thinks=lambda body: body.get("thinking", {}).get("type") != "disabled"
    ),
    "DeepSeek, reasoner": Service(owner="deepseek", refuses=deepseek, thinks=always),
    # Model Studio's list is not part of its compatible mode.
    "DashScope, Qwen3": Service(None, refuses=dashscope, thinks=lambda body: body.get("enable_thinking", True)),
    # Its documentation, "OpenAI compatibility": reasoning_effort; nothing in a reply tells of thinking.
    "Gemini": Service(
        ("models/some", "model"),
        "google",
        gemini,
        thinks=lambda body: body.get("reasoning_effort") != "none",
        shown="nowhere",
        sampled=False,
    ),
    "OpenRouter": Service(
        ("some/model", "model"),
        refuses=routed,
        thinks=lambda body: body.get("reasoning", {}).get("enabled", True),  # documentation, "Reasoning Tokens"
        shown="reasoning",
        sampled=False,
    ),
    "TGI": Service(refuses=tgi),
    "Mistral": Service(("mistral-large", "model"), "mistralai", mistral, sampled=False),
    "plain, no seed": Service(sampled=False),
}


class Endpoint:
    """Serves one of them; an async context manager. ``bodies`` are the requests, ``refused`` those refused.

    ``key`` is the only key taken, where there is one. ``gone`` lets every request fail.
    """

    def __init__(self, service: Service, key: str = "") -> None:
        self.service, self.key = service, key
        self.bodies: list[Body] = []
        self.refused: list[Body] = []
        self.cut_off = 0  # replies to other requests than probes

    async def __aenter__(self) -> "Endpoint":
        application = web.Application(client_max_size=2**26)
        application.router.add_get("/v1/models", self._models)
        application.router.add_post("/v1/{endpoint:.*}", self._complete)
        self._runner = web.AppRunner(application, shutdown_timeout=0.01, access_log=None)
        await self._runner.setup()
        await web.TCPSite(self._runner, "127.0.0.1", 0, backlog=1024).start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}/v1"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    @property
    def probes(self) -> list[Body]:
        return [body for body in self.bodies if is_probe(body)]

    @property
    def asked(self) -> list[Body]:
        return [body for body in self.bodies if not is_probe(body)]

    async def _models(self, _: web.Request) -> web.Response:
        if self.service.models is None:
            raise web.HTTPNotFound
        data = [{"id": name, "object": "model", "owned_by": self.service.owner} for name in self.service.models]
        return web.json_response({"object": "list", "data": data})

    async def _complete(self, request: web.Request) -> web.Response:
        body = await request.json()
        if self.key and request.headers["Authorization"] != f"Bearer {self.key}":
            return web.json_response(openai_error("Incorrect API key provided", None, "invalid_api_key")[1], status=401)
        self.bodies.append(body)
        if body["model"] not in (self.service.models or ("model",)):
            error = openai_error(f"The model `{body['model']}` does not exist", None, "model_not_found")[1]
            return web.json_response(error, status=404)
        if refusal := self.service.refuses(body):
            self.refused.append(body)
            return web.json_response(refusal[1], status=refusal[0])
        return web.json_response(self._reply(body, "chat" in request.path))

    def _reply(self, body: Body, chat: bool) -> Body:
        """A reply of which the thinking, if any, takes its tokens from the limit."""
        prompt = body["messages"] if chat else body["prompt"]
        sampled = self.service.sampled and body.get("temperature", 1) >= COLD
        text = "391" if is_probe(body) else reply_to(prompt, body.get("seed") if sampled else None)
        most = body.get("max_tokens", body.get("max_completion_tokens"))
        thinking = THINKING * (chat and self.service.thinks(body))
        done = most is None or most > thinking
        spent = thinking if done else most
        written, finish, tokens = cut(text, body.get("stop", []), most and most - spent) if done else ("", "length", 0)
        self.cut_off += finish == "length" and not is_probe(body)
        message: Body = {"role": "assistant", "content": written or None}
        usage = {"prompt_tokens": len(str(prompt)), "completion_tokens": tokens + spent}
        if thinking and self.service.shown in {"tags", "end"}:
            opened = "<think>\n" if self.service.shown == "tags" else ""
            message["content"] = f"{opened}Hmm. {'</think>' if done else ''}\n\n{written}"
        elif thinking and self.service.shown == "count":
            usage["completion_tokens_details"] = {"reasoning_tokens": spent}
        elif thinking and self.service.shown != "nowhere":
            message[self.service.shown] = "Hmm."
        choice = {"message": message} if chat else {"text": written}
        return {"choices": [{"index": 0, "finish_reason": finish, **choice}], "usage": usage}


def is_probe(body: Body) -> bool:
    """Whether a request is one of those by which AugCon finds out what a server takes."""
    return QUESTION in (body["prompt"] if "prompt" in body else as_text(body["messages"]))
