"""Array operations of pruned decoding: one folder an operation, knowing nothing of models.

Each folder has the mathematics in `reference.py` and a public function that picks an
implementation.
"""
