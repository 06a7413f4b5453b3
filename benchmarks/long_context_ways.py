"""Ways to read the past that `benchmarks.long_context` compares: names, and specs of `--attention`."""

from __future__ import annotations

from dataclasses import dataclass

from linspec.llm import LLM

# attention whose caches can be in 8 bits
_IN_8_BITS = ("pages", "delta", "tidal", "lserve")


@dataclass(frozen=True, slots=True)
class Way:
    """A model, how its cache is kept, and what its softmax layers read of it."""

    model: str = "smollm2"
    kv: str = "int8"
    attention: str | None = None
    rope_scaling: str | None = None

    def load(self, model: str | None, quantize: int | None = None) -> LLM:
        """The way, of another model where one is named, with weights of so many bits."""
        return LLM(
            model or self.model,
            kv_cache_dtype=self.kv,
            attention=self.attention,
            rope_scaling=self.rope_scaling,
            quantize=quantize,
        )


WAYS = {
    "float32": Way(kv="float32"),
    "int8": Way(),
    "int4": Way(kv="int4"),
    "codes 512": Way(attention="pages:budget=512,judge=codes"),
    "codes 1024": Way(attention="pages:budget=1024,judge=codes"),
    "codes 2048": Way(attention="pages:budget=2048,judge=codes"),
    "bounds 512": Way(attention="pages:budget=512,judge=bounds"),
    "bounds 1024": Way(attention="pages:budget=1024,judge=bounds"),
    "bounds 2048": Way(attention="pages:budget=2048,judge=bounds"),
    # no caches, and their rows beside two near groups are as many
    "h2o 512": Way(kv="auto", attention="h2o:budget=512"),
    "h2o 1024": Way(kv="auto", attention="h2o:budget=1024"),
    "snapkv 512": Way(kv="auto", attention="snapkv:budget=512"),
    "snapkv 1024": Way(kv="auto", attention="snapkv:budget=1024"),
    "streaming 512": Way(kv="auto", attention="streaming:span=10,sinks=4"),
    "streaming 1024": Way(kv="auto", attention="streaming:span=18,sinks=4"),
    "shadow 512": Way(kv="auto", attention="shadow:budget=512"),
    "shadow 1024": Way(kv="auto", attention="shadow:budget=1024"),
    "delta 0.5": Way(attention="delta:threshold=0.5"),
    "delta 1": Way(attention="delta:threshold=1"),
    "delta 2": Way(attention="delta:threshold=2"),
    "tidal 256": Way(attention="tidal:budget=256,first=2,again=13"),
    "tidal 256, again 8": Way(attention="tidal:budget=256,first=2,again=8"),
    "tidal 256, again 10": Way(attention="tidal:budget=256,first=2,again=10"),
    "tidal 256, again 16": Way(attention="tidal:budget=256,first=2,again=16"),
    "int8, yarn": Way(rope_scaling="yarn:4"),
    "codes 1024, yarn": Way(attention="pages:budget=1024,judge=codes", rope_scaling="yarn:4"),
    "codes 2048, yarn": Way(attention="pages:budget=2048,judge=codes", rope_scaling="yarn:4"),
    "lserve 1024": Way(attention="lserve:budget=1024"),
    "lserve 1024, 22 heads": Way(attention="lserve:budget=1024,exact=22"),
    "lserve 2048": Way(attention="lserve:budget=2048"),
    "lserve all": Way(attention="lserve:budget=32768"),
    "smollm2-aug": Way(model="smollm2-aug"),
    "smollm2-aug, codes 512": Way(model="smollm2-aug", attention="pages:budget=512,judge=codes"),
    "smollm2-aug, codes 1024": Way(model="smollm2-aug", attention="pages:budget=1024,judge=codes"),
    "smollm2-aug, bounds 1024": Way(
        model="smollm2-aug", attention="pages:budget=1024,judge=bounds"
    ),
    "smollm2-aug-22": Way(model="smollm2-aug-22"),
}


def way_of(name: str) -> Way:
    """The way of this name, or of this spec of attention."""
    if name in WAYS:
        return WAYS[name]
    cached = name.partition(":")[0] in _IN_8_BITS
    return Way(kv="int8" if cached else "auto", attention=name)
