"""Measurements behind a paper or a page. They run from a clone; they are not part of the wheel.

python -m studies.linearized_llm --table quality --budget 30
"""
