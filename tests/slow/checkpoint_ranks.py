"""Two processes, of which the first cannot write: each says what it ended with. Once at the save, once in the background.

torchrun --nproc-per-node 2 checkpoint_ranks.py FOLDER
"""

from __future__ import annotations

import os
import resource
import sys
from pathlib import Path

from checkpoint_limit import LimitFileSize
from checkpoint_saver import train

from ldm.errors import LdmError


def main(folder: Path) -> None:
    for background in (False, True):
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        try:
            train(folder / f"background-{background}", os.open(os.devnull, os.O_WRONLY), background, 2, LimitFileSize(4))
        except LdmError as error:
            # in one write, for the lines of two processes to stay apart
            os.write(1, f"rank {os.environ['RANK']}, background {background}: {error}\n".encode())


if __name__ == "__main__":
    main(Path(sys.argv[1]))
