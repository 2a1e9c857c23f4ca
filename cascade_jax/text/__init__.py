"""From prompts to what a target is conditioned on: one reader of prompt files, and a file for every way of encoding.

May import scenes, bundle, models and what lies below.
"""
