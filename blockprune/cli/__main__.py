"""``python -m blockprune.cli``: the command line where the script is not on the path."""

from __future__ import annotations

from blockprune.cli.app import main

if __name__ == "__main__":
    main()
