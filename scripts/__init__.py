"""Scripts: one run each, `dynrl VERB` or `python scripts/VERB.py`."""
