"""From raw text to batches of token ids.

sources.py   text out of files, TensorFlow Datasets and Python itself
cleaning.py  one document in, one clean document (or none) out
store.py     the token store: flat arrays of ids and flags on disk
rows.py      the plan that packs documents into rows
batches.py   the batch at a step

Nothing in here imports JAX, a tokenizer or a model.
"""
