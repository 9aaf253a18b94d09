"""The command ``ldm``, also as ``python -m ldm``."""

import os
import signal
from types import FrameType


def interrupt(number: int, frame: FrameType | None) -> None:
    """The handler of Ctrl-C.

    It ends the process at once during the imports of the command line itself, when nothing has been made yet: imports can
    turn a KeyboardInterrupt into another error, or swallow it. Afterwards it raises one, as Python's own handler does.
    """
    importer = None  # the outermost frame that imports
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            importer = frame.f_back
        frame = frame.f_back
    while importer is not None and importer.f_code.co_filename.startswith("<frozen importlib"):
        importer = importer.f_back
    if importer is not None and f"{importer.f_globals.get('__name__')}.".startswith(("ldm.cli.", "__main__.", "ldm.__main__.")):
        os.write(2, b"ldm: interrupted\n")
        os._exit(130)
    raise KeyboardInterrupt


def main() -> None:
    # a background job of a shell ignores Ctrl-C, which should stay so
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, interrupt)
    from ldm import cli

    cli.main()


if __name__ == "__main__":
    main()
