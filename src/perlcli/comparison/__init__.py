"""Comparing ways to train: which runs it takes, their processes, results and reports."""
