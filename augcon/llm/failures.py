"""What can go wrong with a call, and what it is called in counts and messages."""

import datetime
import email.utils

import aiohttp
import openai

from augcon.errors import one_line


class BadReply(Exception):
    """An answer with status 200 that is not one of the protocol (a proxy's page, an empty list)."""


# The server did not answer at all.
NO_ANSWER = (openai.APIConnectionError, aiohttp.ClientError, TimeoutError)

# How servers say that a prompt does not fit the model (vLLM, OpenAI, llama.cpp, TGI, Gemini, ...).
TOO_LONG = (
    "context length",
    "context_length",
    "context size",
    "context window",
    "maximum context",
    "max_new_tokens",
    "input token count",
    "max_model_len",
    "maximum model length",
    "prompt is too long",
    "input is too long",
    "string too long",
)


def message(error: openai.APIStatusError) -> str:
    """What the server says, in OpenAI's form, FastAPI's or none."""
    said = error.body
    if isinstance(said, dict):
        said = said.get("message") or said.get("detail")
    return one_line(Exception(said or error.message))


def words(error: Exception) -> str:
    """A failure in one line, the transport's own words where the client only says "Connection error."."""
    return one_line(error.__cause__ if isinstance(error, openai.APIConnectionError) and error.__cause__ else error)


def kind(error: Exception) -> str:
    """What a failure is counted as: "status 503", "timeout", "connection lost" or "bad reply"."""
    if isinstance(error, openai.APIStatusError):
        return f"status {error.status_code}"
    if isinstance(error, BadReply):
        return "bad reply"
    # the aiohttp client calls a connection that is refused or lost a ConnectTimeout
    timeout = isinstance(error, (TimeoutError, openai.APITimeoutError))
    return "timeout" if timeout and type(error.__cause__).__name__ != "ConnectTimeout" else "connection lost"


def retry_after(error: Exception, limit: float) -> float | None:
    """Seconds that the server asks to wait (header Retry-After, in seconds or as a date), at most ``limit``."""
    value = error.response.headers.get("retry-after") if isinstance(error, openai.APIStatusError) else None
    if value is None:
        return None
    try:
        seconds = float(value)
    except ValueError:
        try:
            when = email.utils.parsedate_to_datetime(value)
            seconds = (when - datetime.datetime.now(when.tzinfo or datetime.UTC)).total_seconds()
        except (ValueError, TypeError, OverflowError):
            return None
    return min(max(seconds, 0.0), limit) if seconds == seconds else None
