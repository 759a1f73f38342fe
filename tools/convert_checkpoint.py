"""`mrl convert` for those who look for it here."""

from __future__ import annotations

import sys

from mrl.convert.command import main

if __name__ == "__main__":
    sys.exit(main())
