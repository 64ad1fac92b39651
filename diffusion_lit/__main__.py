"""`python -m diffusion_lit`, which is the command `lightning`; further ranks of a run are started as this file."""

import sys
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent
if sys.path[0] == str(PACKAGE):  # started as a file: the package is imported, not its modules as if they stood alone
    sys.path[0] = str(PACKAGE.parent)

from diffusion_lit.commands.main import main  # noqa: E402

if __name__ == "__main__":
    main()
