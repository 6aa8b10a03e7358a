"""Hypothesis strategies for UNets, programs and pipelines; policies are in strategies_policy."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

from diffusers import UNet2DConditionModel, UNet2DModel
from hypothesis import strategies as st
from models import Model, captured
from planting import bare
from toys import toy

from dmqfx.checking.shrink import randomize
from dmqfx.graph.facts import Fact
from dmqfx.graph.pipeline import Pass, Preserves
from dmqfx.graph.program import Program
from dmqfx.graph.registry import passes

SMALL = ("classes", "inpainting")
"""Real models of one level: what a fast test can afford to capture."""


def programs() -> st.SearchStrategy[Program]:
    """The toy, or a real UNet of one level; each is captured once per process."""
    return st.sampled_from(("toy", *SMALL)).map(_program)


@cache
def _program(name: str) -> Program:
    return toy() if name == "toy" else captured(name)[1]


@st.composite
def unets(draw: st.DrawFn) -> Model:
    """A small UNet with random parameters; levels, widths, blocks, attention and conditioning vary."""
    levels = draw(st.integers(1, 3))
    conditional = draw(st.booleans())
    config: dict[str, object] = {
        "sample_size": 8,
        "in_channels": draw(st.sampled_from((1, 3, 4))),
        "out_channels": draw(st.sampled_from((1, 3, 4))),
        "block_out_channels": tuple(
            draw(st.lists(st.sampled_from((8, 16, 24)), min_size=levels, max_size=levels))
        ),
        "layers_per_block": draw(st.integers(1, 2)),
        "norm_num_groups": draw(st.sampled_from((2, 4, 8))),
        "attention_head_dim": draw(st.sampled_from((2, 4))),
        "act_fn": draw(st.sampled_from(("silu", "gelu"))),
        "resnet_time_scale_shift": draw(st.sampled_from(("default", "scale_shift"))),
    }
    attends = draw(st.lists(st.booleans(), min_size=levels, max_size=levels))
    if conditional:
        config |= _crossed(attends)
        config |= {"cross_attention_dim": 12, "use_linear_projection": draw(st.booleans())}
    else:
        config |= _blocks(attends, "AttnDownBlock2D", "AttnUpBlock2D")
        config |= {"num_class_embeds": draw(st.sampled_from((None, 5)))}
    model = (UNet2DConditionModel if conditional else UNet2DModel)(**config)
    randomize(model, seed=draw(st.integers(0, 3)))
    return model.eval().requires_grad_(False)


def _crossed(attends: Sequence[bool]) -> dict[str, object]:
    return _blocks(attends, "CrossAttnDownBlock2D", "CrossAttnUpBlock2D")


def _blocks(attends: Sequence[bool], down: str, up: str) -> dict[str, object]:
    return {
        "down_block_types": tuple(down if attend else "DownBlock2D" for attend in attends),
        "up_block_types": tuple(up if attend else "UpBlock2D" for attend in reversed(attends)),
    }


@st.composite
def pipelines(draw: st.DrawFn, longest: int = 14) -> tuple[Pass, ...]:
    """Exact passes in any order that their facts allow, some more than once but most of them new."""
    known: frozenset[Fact] = frozenset()
    steps: list[Pass] = []
    for _ in range(draw(st.integers(1, longest))):
        legal = [cls for cls in exact_passes() if cls().needs <= known and not cls.forbids & known]
        new = [cls for cls in legal if cls not in map(type, steps)]
        onward = bool(new) and draw(st.integers(0, 3)) > 0
        steps.append(bare(draw(st.sampled_from(new if onward else legal)).name()))
        known = (known - steps[-1].clears) | steps[-1].provides
    return tuple(steps)


@cache
def exact_passes() -> tuple[type[Pass], ...]:
    """The built-in passes that promise to keep the output and stand before the lossy one."""
    ours = [cls for cls in passes().values() if cls.__module__.startswith("dmqfx.passes.")]
    return tuple(
        cls for cls in ours if cls.preserves is not Preserves.LOSSY and "qdq" not in map(str, cls.requires)
    )
