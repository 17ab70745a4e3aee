"""Where a backend's code raised an exception: all of it for files, a few lines of it for a terminal."""

from __future__ import annotations

import re
import traceback
from pathlib import Path

from dsv4_hal.environment import safe

LONGEST = 8000  # characters that are kept, the last ones
SHOWN = 3  # frames of a terminal's
_PACKAGE = Path(__file__).parents[2]
_HARNESS = tuple(str(_PACKAGE / name) for name in ("conformance", "dispatch.py", "ops/cases"))
_FRAME = re.compile(r'^  File "(.*?)", line .*\n(?:    .*\n)*', re.MULTILINE)


def trace(error: BaseException) -> str:
    """As Python tells it, from the frame on that this package called; of one that is its own, all."""
    inner, tb = error.__traceback__, error.__traceback__
    while tb is not None:
        if tb.tb_frame.f_code.co_filename.startswith(_HARNESS):
            inner = tb.tb_next
        tb = tb.tb_next
    try:
        told = "".join(traceback.format_exception(type(error), error, inner or error.__traceback__))
    except BaseException as worse:  # its text, or what it says of itself, may be code of a backend that fails as well
        told = f"{type(error).__name__}, whose trace raises {type(worse).__name__}"
    return safe(told)[-LONGEST:]


def short(told: str) -> list[str]:
    """The lines of its last frames, but for those inside torch."""
    frames = [frame[0] for frame in _FRAME.finditer(told)]
    own = [frame for frame in frames if f"{Path('site-packages', 'torch')}/" not in frame] or frames
    return [line for frame in own[-SHOWN:] for line in frame.splitlines()]
