"""Printing from commands: any text, any output, and no traceback where it cannot be printed."""

from __future__ import annotations

import argparse
import functools
import io
import os
import re
import select
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import ParamSpec, TextIO

P = ParamSpec("P")
INTERRUPTED = 130
"""The status of a command that Ctrl-C has ended."""
RAISING = ("strict", "surrogateescape")
"""Treatment of characters beyond a stream's encoding where they raise: by default, and by that of
the C locale.
"""


def command(*, on_closed_pipe: int = 0) -> Callable[[Callable[P, int | None]], Callable[P, int]]:
    """Decorate the `main` of a command, which returns the exit status (None is 0).

    Characters that the encoding of standard output cannot hold are printed as backslash escapes.
    Where the reader of the output has closed it, as `head -1` does, the command ends quietly. Any
    other OSError that `main` lets through, such as that of a full device, is one line and status 1;
    Ctrl-C is one line and status 130.

    Args:
        on_closed_pipe: the status then; not 0 where the status is a verdict, yet to be reached.
    """

    def decorate(main: Callable[P, int | None]) -> Callable[P, int]:
        @functools.wraps(main)
        def run(*args: P.args, **kwargs: P.kwargs) -> int:
            status: int | None = None
            with _escaping(sys.stdout):
                try:
                    try:
                        status = main(*args, **kwargs)
                    except SystemExit:  # argparse has printed its help
                        _flush()
                        raise
                    _flush()
                except OSError as error:
                    # The pipe may be another one: to a process that has died, for instance.
                    is_closed = isinstance(error, BrokenPipeError) and _has_lost_its_reader()
                    _discard_output()
                    if is_closed:
                        return status or on_closed_pipe
                    note(f"error: {error}")
                    return 1
                except KeyboardInterrupt:
                    note("", "stopped")  # behind what is printed on the line, and the terminal's ^C
                    return INTERRUPTED
            return status or 0

        return run

    return decorate


def program(module: str) -> str:
    """The name of the running command for its messages: the console script, or python -m."""
    name = Path(sys.argv[0]).stem
    return name if name.startswith("stlm-") else f"python -m {module}"


def argument_parser(module: str, description: str | None) -> argparse.ArgumentParser:
    """A parser named as the running command; its help keeps the lines of the description.

    A console script's help names the others in its way: `stlm-train`, not `python -m`.
    """
    name = program(module)
    if description and name.startswith("stlm-"):
        description = re.sub(r"python -m stlm_(?:models|kernels)\.(\w+)", r"stlm-\1", description)
    return argparse.ArgumentParser(
        prog=name,
        description=description,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def note(*lines: object) -> None:
    """Print lines on standard error. Where that cannot be written to, they are lost."""
    with suppress(OSError, ValueError):
        if sys.stderr is not None:
            print(*lines, sep="\n", file=sys.stderr, flush=True)


def print_result(text: str) -> None:
    """Print what a command has to say whose work is done and kept, and has not failed if it cannot.

    A closed pipe is passed over, for any other failure there is a line on standard error.
    """
    try:
        print(text, flush=True)
    except OSError as error:
        _discard_output()
        if not isinstance(error, BrokenPipeError):
            note(f"warning: the result could not be printed: {error}")


def bytes_of(argument: str) -> bytes:
    """The bytes of a command's argument as they were given, UTF-8 or not.

    Raises:
        ValueError: for characters that no argument of a command line holds.
    """
    try:
        return os.fsencode(argument)
    except UnicodeEncodeError as error:
        raise ValueError(f"argument: expected text, got {argument!a} ({error.reason})") from None


@contextmanager
def _escaping(stream: TextIO | None) -> Iterator[None]:
    """Let a stream escape characters where it would raise."""
    if not isinstance(stream, io.TextIOWrapper) or stream.errors not in RAISING:
        yield
        return
    before = stream.errors
    with suppress(OSError):  # of what was printed before
        stream.reconfigure(errors="backslashreplace")
    try:
        yield
    finally:
        with suppress(OSError, ValueError):
            stream.reconfigure(errors=before)


def _flush() -> None:
    if sys.stdout is not None:
        sys.stdout.flush()


def _has_lost_its_reader() -> bool:
    """Return whether standard output is a pipe whose other end is closed."""
    if sys.stdout is None or not hasattr(select, "poll"):
        return False
    poll = select.poll()
    try:
        poll.register(sys.stdout.fileno(), 0)  # errors are told unasked
    except (OSError, ValueError):  # no descriptor, as in a notebook
        return False
    return bool(poll.poll(0))


def _discard_output() -> None:
    """Send what is left in the buffer nowhere: the interpreter would try to write it at its end."""
    with suppress(OSError, ValueError):
        nowhere = os.open(os.devnull, os.O_WRONLY)
        try:
            if sys.stdout is not None:
                os.dup2(nowhere, sys.stdout.fileno())
        finally:
            os.close(nowhere)
