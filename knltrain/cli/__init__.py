"""The command line: parsing of arguments, printing of results, exit codes.

From here on Ctrl-C ends the process in one line while modules are imported, which takes seconds with torch: a
KeyboardInterrupt there would be printed with its traceback, or be swallowed by a library that is half imported.
"""

import os
import signal
import threading
from types import FrameType

from knltrain.errors import INTERRUPTED


def _interrupt(number: int, frame: FrameType | None) -> None:
    """Raises KeyboardInterrupt, or ends the process if modules are being imported."""
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            os.write(2, b"knltrain: interrupted\n")
            os._exit(INTERRUPTED)
        frame = frame.f_back
    raise KeyboardInterrupt


# Not where it is ignored, as by nohup, or where another program has its own.
_in_main_thread = threading.current_thread() is threading.main_thread()
if _in_main_thread and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, _interrupt)
