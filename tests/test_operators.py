"""The registered operators obey torch's rules, survive export and compilation, and agree with one another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

import dmqfx.runtime.operators
from dmqfx.numbers.packing import pack
from dmqfx.numbers.quant import QuantSpec, params_from_range, quantize
from dmqfx.numbers.ranges import search_range
from dmqfx.runtime.kernels import weights

OPS = torch.ops.dmqfx
Arguments = tuple[object, ...]


def weight_arguments(
    shape: tuple[int, ...], bits: int = 4, grid: str = "symmetric", dtype: torch.dtype = torch.float32
) -> Arguments:
    """What an integer layer takes for a random weight, from packed codes to zero points."""
    w = torch.randn(shape, dtype=dtype)
    params = search_range(w, QuantSpec(bits, grid, "channel"))
    codes = quantize(w, params.scale, params.zero_point, None, 0, params.qmin, params.qmax)
    return pack(codes, bits), bits, params.qmin < 0, list(shape), params.scale, params.zero_point


def input_arguments(x: Tensor, groups: int = 1, bits: int = 8) -> Arguments:
    """What an integer layer takes for an input: codes, scale, zero point, group."""
    low = -torch.linspace(2, 4, groups, dtype=x.dtype)[:, None]
    spec = QuantSpec(bits, boundaries=tuple(float(g) for g in range(groups - 1)))
    params = params_from_range(low, low.neg(), spec, None)
    group = torch.randint(groups, (len(x),)) if groups > 1 else None
    codes = quantize(x, params.scale, params.zero_point, group, 1, params.qmin, params.qmax)
    return codes, params.scale, params.zero_point, group


def conv_case(groups: int = 1, batch: int = 2) -> Arguments:
    bias = torch.randn(6)
    return (
        *input_arguments(torch.randn(batch, 4, 7, 5), groups),
        *weight_arguments((6, 2, 3, 3)),
        bias,
        [2, 1],
        [1, 0],
        [1, 1],
        2,
    )


def linear_case(groups: int = 1) -> Arguments:
    return (
        *input_arguments(torch.randn(2, 3, 5), groups),
        *weight_arguments((4, 5), 8, "affine"),
        torch.randn(4),
    )


def kernel_weight(shape: tuple[int, ...], groups: int) -> Arguments:
    """What a native layer takes for a random 4 bit weight."""
    codes = torch.randint(-8, 8, shape, dtype=torch.int8)
    return weights.pack(codes, groups), 4, list(shape), torch.rand(1, shape[0])


def coding_case(batch: int = 2) -> Arguments:
    """Real numbers whose codes are asked for, a scale per channel and group."""
    grid = (torch.rand(2, 4) + 0.1, torch.tensor([[3], [100]], dtype=torch.int32))
    return (torch.randn(batch, 4, 5, 3), *grid, torch.arange(batch) % 2, 1, 0, 255)


def last(x: Tensor) -> Tensor:
    return x.contiguous(memory_format=torch.channels_last)


def arms_case() -> Arguments:
    """The first arm of two, with 4 of 10 channels."""
    x, _, zero_point, *rest = coding_case()
    assert isinstance(x, Tensor)
    return (last(x), torch.rand(2, 10) + 0.1, zero_point, *rest)


def kernel_case(groups: int = 1, batch: int = 2) -> Arguments:
    x = input_arguments(torch.randn(batch, 4, 7, 5), groups)
    return (*x, *kernel_weight((6, 2, 3, 3), 2), torch.randn(6), [2, 1], [1, 0], [1, 1], 2)


def attention_case(mask: Tensor | None = None) -> Arguments:
    """Queries, keys and perhaps a mask."""
    query, key = torch.randn(2, 2, 5, 3, requires_grad=True), torch.randn(2, 2, 7, 3, requires_grad=True)
    return query, key, mask, 0.3


def grid(groups: int, channels: int) -> tuple[Tensor, Tensor]:
    return torch.rand(groups, channels) + 0.1, torch.randint(0, 255, (groups, channels), dtype=torch.int32)


CASES: dict[str, Callable[[], tuple[object, Arguments]]] = {
    "timestep_group": lambda: (OPS.timestep_group, (torch.tensor([1.0, 999.0]), torch.tensor([50.0, 100.0]))),
    "quantize": lambda: (OPS.quantize, (torch.randn(2, 3, 4), *grid(1, 1), None, 0, 0, 255)),
    "quantize grouped channels": lambda: (
        OPS.quantize,
        (torch.randn(2, 3, 4).mT, *grid(5, 3), torch.tensor([4, 0]), -1, -8, 7),
    ),
    "dequantize": lambda: (
        OPS.dequantize,
        (torch.randint(255, (2, 3), dtype=torch.uint8), *grid(1, 3), None, -1),
    ),
    "dequantize grouped": lambda: (
        OPS.dequantize,
        (torch.randint(255, (2, 3), dtype=torch.uint8), *grid(4, 1), torch.tensor([1, 3]), 1),
    ),
    "dequantize shifted": lambda: (
        OPS.dequantize,
        (
            torch.randint(255, (2, 3, 4), dtype=torch.uint8),
            *grid(4, 1),
            torch.tensor([1, 3]),
            -1,
            torch.randint(4, (4, 4)).byte(),
        ),
    ),
    "unpack nibbles": lambda: (OPS.unpack, (torch.randint(255, (8,), dtype=torch.uint8), 4, True, [3, 5])),
    "unpack bytes": lambda: (OPS.unpack, (torch.randint(255, (15,), dtype=torch.uint8), 8, False, [3, 5])),
    "qconv2d": lambda: (OPS.qconv2d, conv_case()),
    "qconv2d grouped": lambda: (OPS.qconv2d, conv_case(3)),
    "qconv2d empty batch": lambda: (OPS.qconv2d, conv_case(3, batch=0)),
    "qconv2d shifted": lambda: (OPS.qconv2d, (*conv_case(3), torch.randint(4, (3, 4)).byte())),
    "kernel_conv2d": lambda: (OPS.kernel_conv2d, kernel_case()),
    "kernel_conv2d grouped": lambda: (OPS.kernel_conv2d, kernel_case(3)),
    "kernel_conv2d empty batch": lambda: (OPS.kernel_conv2d, kernel_case(3, batch=0)),
    "kernel_quantize": lambda: (OPS.kernel_quantize, coding_case()),
    "kernel_quantize group norm": lambda: (
        OPS.kernel_quantize,
        (*coding_case(), "group", 2, torch.randn(4), torch.randn(4), 1e-5, "silu"),
    ),
    "kernel_quantize geglu": lambda: (
        OPS.kernel_quantize,
        (torch.randn(2, 5, 8), *coding_case()[1:4], -1, 0, 255, "none", 1, None, None, 0.0, "geglu"),
    ),
    "kernel_quantize scaled and shifted": lambda: (
        OPS.kernel_quantize,
        (
            *coding_case(),
            *("group", 2, torch.randn(4), torch.randn(4), 1e-5, "silu", None),
            *torch.randn(2, 8, 1, 1).chunk(2, 1),
        ),
    ),
    "kernel_quantize layer norm": lambda: (
        OPS.kernel_quantize,
        (
            torch.randn(2, 5, 4),
            *coding_case()[1:4],
            -1,
            0,
            255,
            "layer",
            1,
            torch.randn(4),
            torch.randn(4),
            1e-5,
        ),
    ),
    "kernel_quantize silu": lambda: (
        OPS.kernel_quantize,
        (*coding_case(), "none", 1, None, None, 0.0, "silu"),
    ),
    "kernel_quantize gelu": lambda: (
        OPS.kernel_quantize,
        (torch.randn(2, 5, 4), *coding_case()[1:4], -1, 0, 255, "none", 1, None, None, 0.0, "gelu"),
    ),
    "kernel_quantize empty batch": lambda: (OPS.kernel_quantize, coding_case(0)),
    "kernel_conv2d shifted": lambda: (OPS.kernel_conv2d, (*kernel_case(3), torch.randint(4, (3, 4)).byte())),
    "kernel_conv2d upsampled by a size": lambda: (
        OPS.kernel_conv2d,
        (*kernel_case(3), None, None, [7, 16]),
    ),
    "kernel_conv2d upsampled by factors, and something added": lambda: (
        OPS.kernel_conv2d,
        (*kernel_case(3), None, torch.randn(2, 6, 1, 1), None, [2.0, 2.0], True),
    ),
    "kernel_quantize of two arms": lambda: (
        OPS.kernel_quantize,
        (
            *arms_case(),
            "group",
            2,
            torch.randn(10),
            torch.randn(10),
            1e-5,
            "silu",
            last(torch.randn(2, 6, 5, 3)),
        ),
    ),
    "kernel_linear, and something added": lambda: (
        OPS.kernel_linear,
        (
            *input_arguments(torch.randn(2, 3, 5), 3),
            *kernel_weight((4, 5), 1),
            torch.randn(4),
            None,
            torch.randn(2, 3, 4),
        ),
    ),
    "kernel_conv2d to codes": lambda: (
        OPS.kernel_conv2d,
        (
            *kernel_case(3),
            *[None] * 4,
            True,
            torch.rand(3, 6) + 0.1,
            torch.zeros(3, 1).int(),
            -128,
            127,
            "silu",
        ),
    ),
    "kernel_linear to codes of gated results": lambda: (
        OPS.kernel_linear,
        (
            *input_arguments(torch.randn(2, 3, 5), 3),
            *kernel_weight((64, 5), 1),
            *(torch.randn(64), None, None, torch.rand(3, 1) + 0.1, torch.zeros(3, 1).int(), 0, 255, "geglu"),
        ),
    ),
    "kernel_linear": lambda: (
        OPS.kernel_linear,
        (*input_arguments(torch.randn(2, 3, 5), 3), *kernel_weight((4, 5), 1), torch.randn(4)),
    ),
    "attention_softmax": lambda: (OPS.attention_softmax, attention_case()),
    "attention_softmax masked": lambda: (OPS.attention_softmax, attention_case(torch.rand(5, 7) > 0.5)),
    "attention_average": lambda: (
        OPS.attention_average,
        (torch.randn(2, 2, 5, 7, requires_grad=True), torch.randn(2, 2, 7, 3, requires_grad=True)),
    ),
    "qlinear": lambda: (OPS.qlinear, linear_case()),
    "qlinear shifted": lambda: (OPS.qlinear, (*linear_case(3), torch.randint(4, (3, 5)).byte())),
    "qlinear grouped": lambda: (OPS.qlinear, linear_case(3)),
}


@pytest.mark.parametrize("case", CASES)
def test_operators_pass_the_checks_of_torch(case: str) -> None:
    operator, arguments = CASES[case]()
    results = torch.library.opcheck(operator.default, arguments)
    assert set(results.values()) == {"SUCCESS"}


class Layers(torch.nn.Module):
    """Quantize, an integer convolution, quantize again, an integer linear layer; in timestep groups."""

    def __init__(self) -> None:
        super().__init__()
        self.boundaries = torch.tensor([250.0, 500.0])
        _, self.scale, self.zero_point, _ = input_arguments(torch.randn(2, 4, 8, 8), 3)
        self.conv, self.linear = weight_arguments((8, 4, 3, 3)), weight_arguments((5, 8), 6)

    def forward(self, x: Tensor, timestep: Tensor) -> Tensor:
        group = OPS.timestep_group(timestep, self.boundaries)
        codes = OPS.quantize(x, self.scale, self.zero_point, group, 1, 0, 255)
        x = OPS.qconv2d(codes, self.scale, self.zero_point, group, *self.conv, None, [1, 1], [1, 1])
        codes = OPS.quantize(x.flatten(2).mT, self.scale, self.zero_point, group, -1, 0, 255)
        return OPS.qlinear(codes, self.scale, self.zero_point, group, *self.linear)


def test_operators_export_with_any_batch_and_size() -> None:
    model, free = Layers(), torch.export.Dim
    x, timestep = torch.randn(3, 4, 8, 6), torch.tensor([1.0, 300.0, 999.0])
    sizes = {0: free("batch"), 2: free("height", min=4), 3: free("width", min=4)}
    exported = torch.export.export(model, (x, timestep), dynamic_shapes=(sizes, {0: sizes[0]}), strict=False)
    for shape in ((3, 4, 8, 6), (1, 4, 5, 9)):
        x, timestep = torch.randn(shape), torch.rand(shape[0]) * 1000
        assert torch.equal(exported.module()(x, timestep), model(x, timestep))


def test_operators_compile_without_a_graph_break() -> None:
    model = Layers()
    x, timestep = torch.randn(2, 4, 8, 6), torch.tensor([1.0, 999.0])
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(x, timestep), model(x, timestep))


@pytest.mark.parametrize("bits", range(2, 9))
@pytest.mark.parametrize("weight_grid", ["symmetric", "affine"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_integer_layers_agree_with_float_layers_of_dequantized_codes(
    bits: int, weight_grid: str, dtype: torch.dtype
) -> None:
    limit = 1e-6 if dtype == torch.float32 else 1e-14
    x = torch.randn(3, 4, 6, 6, dtype=dtype)
    codes, *grid_of_x = input_arguments(x, 4)
    weight = weight_arguments((6, 4, 3, 3), bits, weight_grid, dtype)
    bias = torch.randn(6, dtype=dtype)
    real_x, real_w = (
        OPS.dequantize(codes, *grid_of_x, 1),
        OPS.dequantize(OPS.unpack(*weight[:4]), *weight[4:]),
    )
    expected = F.conv2d(real_x, real_w, bias, padding=1)
    found = OPS.qconv2d(codes, *grid_of_x, *weight, bias, padding=[1, 1])
    assert found.dtype == dtype
    assert (found - expected).norm() <= limit * expected.norm()
    weight = weight_arguments((5, 6), bits, weight_grid, dtype)
    expected = F.linear(real_x, OPS.dequantize(OPS.unpack(*weight[:4]), *weight[4:]))
    found = OPS.qlinear(codes, *grid_of_x, *weight)
    assert (found - expected).norm() <= limit * expected.norm()


def test_a_boundary_belongs_to_the_group_that_it_opens() -> None:
    boundaries = torch.tensor([50.0, 100.0])
    timestep = torch.tensor([0.0, 49.999, 50.0, 100.0, 999.0])
    assert OPS.timestep_group(timestep, boundaries).tolist() == [0, 0, 1, 2, 2]
    assert OPS.timestep_group(timestep, boundaries[:0]).tolist() == [0] * 5


@pytest.mark.parametrize("dtype", [torch.int64, torch.float16, torch.float64])
def test_timesteps_and_boundaries_may_differ_in_dtype(dtype: torch.dtype) -> None:
    boundaries = torch.tensor([50.5, 100.5])
    assert OPS.timestep_group(torch.tensor([50, 51, 101]).to(dtype), boundaries).tolist() == [0, 1, 2]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_input_is_quantized_in_the_precision_of_the_scale(dtype: torch.dtype) -> None:
    x, (scale, zero_point) = torch.randn(2, 3).to(dtype), grid(1, 1)
    codes = OPS.quantize(x, scale, zero_point, None, 0, 0, 255)
    assert torch.equal(codes, OPS.quantize(x.float(), scale, zero_point, None, 0, 0, 255))


def test_importing_the_module_is_what_registers_the_operators() -> None:
    names = {name for name, _ in vars(dmqfx.runtime.operators).items()}
    assert {
        "qconv2d",
        "qlinear",
        "kernel_conv2d",
        "kernel_linear",
        "kernel_quantize",
        "timestep_group",
    } <= names
    attention = ["attention_softmax", "attention_average"]
    listed = "timestep_group quantize dequantize unpack qconv2d qlinear kernel_conv2d kernel_linear kernel_quantize"
    for name in [*listed.split(), *attention]:
        schema = getattr(OPS, name).default._schema
        assert not schema.is_mutable
        assert [str(result.type) for result in schema.returns] == ["Tensor"]
