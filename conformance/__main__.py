"""``python -m smca.conformance``: the suite, where the ``smca`` command is not installed."""

import sys

from smca.conformance.command import main

if __name__ == "__main__":
    try:
        main()
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None
