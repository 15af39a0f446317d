"""A run's folder: its record and other files, from start to end."""
