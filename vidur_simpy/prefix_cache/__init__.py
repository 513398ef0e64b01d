"""Prefix caching: KV-cache blocks that stay findable by their content after they are freed.

A block is held by requests, or free and blank, or free and cached: still found under its content
until it is handed out again. The rules are those of vLLM V1, block by block, but the work is done
by the run: blocks that are registered, held, freed and reused together cost as much as one.
"""

from vidur_simpy.prefix_cache.cache import NO_HIT, Hit, PrefixCache
from vidur_simpy.prefix_cache.content import Holder, Prefixes, Run

__all__ = ["NO_HIT", "Hit", "Holder", "PrefixCache", "Prefixes", "Run"]
