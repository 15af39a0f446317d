"""`python -m perlcli`: the same commands, where no script is on PATH or `perl` must stay the interpreter."""

import sys

from perlcli.entry import perlcli

if __name__ == "__main__":
    sys.exit(perlcli())
