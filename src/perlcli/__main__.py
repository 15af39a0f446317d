"""`python -m perlcli`: the same commands, where no script is on PATH or `perl` must stay the interpreter."""

import os
import sys

from perlcli.entry import perlcli

if __name__ == "__main__":
    if "PERLCLI_PARENT" in os.environ:  # a run of ours that another command of ours started
        from perlcli.comparison.processes import end_with_parent

        end_with_parent()
    sys.exit(perlcli())
