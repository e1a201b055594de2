"""From sources to a token store, by one machine or many.

documents.py  what the sources hold, cut into parts
tokens.py     documents in, tokens out: the pure function
shards.py     a part's documents as shard files
pool.py       shards by the processes of this machine
beam.py       shards, and the search for copies, by Apache Beam
"""
