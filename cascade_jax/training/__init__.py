"""Training: one resumable loop for every recipe, and what drafters take: data that a target drew, losses, runs.

May import pipeline, methods, text and what lies below; no recipe, and no drafter or family by name.
"""
