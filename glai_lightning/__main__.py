"""``python -m glai_lightning`` is the ``glai`` command."""

import sys

from glai_lightning.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
