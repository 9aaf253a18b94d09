"""The command ``ldm``, also as ``python -m ldm``."""

import atexit
import os
import signal
import sys
import threading
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

    try:
        cli.main()
    except SystemExit as leave:
        if isinstance(leave.code, int):
            end_group_member(leave.code)
        raise
    end_group_member(0)


def end_group_member(code: int) -> None:
    """End the process here if it is one of several that train together: all of Python's own end but its finalisation.

    A thread of gloo can hold the tensors of the last operation for a moment, and aborts a process that is being finalised
    when it lets go of them (PyTorch issue 190489): a finished run would count as failed. To close the process group first
    is no way out, since FSDP's state keeps it alive.
    """
    distributed = sys.modules.get("torch.distributed")
    if distributed is None or not distributed.is_available() or not distributed.is_initialized():
        return
    threading._shutdown()  # pyright: ignore[reportAttributeAccessIssue]
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == "__main__":
    main()
