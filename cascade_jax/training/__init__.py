"""Training: one resumable loop for every recipe of the project."""
