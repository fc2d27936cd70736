"""A stand-in for Bunny, written for the tests: the names that llava_region hooks, around a small Phi with a SigLIP tower.

Nothing of Bunny's is in it. It is put on PYTHONPATH of child processes only, so that it never hides a real Bunny.
"""
