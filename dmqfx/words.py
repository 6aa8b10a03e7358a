"""The nearest legal word, for every error that is about a wrong one."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from types import MappingProxyType

__all__ = ["suggest"]

_OTHER_NAMES = MappingProxyType(
    {
        "act": "input",
        "activation": "input",
        "activations": "input",
        "asym": "affine",
        "asymmetric": "affine",
        "attention_probs": "softmax",
        "attn": "attention",
        "attn_weights": "softmax",
        "conv": "conv2d",
        "fp16": "float",
        "fp32": "float",
        "layer": "at",
        "layers": "at",
        "match": "at",
        "max": "minmax",
        "modules": "at",
        "op": "kind",
        "params": "weight",
        "probabilities": "softmax",
        "probs": "softmax",
        "passes": "pipeline",
        "pattern": "at",
        "scaled_dot_product_attention": "attention",
        "sdpa": "attention",
        "skip": "keep",
        "steps": "pipeline",
    }
)
"""What other tools call our words: likeness of letters would lead from `asymmetric` to `symmetric`."""


def suggest(word: str, legal: Iterable[str]) -> str:
    """A half sentence with the nearest legal word, if one is near, and the legal words, if they are few.

    Example:
        >>> suggest("wieght", ["input", "weight"])
        "did you mean 'weight'? (legal: input, weight)"
    """
    words = sorted(legal)
    other = _OTHER_NAMES.get(word.lower(), "")
    near = [other] if other in words else difflib.get_close_matches(word.lower(), words, n=1, cutoff=0.5)
    few = f"legal: {', '.join(words)}" if words else "there are none"
    if not near:
        return few
    return f"did you mean {near[0]!r}?" + (f" ({few})" if len(words) <= 12 else "")
