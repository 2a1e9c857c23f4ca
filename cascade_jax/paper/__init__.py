"""The paper's tables and figures, its own numbers, and traces of single pictures.

May import evaluation, measure, drafters and what lies below.
"""
