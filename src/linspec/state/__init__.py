"""What mixers remember of committed tokens: stage, commit, drop. One file a kind of state."""

# cache kinds register themselves
from linspec.state import bfloat16, int8, kv_cache

__all__ = ["bfloat16", "int8", "kv_cache"]
