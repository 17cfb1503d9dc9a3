"""What is told of a handler's error in the log and kept with its dead letter: the text, and the line it came from.

The place is a file, a line and a function's name and nothing else: neither source nor the values of variables, which
may be secret.
"""

from __future__ import annotations

import os
import sysconfig
from types import TracebackType
from typing import Final

from pubsub_facade.message import Reject, Retry

MAX_ERROR_TEXT: Final = 2000  # characters kept of an error's text, the place included
_LIBRARY: Final = os.path.join(os.path.dirname(os.path.abspath(__file__)), "")
_STDLIB: Final = os.path.join(sysconfig.get_path("stdlib"), "")


def text_of(error: BaseException) -> str:
    """The error's own text and, in brackets, where it was raised; what `Reject` and `Retry` say is all there is."""
    try:
        text = str(error.reason if isinstance(error, Reject) else error)
    except Exception as broken:  # a user's error class: its text may be anything, also an error
        text = f"(an error without text: its __str__ raised {type(broken).__name__})"
    place = "" if isinstance(error, Reject | Retry) else place_of(error.__traceback__)
    if place:
        text = text[: max(0, MAX_ERROR_TEXT - len(place) - 3)]
        text = f"{text} ({place})" if text else f"({place})"
    return text[:MAX_ERROR_TEXT].encode("utf-8", "replace").decode()


def place_of(traceback: TracebackType | None) -> str:
    """``file:line in function`` of the last frame of the application's own code; "" where all frames are ours.

    Where it has called an installed package or the standard library, the call is told, not what is in there; only
    where no frame is the application's, the last one outside of this library is.
    """
    own = installed = None
    while traceback is not None:
        file = traceback.tb_frame.f_code.co_filename
        if not file.startswith((_LIBRARY, "<frozen ")):
            if file.startswith(_STDLIB) or "site-packages" in file or "dist-packages" in file:
                installed = traceback
            else:
                own = traceback
        traceback = traceback.tb_next
    last = own or installed
    if last is None:
        return ""
    code = last.tb_frame.f_code
    return f"{_short(code.co_filename)}:{last.tb_lineno} in {code.co_name}"


def _short(file: str) -> str:
    """The path from the working directory where the file is beneath it."""
    try:
        return file.removeprefix(os.path.join(os.getcwd(), ""))
    except OSError:  # the working directory was removed
        return file
