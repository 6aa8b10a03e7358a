"""Local problems in parts of columns: against the whole, against parts that do not know of each other, and in memory."""

from __future__ import annotations

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from sweeping import bits, chain, context, recorded, swept
from test_estimate import costs
from torch import Tensor

from dmqfx.graph.registry import pipeline
from dmqfx.graph.table import Codes
from dmqfx.numbers import effort, parts
from dmqfx.numbers.adaround import Annealing, annealed
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.parts import Wide, part_sizes
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.rounding import Reconstruction
from dmqfx.sweep.rows import Rows, _Joined

TAPS = 3
QUICK = Annealing(iterations=60, rate=0.1)


def drawn(seed: int, channels: int = 32, out: int = 48, rows: int = 600) -> tuple[Tensor, Tensor]:
    """Inputs whose channels and taps are correlated, channels of unlike energy, with a mean; and a weight."""
    noise = torch.Generator().manual_seed(seed)
    mixing = torch.randn(channels, channels, generator=noise) * torch.logspace(0, -1.5, channels)[:, None]
    one, each = (
        torch.randn(rows, channels, 1, generator=noise),
        torch.randn(rows, channels, TAPS, generator=noise),
    )
    x = torch.einsum("nct,cd->ndt", one + 0.5 * each, mixing).relu().flatten(1) + 0.5
    return x, torch.randn(out, channels, TAPS, generator=noise)


def problem(seed: int, **changed: object) -> Reconstruction:
    x, weight = drawn(seed)
    how = {"spec": QuantSpec(4, "symmetric", "channel", "mse"), "damping": 0.05, **changed}
    return Reconstruction(x, x @ weight.flatten(1).T, weight, **how)  # type: ignore[arg-type]  # by name


def metric(seed: int) -> Tensor:
    directions = torch.randn(100, 48, generator=torch.Generator().manual_seed(seed))
    return directions.T @ directions / 100


def in_parts(whole: Reconstruction, count: int = 4) -> Wide:
    return Wide(whole, TAPS, whole.weight[0].numel() // count)


def learned(wide: Wide) -> Tensor:
    return wide.improved(
        wide.nearest, lambda part: part.nearest, lambda part, begun: annealed(part, begun, QUICK)
    )


def apart(wide: Wide) -> Tensor:
    """Codes of parts that do not know of each other."""
    nothing = torch.zeros_like(wide._at_first)
    return wide._filled(handed_on(wide._part(columns, nothing)) for columns in wide.parts)


@given(st.integers(1, 3000), st.sampled_from((1, 9)), st.integers(9, 500))
def test_parts_are_whole_channels_in_equal_shares_that_are_not_too_wide(
    channels: int, taps: int, widest: int
) -> None:
    sizes = part_sizes(channels * taps, taps, widest)
    assert sum(sizes) == channels * taps
    assert all(size % taps == 0 and 0 < size <= widest for size in sizes)
    assert max(sizes) - min(sizes) <= taps
    assert (len(sizes) == 1) == (channels * taps <= widest)


@settings(deadline=None, max_examples=15)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from((2, 4)))
def test_parts_are_about_as_good_as_the_whole_and_better_than_parts_that_hand_nothing_on(
    seed: int, felt: bool, count: int
) -> None:
    whole = problem(seed, metric=metric(seed) if felt else None)
    wide = in_parts(whole, count)
    assert len(wide.parts) == count
    handed, alone = (whole.loss(codes.double()) for codes in (wide.solved(handed_on), apart(wide)))
    assert handed <= (1.15 if count == 2 else 1.2) * whole.loss(handed_on(whole))
    assert handed < 0.95 * alone


@pytest.mark.parametrize("felt", [False, True])
def test_on_average_parts_cost_less_than_a_tenth(felt: bool) -> None:
    ratios = []
    for seed in range(8):
        whole = problem(seed, metric=metric(seed) if felt else None)
        ratios.append(whole.loss(in_parts(whole).solved(handed_on).double()) / whole.loss(handed_on(whole)))
    assert sum(ratios) / len(ratios) < 1.1


@settings(deadline=None, max_examples=10)
@given(st.integers(0, 1000), st.booleans(), st.sampled_from((0.0, 1.0)), st.booleans())
def test_learning_in_parts_is_never_worse_than_its_start(
    seed: int, felt: bool, asymmetric: float, by_gptq: bool
) -> None:
    wide = in_parts(problem(seed, metric=metric(seed) if felt else None, asymmetric=asymmetric))
    start = wide.solved(handed_on) if by_gptq else wide.nearest
    begin = handed_on if by_gptq else lambda part: part.nearest
    found = wide.improved(start, begin, lambda part, begun: annealed(part, begun, QUICK))
    assert wide.loss(found) <= wide.loss(start)
    if not by_gptq:
        assert wide.loss(found) < 0.9 * wide.loss(start)
        exact = wide._grid.exact(wide._weight.double())
        assert float((found - exact).abs().max()) < 1


def test_a_worse_end_gives_the_start_back() -> None:
    wide = in_parts(problem(0))
    start = wide.solved(handed_on)
    assert wide.improved(start, handed_on, lambda part, begun: part.grid.qmin + 0 * begun) is start


@pytest.mark.parametrize("felt", [False, True])
def test_the_loss_from_rows_is_that_of_the_whole_gram(felt: bool) -> None:
    x, _ = drawn(0)
    importance = torch.rand(len(x), generator=torch.Generator().manual_seed(1))
    whole = problem(0, metric=metric(0) if felt else None, importance=importance)
    wide = in_parts(whole)
    codes = wide.solved(handed_on)
    assert wide.loss(codes) == pytest.approx(whole.loss(codes.double()), rel=1e-9)
    found, expected = wide.rounded(codes), whole.rounded(codes.double())
    assert torch.equal(found.codes, expected.codes)
    assert torch.allclose(found.offset, expected.offset, rtol=1e-9)


def test_the_asymmetric_target_makes_up_for_what_happened_upstream() -> None:
    whole = problem(2)
    given_ = whole.given * torch.linspace(0.8, 1.2, whole.given.shape[1])
    errors = []
    for share in (0.0, 1.0):
        wide = in_parts(replace(whole, given=given_, damping=0.001, asymmetric=share))
        found = wide.rounded(wide.solved(handed_on))
        real = wide._grid.real(found.codes.flatten(1).double()).float()
        errors.append(float((given_ @ real.T + found.offset - whole.wanted).square().mean()))
    assert errors[1] < 0.5 * errors[0]


def test_the_same_problem_gives_the_same_bits() -> None:
    one, two = (learned(in_parts(problem(3, metric=metric(3)))) for _ in range(2))
    assert torch.equal(one, two)


def test_a_problem_that_is_not_too_wide_is_solved_as_ever() -> None:
    whole = problem(4)
    wide = Wide(whole, TAPS)
    assert wide.is_whole
    assert torch.equal(wide.solved(handed_on), handed_on(whole))
    assert torch.equal(learned(wide), annealed(whole, whole.nearest, QUICK))
    assert wide.loss(wide.nearest) == whole.loss(whole.nearest)


@pytest.mark.parametrize("dead", ["part", "all", "constant"])
def test_inputs_that_never_vary_give_codes_all_the_same(dead: str) -> None:
    whole = problem(5)
    x = whole.given.clone()
    x[:, : 24 if dead == "part" else None] = 2.0 if dead == "constant" else 0.0
    wide = in_parts(replace(whole, given=x))
    found = wide.rounded(wide.solved(handed_on))
    assert torch.isfinite(found.offset).all()
    assert found.codes.shape == whole.weight.shape


@pytest.mark.parametrize("method", ["gptq", "adaround"])
def test_a_pass_rounds_in_parts_what_is_too_wide(method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"method": method, "rows": 64, **({"iterations": 40} if method == "adaround" else {})}
    steps = (("fit-ranges", {}), ("round-weights", options))

    def codes() -> dict[str, Codes]:
        after = swept(chain(), context(recorded(chain(), 6)), steps)
        return {str(site): entry for site, entry in after.table.of(Codes).items()}

    whole = codes()
    monkeypatch.setattr(parts, "WIDEST", 36)  # 4 of 8 channels
    cut = codes()
    assert cut.keys() == whole.keys()
    assert any(not torch.equal(cut[at].packed, whole[at].packed) for at in whole)
    assert all(torch.equal(cut[at].qparams.scale, whole[at].qparams.scale) for at in list(whole)[:1])


TAKEN = """
import json, sys, torch
from pathlib import Path
from dmqfx.numbers.gptq import handed_on
from dmqfx.numbers.parts import Wide
from dmqfx.numbers.quant import QuantSpec
from dmqfx.numbers.rounding import Reconstruction

def status(key):
    return next(int(line.split()[1]) * 1024 for line in Path("/proc/self/status").open() if line.startswith(key))

torch.set_num_threads(1)
x, w = torch.randn(300, 9999), torch.randn(16, 1111, 3, 3)
y = x.double() @ w.flatten(1).double().T
Reconstruction(x[:, :90], y, w[:, :10], QuantSpec(4, "symmetric", "channel", "mse")).gram
Path("/proc/self/clear_refs").write_text("5")
before = status("VmRSS")
wide = Wide(Reconstruction(x, y, w, QuantSpec(4, "symmetric", "channel", "mse")), 9, 1200)
codes = wide.solved(handed_on)
wide.loss(codes)
wide.rounded(codes)
print(json.dumps({"taken": status("VmHWM") - before}))
"""


def test_ten_thousand_columns_take_the_memory_of_a_part() -> None:
    """A whole Gram in double precision would be 800 MB a copy, and the rows 24 MB."""
    done = subprocess.run(
        [sys.executable, "-c", TAKEN], capture_output=True, text=True, check=True, timeout=300
    )
    taken = json.loads(done.stdout)["taken"]
    assert taken < 150 * 2**20


def test_the_estimate_of_a_wide_problem_is_far_below_its_gram() -> None:
    told = effort.nbytes(8192, 23040, 1280, 9)
    assert 2**30 < told < 3.9 * 2**30 < 8 * 23040**2


def test_the_told_memory_has_what_the_largest_problem_computes_with() -> None:
    found, _ = costs(4)
    count = 2**18
    steps = pipeline([("round-weights", {"method": "gptq", "rows": count})]).steps
    told, alone = (found.estimate(each, 4, 2**40).memory for each in (steps, ()))  # type: ignore[arg-type]  # a sweep pass
    widest = max(reader.columns for reader in found.schedule.readers)
    rows, deployed, doubled = 8 * count * widest, 4 * count * widest, 8 * count * widest
    assert told - alone > rows + deployed + doubled - found.working


def test_operands_that_the_budget_has_no_room_for_are_told(caplog: pytest.LogCaptureFixture) -> None:
    """The rows have room and nothing else; what is found is the same."""
    steps = (("fit-ranges", {}), ("round-weights", {"method": "gptq", "rows": 900}))
    ctx = context(recorded(chain(), 9))
    roomy = swept(chain(), ctx, steps)
    assert "taken beside it" not in caplog.text
    found = costs(4)[0]
    rows = 9 * 64 * 2 * 4 * max(reader.columns for reader in found.schedule.readers)
    tight = swept(chain(), replace(ctx, memory=found.working + rows), steps)
    assert "the operands of the local problem of conv" in caplog.text
    assert "taken beside it" in caplog.text
    assert bits(tight.table) == bits(roomy.table)


def test_rows_of_chunks_that_are_and_are_not_quantized_are_joined_as_they_are() -> None:
    x = torch.arange(24.0).view(6, 4)

    def part(start: int, change: float) -> Rows:
        real = x[start : start + 2]
        quantized = real + change if change else real
        return Rows(real, quantized, torch.full((2,), float(start)), torch.tensor([start, start + 1]))

    joined = _Joined(9)
    for start, change in ((0, 0.0), (2, 0.5), (4, 0.0)):
        joined.add(part(start, change))
    found = joined.rows()
    assert torch.equal(found.real, x)
    assert torch.equal(found.quantized - x, torch.tensor([0, 0, 0.5, 0.5, 0, 0])[:, None].expand(6, 4))
    assert found.sample.tolist() == list(range(6))
    alike = _Joined(9)
    alike.add(part(0, 0.0))
    same = alike.rows()
    assert same.quantized is same.real
