"""Finds the Perl interpreter behind our own `perl`. Imported before each Perl program, so it needs only os and sys."""

import os
import sys

# Marks of a script called `perl` that would start perlcli again: our own wrapper in any environment, and the shims
# that Python version managers write for each script of an installed package.
OUR_MARKS = (b"perlcli", b"pyenv", b"asdf-plugin: python")
SCRIPT_BYTES = 4096  # a wrapper is some 200 bytes, 1,000 with a long interpreter path


def find_interpreter(path: str) -> str | None:
    """The first executable `perl` on `path` that is not a script of ours; None if there is none."""
    ourselves = os.path.realpath(sys.argv[0])
    for folder in path.split(os.pathsep):
        candidate = os.path.join(folder or os.curdir, "perl")  # an empty entry is the current folder
        if not os.path.isfile(candidate) or not os.access(candidate, os.X_OK):
            continue
        if os.path.realpath(candidate) != ourselves and not leads_back(candidate):
            return candidate
    return None


def leads_back(candidate: str) -> bool:
    """Whether `candidate` is a script that would start perlcli again, judged by its contents. An environment variable
    would not do: the programs that Perl starts would inherit it."""
    try:
        with open(candidate, "rb", buffering=0) as file:
            start = file.read(SCRIPT_BYTES)
    except OSError:  # executable but not readable: not a script, which its interpreter must read
        return False
    return start.startswith(b"#!") and any(mark in start for mark in OUR_MARKS)
