"""How the parts of `scenes` are trained from nothing.

May import training, scenes, bundle, models and what lies below.
"""
