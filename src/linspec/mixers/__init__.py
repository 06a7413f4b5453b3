from linspec.mixers.base import MIXERS, Mixer
from linspec.mixers import softmax as _softmax
__all__ = ["MIXERS", "Mixer"]
