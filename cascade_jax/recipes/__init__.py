"""How the parts of `scenes` are trained from nothing, on any platform: tokenizer, target, drafter, judge; and packed.

May import training, scenes, text, bundle, models and what lies below.
"""
