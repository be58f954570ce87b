"""``python -m aqueue``: the command line."""

from aqueue.cli.commands import main

main()
