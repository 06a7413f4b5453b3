"""How one request turns logits into tokens: its settings, the rules they make, its random numbers.

sampler = Sampler(SamplingParams(temperature=0.8, seed=1), prompt_ids, vocab_size)
token = sampler.draw(sampler.probabilities(logits))
"""

from linspec.decoding.sampling.grammar import Grammar
from linspec.decoding.sampling.params import SamplingParams
from linspec.decoding.sampling.sampler import Sampler

__all__ = ["Grammar", "Sampler", "SamplingParams"]
