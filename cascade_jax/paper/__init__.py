"""The paper's tables and figures, its own numbers, and traces of single pictures.

May import measure, evaluation and what lies below.
"""
