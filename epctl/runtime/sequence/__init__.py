"""Sequence parallelism: one sample over several ranks, vision tower and decoder, exact gradients.

group.py      the ranks that share a sample, and the bytes between them
cuts.py       where the packed patch rows are cut (pure)
heads.py      which rank attends which heads, or gathers keys and values (pure)
documents.py  which rows may see each other, as intervals instead of a mask
attend.py     attention over intervals on one rank
exchange.py   rows to heads and back, variable-length gather
route.py      visual tokens to the ranks that have their placeholders
attention.py  the functions in transformers' attention registry
detect.py     decoder, encoder and what cannot be sharded, by probes
tower.py      positions and segments of a packed tower, for a rank's own rows
units.py      towers that see whole images or tiles, and clips
vision.py     the unmodified tower on this rank's share
decoder.py    the decoder's inputs, sliced before it runs
loss.py       local targets over global valid tokens
parallel.py   the hooks that put it together: `parallelize(model, group)`
"""
