"""What asks for the key at all paths of vLLM, which itself does so under /v1 and answers at /invocations to anyone."""

import os
import secrets
from collections.abc import Awaitable, Callable
from typing import Any

OPEN = ("/health", "/metrics")  # without a key; they tell of no request


class Guard:
    """ASGI middleware, by name in vLLM's arguments. It refuses all requests that do not bear VLLM_API_KEY."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app
        self.wanted = f"Bearer {os.environ['VLLM_API_KEY']}".encode()

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        given = dict(scope.get("headers", ())).get(b"authorization", b"")
        if scope["type"] == "lifespan" or scope["path"] in OPEN or secrets.compare_digest(given, self.wanted):
            await self.app(scope, receive, send)
        elif scope["type"] == "http":
            await send({"type": "http.response.start", "status": 401, "headers": []})
            await send({"type": "http.response.body"})
        else:
            await send({"type": "websocket.close"})
