"""What pictures are measured with, one metric a file.

May import recipes, scenes, bundle, models and what lies below.
"""
