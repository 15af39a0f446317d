"""The command line: the Typer app, options made from settings, and the boundary where errors become exit codes."""
