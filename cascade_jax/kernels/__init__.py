"""What a GPU does in one launch where XLA would need many, written in Pallas for Triton.

Each stands for a plain function, which is what every other platform runs, and gives what that one gives; see
`platforms.by_lowering`.
"""
