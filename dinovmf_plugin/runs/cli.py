"""What the entry points share: one clear message instead of a wall of traceback."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable
from typing import Any

__all__ = ["is_expected", "one_clear_message"]


def is_expected(error: Exception) -> bool:
    """The user's input, files and machine; and the errors that this package defines."""
    ours = type(error).__module__.startswith("dinovmf_plugin.")
    return ours or isinstance(error, (ValueError, OSError, ImportError))


def one_clear_message(function: Callable[..., Any]) -> Callable[..., Any]:
    """Print what is wrong with the user's input in one sentence and exit with status 2.

    Ctrl-C exits with status 130. ``DINOVMF_TRACEBACK=1`` shows the traceback instead.
    """

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        if os.environ.get("DINOVMF_TRACEBACK"):
            return function(*args, **kwargs)
        try:
            return function(*args, **kwargs)
        except KeyboardInterrupt:
            print("\ninterrupted: what was finished before is on disk", file=sys.stderr)
            sys.exit(130)
        except BrokenPipeError:  # the reader of our output has gone, as in `... | head`
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(141)
        except Exception as error:
            if is_expected(error):
                print(f"error: {error}", file=sys.stderr)
                sys.exit(2)
            raise

    return wrapper
