"""Each script is a verb: `dynrl VERB` or `python scripts/VERB.py` runs it."""
