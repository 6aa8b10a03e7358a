"""`python -m dmqfx`, the same as `dmqfx`."""

from __future__ import annotations

import sys

from dmqfx.cli import main

if __name__ == "__main__":
    sys.exit(main())
