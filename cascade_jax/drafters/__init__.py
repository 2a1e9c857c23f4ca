"""Drafters, one a file: a configuration, a module, and what it remembers between steps (`draft.Drafter`).

Each is registered in `models.families`. May import `models.transformer` and the engine; no family of targets.
"""
