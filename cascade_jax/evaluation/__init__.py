"""Measuring methods: speed, quality and their trade-off, as tables, figures and JSON."""
