"""Two processes of which the first cannot write, while saving in the foreground and in the background; each prints its error.

torchrun --nproc-per-node 2 checkpoint_ranks.py FOLDER
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from checkpoint_saver import train
from injected import LimitFileSize

from ldm.errors import LdmError


def main(folder: Path) -> None:
    for background in (False, True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            train(folder / f"background-{background}", os.open(os.devnull, os.O_WRONLY), background, 2, LimitFileSize(4))
        except LdmError as error:
            # in one write, so that the lines of two processes do not mix
            os.write(1, f"rank {os.environ['RANK']}, background {background}: {error}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
