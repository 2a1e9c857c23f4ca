"""Programs in a file, for every platform at once.

May import methods, pipeline and what lies below.
"""
