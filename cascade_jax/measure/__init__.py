"""How fast it is, here and on machines that are not at hand: benchmarks and the best tree.

May import evaluation and what lies below; no picture's quality is judged here.
"""
