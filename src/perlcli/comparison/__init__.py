"""Comparing ways to train: which runs it takes, their processes, their figures and the report."""
