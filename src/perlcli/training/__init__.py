"""Everything between a stage's settings and TRL's trainers."""
