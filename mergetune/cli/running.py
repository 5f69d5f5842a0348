"""How every command runs: one line when it is stopped, and at its end how long it took and what comes next."""

from __future__ import annotations

import os
import re
import shlex
import shutil
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from types import FrameType
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from mergetune.cli.terminal import visible, visible_warnings

STOPPED = "stopped; run the same command again to continue"
WIDE = 100  # columns of a terminal in which the table of options has room
WORTH_TELLING = 1.0  # seconds; the time of a shorter command is not shown


@dataclass
class _Ending:
    """What the lines at the end of a command depend on.

    Attributes:
        as_json: whether the command printed JSON; nothing is printed after it.
        following: what the user may do next, one line.
    """

    as_json: bool = False
    following: str | None = None


_ending: ContextVar[_Ending | None] = ContextVar("ending", default=None)


class _Terminated(KeyboardInterrupt):
    """SIGTERM, which ends a command in the way of Ctrl-C."""


class Commands(TyperGroup):
    """The group of all commands: runs a command, and prints its last lines."""

    def get_command(self, ctx: Any, cmd_name: str) -> Any:
        """Returns a command; in a narrow terminal its help is plain text, because a table would cut names short."""
        command: Any = super().get_command(ctx, cmd_name)
        if command is not None and shutil.get_terminal_size().columns < WIDE:
            command.rich_markup_mode = None
        return command

    def invoke(self, ctx: Any) -> Any:  # a context of click, which some typers bring along
        began, ending = time.perf_counter(), _Ending()
        token = _ending.set(ending)
        try:
            with _terminable(), visible_warnings():
                try:
                    result = super().invoke(ctx)
                except typer.Exit as exit:  # typer's way to end a command early
                    if exit.exit_code == 0:
                        _close(ending, time.perf_counter() - began)
                    raise
                _close(ending, time.perf_counter() - began)
                sys.stdout.flush()  # a reader that is gone is noticed here, and typer ends in silence
                return result
        except KeyboardInterrupt as stop:
            _stop(stop)
        finally:
            _ending.reset(token)


def suggest(*words: object) -> None:
    """Sets the command that the user may run next; it is shown when this command has ended well.

    Args:
        words: the words after ``mergetune``. A pair (option, None) is left out; a pair with a value is two words.
    """
    pairs = [word if isinstance(word, tuple) else (word,) for word in words]
    spelt = ["mergetune", *(shlex.quote(str(word)) for pair in pairs if None not in pair for word in pair)]
    if (ending := _ending.get()) is not None:
        ending.following = " ".join(spelt)


def nothing_follows() -> None:
    """Leaves out the lines at the end of the command, for output that another program reads."""
    if (ending := _ending.get()) is not None:
        ending.as_json = True


def in_terms_of_options(message: str) -> str:
    """Returns the message of an error with the option of the running command in place of the function's argument.

    "tau must lie in [0, 1], got 2" becomes "--tau must ...". If the command has no option of this name, or the option
    was not given, it is the option whose value the message shows: "path must be a checkpoint, got out/coop" becomes
    "--tuned must ...".
    """
    found, context = re.match(r"([a-z]\w*) (?:must|cannot) ", message), _context()
    if found is None or context is None:
        return message
    name = found[1]
    parameters = {p: _shown_name(p) for p in context.command.params}
    named = None
    for parameter, shown in parameters.items():
        if f"--{name.replace('_', '-')}" in parameter.opts or name == parameter.name:
            named = shown + message.removeprefix(name)
            if context.params.get(parameter.name) is not None:
                return named
    for parameter, shown in parameters.items():
        given = context.params.get(parameter.name)
        for value in given if isinstance(given, list) else [given]:
            if value is not None and re.search(rf"got '?{re.escape(str(value))}'?(?![\w/.-])", message):
                return shown + message.removeprefix(name)
    return named or message


def _shown_name(parameter: Any) -> str:
    """The name of an option or argument as the help shows it."""
    long = [option for option in parameter.opts if option.startswith("--")]
    return long[0] if long else parameter.name.upper()


def _context() -> Any:
    """The context of the running command; None outside of a command."""
    try:
        from typer._click.globals import get_current_context  # versions of typer that bring click along
    except ImportError:
        from click import get_current_context
    return get_current_context(silent=True)


def first_rank() -> bool:
    """Returns whether this process prints: rank 0 under torchrun, and every process without torchrun."""
    return os.environ.get("RANK", "0") == "0"


def duration(seconds: float) -> str:
    """Returns a time for people: "4 s", "2 min 5 s", "1 h 20 min"."""
    minutes, rest = divmod(round(seconds), 60)
    if not minutes:
        return f"{rest} s"
    hours, minutes_left = divmod(minutes, 60)
    return f"{hours} h {minutes_left} min" if hours else f"{minutes} min {rest} s"


def _close(ending: _Ending, seconds: float) -> None:
    """Prints the last lines of a command to stderr."""
    if ending.as_json or not first_rank():
        return
    took = f"Took {duration(seconds)}." if seconds > WORTH_TELLING else ""
    following = f"Next: {ending.following}" if ending.following else ""
    if took or following:
        typer.echo(visible(f"{took} {following}".strip()), err=True)


def _stop(stop: KeyboardInterrupt) -> NoReturn:
    """Ends the process with one line; exit code 130 after Ctrl-C and 143 after SIGTERM, as a shell has them."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # a second Ctrl-C ends the process at once and in silence
    if first_rank():
        typer.echo(f"\n{STOPPED}", err=True)
    raise typer.Exit(128 + (signal.SIGTERM if isinstance(stop, _Terminated) else signal.SIGINT)) from None


@contextmanager
def _terminable() -> Iterator[None]:
    """Context manager in which SIGTERM raises an exception, so that files and child processes are closed."""
    if threading.current_thread() is not threading.main_thread():  # signals arrive in the main thread alone
        yield
        return
    process = os.getpid()

    def terminate(number: int, frame: FrameType | None) -> None:
        if os.getpid() != process:  # a child that was forked
            os._exit(128 + number)
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)
