"""What layers cost on this machine: measured, kept, and followed by choose-forms."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from planting import context, program_before

from dmqfx.checking.verify import verify
from dmqfx.cli import main, sources
from dmqfx.errors import DmqfxError
from dmqfx.graph import ops
from dmqfx.graph.pipeline import run_step
from dmqfx.graph.program import Program
from dmqfx.graph.registry import create
from dmqfx.runtime import costs, timing
from dmqfx.runtime.costs import Cost, Costs, keep, layer_of, size_of
from dmqfx.runtime.targets import lower
from dmqfx.seeing.bits import site_bits, sites
from dmqfx.seeing.inventory import inventory

CONV = "down.conv1/conv2d"
SLOWER = (
    "in codes 2 ms, in float 1 ms, which would be another result; leave it float by `keys` or `at` of the step "
    "quantize-attention, and compile again"
)


@pytest.fixture(autouse=True)
def own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of its own for each test."""
    monkeypatch.setenv("DMQFX_CACHE", str(tmp_path))
    return tmp_path


def finished(policy: str = "layers") -> Program:
    return program_before("lower-reference", policy)


def with_costs(cost: Cost, *addresses: str) -> None:
    """As if layers at some addresses, or all, cost so much."""
    nodes = [n for n in finished().calls("conv2d", "linear") if layer_of(n) is not None]
    chosen = [n for n in nodes if not addresses or str(n.meta["address"]) in addresses]
    assert chosen
    keep({(str(layer_of(n)), size_of(n)): cost for n in chosen})


def test_without_a_measurement_every_layer_is_native_and_it_is_said() -> None:
    result = run_step(create("choose-forms"), finished(), context())
    assert not result.log[-1].applied
    count = len([n for n in finished().calls("conv2d", "linear") if layer_of(n) is not None])
    told = f"0 of {count} layers stay simulated, {count} were not measured here (dmqfx bench)"
    assert result.log[-1].note == told


@pytest.mark.parametrize("policy", ["layers", "shifts", "attended"])
def test_what_is_faster_simulated_stays_so_and_computes_the_same(policy: str) -> None:
    before = finished(policy)
    kinds = {
        (str(layer_of(n)), size_of(n)) for n in before.calls("conv2d", "linear") if layer_of(n) is not None
    }
    keep(dict.fromkeys(kinds, Cost(2.0, 1.0)))
    assert verify(before, create("choose-forms"), context(policy)).error == 0
    result = run_step(create("choose-forms"), before, context(policy))
    assert len(result.log[-1].applied) > len(kinds) / 2
    assert result.log[-1].applied[0].what == "native 2 ms, simulated 1 ms"
    lowered = lower(before, "cpu")
    assert not list(lowered.calls("kernel_conv2d", "kernel_linear", "qconv2d", "qlinear"))
    inputs = {"sample": torch.randn(2, 3, 8, 8), "timestep": torch.tensor([10.0, 800.0])}
    with torch.no_grad():
        expected, found = lower(before, "simulate").gm(*inputs.values()), lowered.gm(*inputs.values())
    assert float((found - expected).norm() / expected.norm()) < 1e-5


def test_one_slow_layer_is_left_out_and_keeps_its_bits() -> None:
    with_costs(Cost(1.0, 2.0))
    with_costs(Cost(2.0, 1.0), CONV)
    lowered = lower(finished(), "cpu")
    forms = {
        str(n.meta["address"]): n.target.__name__ for n in lowered.calls() if CONV in str(n.meta["address"])
    }
    assert forms[CONV] == "conv2d.default"
    assert list(lowered.calls("kernel_conv2d"))
    record = next(done for done in lowered.log if done.name == "choose-forms")
    assert [str(each.at) for each in record.applied] == [CONV]
    assert record.note.startswith("1 of ")
    assert "not measured" not in record.note
    bits = {s.arg: site_bits(lowered, s) for s in sites(record.applied[0].at)}
    assert {arg: each.got for arg, each in bits.items()} == {"input": 8, "weight": 4}
    assert all(each.as_asked for each in bits.values())
    (item,) = inventory(lowered, CONV)
    assert (item.op, item.because) == ("conv2d", ("native 2 ms, simulated 1 ms",))


def test_layers_that_read_one_quantize_stay_together() -> None:
    shared = [f"mid.to_{name}/linear" for name in "qkv"]
    slow = {str(n.meta["address"]): n for n in finished().calls("linear") if str(n.meta["address"]) in shared}
    assert len({ops.tensor(ops.tensor(n, "input"), "codes") for n in slow.values()}) < 3
    kinds = {
        (str(layer_of(n)), size_of(n))
        for n in finished().calls("conv2d", "linear")
        if layer_of(n) is not None
    }
    of_one = (str(layer_of(slow[shared[0]])), size_of(slow[shared[0]]))
    for cost, together in ((Cost(2.0, 1.0), True), (Cost(1.0, 2.0), False)):
        keep({**dict.fromkeys(kinds, Cost(1.0, 2.0)), of_one: cost})
        chosen = {str(a.at) for a in run_step(create("choose-forms"), finished(), context()).log[-1].applied}
        assert (set(shared) <= chosen) == together
        assert not chosen or set(shared) & chosen


def test_a_size_that_was_measured_decides_for_itself() -> None:
    costs = Costs({("a", "2x4"): Cost(2.0, 1.0), ("a", "2x400x4"): Cost(10.0, 20.0)})
    assert costs.of("a", "2x4") == Cost(2.0, 1.0)
    assert costs.of("a", "9x9x4") == Cost(12.0, 21.0)


def test_a_little_faster_is_not_faster() -> None:
    with_costs(Cost(1.0, 0.97))
    assert not run_step(create("choose-forms"), finished(), context()).log[-1].applied


def test_costs_come_back_from_their_file_and_newer_ones_take_the_place_of_older(own_folder: Path) -> None:
    one, two = {("a", "1x2"): Cost(1.0, 2.0)}, {("a", "1x2"): Cost(3.0, 2.5), ("b", "4"): Cost(0.1, 0.2)}
    path = keep(one)
    assert path.parent == own_folder
    keep(two)
    assert Costs.here() == Costs({**one, **two})
    assert json.loads(path.read_text())["machine"] == costs.machine()
    assert {p.name for p in own_folder.iterdir()} == {path.name, "lock"}


def test_env_tells_what_was_measured(capsys: pytest.CaptureFixture[str]) -> None:
    keep({("a", "1"): Cost(1.0, 2.0), ("b", "1"): Cost(2.0, 1.0)})
    assert main(["env", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)["layer costs"]
    assert told == f"2 kinds of layers and attention, 1 of them slower by native kernels: {costs.file()}"


def test_other_threads_have_other_costs() -> None:
    keep({("a", "1"): Cost(1.0, 2.0)})
    threads = torch.get_num_threads()
    try:
        torch.set_num_threads(threads + 1)
        assert Costs.here() == Costs()
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    "text",
    [
        '{"format": "dmqfx.costs/9", "machine": {}, "layers": []}',
        "",
        "{",
        "[]",
        '{"layers": [{"layer": "a"}]}',
        '{"layers": [{"layer": 1, "input": 2, "native": "x", "otherwise": 1}]}',
    ],
)
def test_a_damaged_file_is_told_and_counts_as_none(text: str, caplog: pytest.LogCaptureFixture) -> None:
    costs.file().write_text(text)
    with caplog.at_level(logging.WARNING, "dmqfx"):
        assert Costs.here() == Costs()
    assert "mend: delete it, or run dmqfx bench again" in caplog.text


def test_both_forms_of_each_kind_are_timed_and_compute_the_same() -> None:
    for policy in ("layers", "shifts"):
        kinds = timing.kinds(finished(policy))
        assert len({(kind.name, kind.size) for kind in kinds}) == len(kinds) > 5
        assert sum(len(kind.addresses) for kind in kinds) >= len(kinds)
        for kind in kinds:
            native, simulated = (run() for run in kind.forms())
            assert isinstance(native, torch.Tensor)
            assert isinstance(simulated, torch.Tensor)
            torch.testing.assert_close(native, simulated, rtol=1e-4, atol=1e-4 * float(simulated.abs().max()))
        cost = kinds[0].measure(0.001)
        assert cost.native > 0
        assert cost.otherwise > 0


def test_attention_in_codes_is_timed_beside_float_and_where_it_is_slower_that_is_said(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = finished("attended")
    (kind,) = (each for each in timing.kinds(before) if each.is_coded)
    assert (kind.name, kind.size, kind.otherwise) == ("attention 2x4 a8", "2x2x16x4 to 16 keys", "float")
    coded, exact, by_torch = (run() for run in kind.forms())
    assert isinstance(coded, torch.Tensor)
    assert isinstance(exact, torch.Tensor)
    torch.testing.assert_close(exact, by_torch)
    assert 0 < float((coded - exact).norm() / exact.norm()) < 0.05
    for cost, said in ((Cost(1.0, 2.0), []), (Cost(2.0, 1.0), [SLOWER])):
        keep({(kind.name, kind.size): cost})
        lowered = lower(before, "cpu")
        record = next(done for done in lowered.log if done.name == "choose-forms")
        assert [each.reason for each in record.refused] == said
        assert len(list(lowered.calls("kernel_attention"))) == 1
    monkeypatch.setattr(sources, "load_stored", lambda _: SimpleNamespace(program=before))
    monkeypatch.setattr(timing.Kind, "measure", lambda self, _: Cost(2.0, 1.0 if self.is_coded else 3.0))
    assert main(["bench", "attended", "--quiet"]) == 0
    told = capsys.readouterr().out
    assert "1 of them slower by native kernels" in told
    assert "attention in codes is slower than in float at mid/scaled_dot_product_attention\n" in told
    assert "mend: leave it float by `keys` or `at`" in told


def test_other_sizes_have_other_costs() -> None:
    small, large = (
        {(k.name, k.size) for k in timing.kinds(each)}
        for each in (finished(), timing.resized(finished(), B=5, H=16, W=16))
    )
    assert not small & large
    assert {name for name, _ in small} == {name for name, _ in large}


def test_sizes_that_the_model_does_not_take_are_refused_by_name() -> None:
    assert finished().inputs.multiple_of == 2
    with pytest.raises(DmqfxError, match="does not take W = 7: it must be a multiple of 2"):
        timing.resized(finished(), H=8, W=7)


def test_without_kernels_there_is_nothing_to_measure(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(timing, "absent", lambda: "the library of native kernels is not there; mend it")
    with pytest.raises(DmqfxError, match="not there; mend it"):
        timing.kinds(finished())


def test_bench_measures_a_saved_model_and_loading_follows(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], own_folder: Path
) -> None:
    import diffusers

    import dmqfx

    levels = {"down_block_types": ("DownBlock2D",), "up_block_types": ("UpBlock2D",)}
    unet = diffusers.UNet2DModel(block_out_channels=(8,), norm_num_groups=2, sample_size=8, **levels)
    folder = tmp_path / "small"
    dmqfx.compile(unet, "w4a8-quick", target="cpu", report_rows=0, progress=False).save_pretrained(folder)
    assert (
        main(
            [
                "bench",
                str(folder),
                "--batch",
                "3",
                "--size",
                "16x8",
                "--seconds",
                "0.001",
                "--json",
                "--quiet",
            ]
        )
        == 0
    )
    said = json.loads(capsys.readouterr().out)
    assert set(said) == {"machine", "file", "layers"}
    assert Path(said["file"]).parent == own_folder
    assert all(each["input"].startswith("3x") for each in said["layers"])
    assert {each["faster"] for each in said["layers"]} <= {"native", "simulated", "torch", "float"}
    loaded = dmqfx.load(folder, target="cpu")
    assert loaded.lowering[0].name == "choose-forms"
    assert "not measured" not in loaded.lowering[0].note
    assert main(["bench", str(folder), "--seconds", "0.001", "--quiet"]) == 0
    table = capsys.readouterr().out
    assert table.startswith("layer")
    assert "models that are lowered for `cpu` here follow it, but for attention in codes" in table
    for wrong in ("nan", "0", "soon"):
        with pytest.raises(SystemExit):
            main(["bench", str(folder), "--seconds", wrong])
        assert f"{wrong} seconds are no time to measure in" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["bench", str(folder), "--size", "16"])
    assert "'16' is no size: write height and width, as 64x64" in capsys.readouterr().err
