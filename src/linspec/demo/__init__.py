"""The whole story in minutes: a softmax teacher becomes a linear student that decodes in rounds.

result = run_demo(out=Path("demo"), quick=True)
print(result.teacher_bits_per_byte, result.student_bits_per_byte, result.lossless)
"""

from linspec.demo.result import Decoded, DemoResult
from linspec.demo.run import run_demo

__all__ = ["Decoded", "DemoResult", "run_demo"]
