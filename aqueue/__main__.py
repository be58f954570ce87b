"""The command line: ``aqueue``, or ``python -m aqueue``."""

import sys

#: What shells report for a program that Ctrl-C has ended.
_INTERRUPTED = 130


def main() -> None:
    """Entry point of the console script; Ctrl-C while modules are still loading ends it without a traceback."""
    try:
        from aqueue.cli.commands import cli  # noqa: PLC0415 - so that this is inside, too

        cli()
    except KeyboardInterrupt:
        sys.exit(_INTERRUPTED)


if __name__ == "__main__":
    main()
