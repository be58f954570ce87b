"""The program that ``aqueue worker`` becomes: the supervisor, with no more of the package than it needs.

``import aqueue`` brings in all that an application may want. A process that lives for weeks and only watches others
does without, and is half as large.
"""

import sys
from importlib import import_module
from pathlib import Path
from types import ModuleType


def main() -> int:
    package = ModuleType("aqueue")
    package.__path__ = [str(Path(__file__).parent.parent)]
    sys.modules["aqueue"] = package
    code: int = import_module("aqueue.supervisor").main(sys.argv[1:])
    return code


if __name__ == "__main__":
    sys.exit(main())
