"""linspec beside the engines that a user would pick instead: `python -m benchmarks.peers`.

Nothing is imported here: a peer may run in an interpreter that has neither torch nor transformers.
"""
