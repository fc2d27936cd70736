"""What is installed, whether training can work with it, and the command that fixes what is broken.

`versions` is the table of what the upstreams work with, `facts` looks at the machine, `rules` judges what was found: a pure
function over facts, so that every set of versions known to be bad is a test. No upstream is named in here: what is to be
known of one, it says itself (`patches/upstream.py`).
"""
