"""The command line: the only reader of argv and of the environment."""

from __future__ import annotations

import sys


def start() -> None:
    """Entry point of the `offload` script: Ctrl-C while the command's own modules load ends like any other Ctrl-C."""
    try:
        from offload.cli.main import main

        main()
    except KeyboardInterrupt:
        sys.exit(130)
