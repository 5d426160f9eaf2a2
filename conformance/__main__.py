"""``python -m smca.conformance``, or ``smca-conformance``: the suite where the ``smca`` command is not installed."""

import sys

from smca.conformance.command import main


def run() -> None:
    """The command; expected errors become one readable message and exit status 1."""
    try:
        main(name="smca-conformance")
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        raise SystemExit(1) from None


if __name__ == "__main__":
    run()
