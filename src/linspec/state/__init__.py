"""What mixers remember of committed tokens: stage, commit, drop. One file a kind of state."""

# cache kinds register themselves
from linspec.state import half, int4, int8, kv_cache

__all__ = ["half", "int4", "int8", "kv_cache"]
