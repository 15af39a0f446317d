"""Reads a row of each known format: `plain` has TRL's and the trainers' formats, the others those of datasets and of
labelling tools."""
