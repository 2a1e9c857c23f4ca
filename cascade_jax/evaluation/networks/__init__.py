"""The networks that metrics ask, and how features of pictures are distributed.

May import recipes, training, scenes, bundle, models and what lies below; no other metric than `metrics.metric`.
"""
