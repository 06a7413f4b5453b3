"""linspec beside other engines, on the same weights. Runs from a clone; it is not part of the wheel.

python -m benchmarks.peers --shapes 110m --quick
python -m benchmarks.against_transformers
"""
