"""``python -m ldm`` is ``ldm``."""

from ldm.cli import main

if __name__ == "__main__":
    main()
