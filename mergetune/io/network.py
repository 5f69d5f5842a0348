"""Use of the network: failed downloads and uploads become one sentence, and the log is not filled with retries."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager

# Words in the names of the errors that the libraries raise without a network (Hub, HTTP libraries, urllib).
UNREACHABLE = ("LocalEntryNotFound", "Offline", "Connect", "Timeout", "URLError", "gaierror")
CACHED = "if the files were downloaded earlier, give their folder as cache_dir or in HF_HOME"
LONGEST = 300  # characters of a foreign message


@contextmanager
def quiet_retries() -> Iterator[None]:
    """Context manager in which huggingface_hub does not log its retries; the error at the end says enough."""
    logger = logging.getLogger("huggingface_hub")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        yield
    finally:
        logger.setLevel(before)


def unreachable(error: BaseException) -> bool:
    """Returns whether an error or one of its causes says that a server could not be reached."""
    return any(word in type(one).__name__ for one in _causes(error) for word in UNREACHABLE) or (
        "couldn't connect to" in str(error)  # transformers raises a plain OSError
    )


def not_reached(what: str, error: BaseException, *, way_on: str, source: str | None = None) -> RuntimeError:
    """Returns the error for a download or an upload that failed, as one sentence.

    Args:
        what: what failed: "the weights 'openai' of 'RN50' could not be downloaded".
        error: the library's error.
        way_on: what the user can do without a network.
        source: address of the server, named if it could not be reached; None names the Hugging Face Hub.
    """
    if not unreachable(error):
        return RuntimeError(f"{what}: {_line(error)}")
    first = _line(_causes(error)[-1])
    return RuntimeError(f"{what} ({source or _hub()}: {first}): check the network connection, or {way_on}")


def _hub() -> str:
    """The address of the Hugging Face Hub that huggingface_hub uses."""
    from huggingface_hub import constants

    return constants.ENDPOINT


def _line(error: BaseException) -> str:
    line = " ".join(str(error).split()) or type(error).__name__
    return line if len(line) <= LONGEST else f"{line[:LONGEST]}..."


def _causes(error: BaseException) -> list[BaseException]:
    """The error and what it was raised from, from the last to the first."""
    found: list[BaseException] = []
    one: BaseException | None = error
    while one is not None and one not in found:
        found.append(one)
        one = one.__cause__ or one.__context__
    return found
