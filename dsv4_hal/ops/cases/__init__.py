"""Cases of every op, one file per family as in the contract; what they are made of is in `inputs.py`.

A case is a function of (ops, generator) and of its parameters, and its id names exactly these parameters. Results are
compared by name:
- `picks`       entries or experts that were chosen, compared as sets up to a margin of the scores in `candidates`
- `candidates`  the score of everything that could be chosen, -inf for what could not
- `counts`      how often each token was drawn, compared as a distribution
- any other whole number or boolean must be equal, also where floating results may differ: ties are tested this way
- `kv...`, `index...`  rows that were rounded to numerics.kv, numerics.index
"""
