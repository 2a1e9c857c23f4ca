"""Training: one resumable loop for every recipe, and what drafters take: data that a target drew, losses, runs.

May import methods, pipeline, text and what lies below; it knows no drafter by name.
"""
