"""Measuring methods: speed, quality and their trade-off, as tables, figures and JSON.

May import measure, recipes, training, methods, pipeline and what lies below.
"""
