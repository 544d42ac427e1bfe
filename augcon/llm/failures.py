"""What a failed call means: whether a retry can help, and what it is called in counts and messages."""

import email.utils
import re
import time

import aiohttp
import openai

from augcon.data import TOO_LONG, Refused
from augcon.errors import UserError, one_line
from augcon.text.units import clean


class BadReply(Exception):
    """A reply with status 200 that does not follow the protocol, such as a proxy's error page, or has no end."""


NO_ANSWER = (openai.APIConnectionError, aiohttp.ClientError, TimeoutError)
FAILURES = (*NO_ANSWER, openai.APIError, BadReply)  # of a call, as opposed to errors in the program
TEMPORARY = {408, 409, 425, 429}  # statuses worth a retry, besides those from 500 on

# How servers say that a prompt does not fit the model (vLLM, OpenAI, llama.cpp, TGI, Gemini, ...).
_TOO_LONG = re.compile(
    "context[ _](length|size|window)|maximum (context|model length)|max_new_tokens|max_model_len|input token count|"
    "(prompt|input) is too long|string too long",
    re.IGNORECASE,
)


def final(error: Exception, accepted: bool, api_base: str, model: str, served: dict[str, str]) -> Exception | None:
    """The Refused or UserError to raise for a failure that no retry can mend; None for any other.

    ``accepted``: the server has answered other requests with the same parameters, so that a refusal concerns this
    one only. ``model`` was asked for; ``served`` are the models that the server lists.
    """
    if not isinstance(error, openai.APIStatusError):
        return None
    status, message = error.status_code, describe(error)
    if status in {401, 403}:
        return UserError(f"the server at {api_base} refuses the key (status {status}); set AUGCON_API_KEY or --api-key")
    if error.code == "insufficient_quota":
        return UserError(f"the quota of the key for {api_base} is used up ({message}); raise it or set another key")
    if too_long(error):
        return Refused(TOO_LONG)
    if status >= 500 or status in TEMPORARY:
        return None
    if status == 404 and "model" in message.lower():
        return unknown_model(model, api_base, served, f" ({message})")
    if status == 404:
        return UserError(f"nothing is at {error.request.url} ({message}); correct --api-base, which often ends in /v1")
    if accepted or error.code == "content_filter":
        return Refused(f"refused with status {status}")
    return UserError(f"the server at {api_base} refuses all requests of this kind (status {status}): {message}")


def out_of_order(error: Exception) -> bool:
    """Whether a failure is the server's own, and not that of the request or of a limit."""
    return not isinstance(error, openai.APIStatusError) or error.status_code >= 500


def too_long(error: Exception) -> bool:
    """Whether a request failed because it does not fit the model."""
    return isinstance(error, openai.APIStatusError) and (
        error.status_code == 413 or bool(_TOO_LONG.search(str(error.body)))
    )


def unknown_model(model: str, api_base: str, served: dict[str, str], detail: str = "") -> UserError:
    """The error for a server that does not serve ``model``; ``detail`` may quote what the server says."""
    choice = f"; it serves {', '.join(map(repr, served))}" if served else ""
    return UserError(f"the server at {api_base} does not serve {model!r}{detail}{choice}; name one with --api-model")


def describe(error: Exception) -> str:
    """A failure in one line: the server's own message, or the cause where the client only says "Connection error."."""
    message = getattr(error, "body", None)
    if isinstance(message, dict):  # of OpenAI's form or FastAPI's
        message = message.get("message") or message.get("detail")
    cause = error.__cause__ if isinstance(error, openai.APIConnectionError) else None
    return clean(one_line(message or cause or error))


def kind(error: Exception) -> str:
    """The name under which a failure is counted: "status 503", "timeout", "connection lost" or "bad reply"."""
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code}"
    if isinstance(error, BadReply) or isinstance(error.__cause__, BadReply):
        return "bad reply"
    # The aiohttp transport calls a refused or lost connection a ConnectTimeout.
    timeout = isinstance(error, (TimeoutError, openai.APITimeoutError))
    return "timeout" if timeout and type(error.__cause__).__name__ != "ConnectTimeout" else "connection lost"


def retry_after(error: Exception, most: float) -> float:
    """Seconds, at most ``most``, that the server asks to wait (header Retry-After, in seconds or as a date); or 0."""
    header = error.response.headers.get("retry-after", "") if isinstance(error, openai.APIStatusError) else ""
    try:
        date = email.utils.parsedate_tz(header)
        seconds = email.utils.mktime_tz(date) - time.time() if date else float(header)
    except (ValueError, OverflowError):
        return 0
    return min(max(0, seconds), most)  # in this order, 0 where it is not a number
