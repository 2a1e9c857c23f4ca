"""The embedded model at run time: a controlled world of small captioned pictures, its captions, its judge's network.

What it takes to train these stands in `recipes`. May import models and what lies below.
"""
