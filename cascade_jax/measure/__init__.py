"""How fast it is, here and on machines that are not at hand: clock, benchmarks, plans and the best tree.

May import methods, pipeline and what lies below; no picture's quality is judged here.
"""
