"""The checks of `perl doctor`."""
