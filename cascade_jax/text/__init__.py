"""From prompts to what a target is conditioned on, a file for every way of reading them."""
