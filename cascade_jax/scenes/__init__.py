"""Scenes: a controlled world of small captioned pictures, and the embedded model that draws it."""
