"""The limit of a call of a whole UNet, and how far from it the target cpu is.

    python benchmarks/bench_roofline.py [--compiled DIR] [--model sd15] [--batch 2] [--threads 2] [--calls 6] [--avx2]

Multiply-adds are counted at the rate of the innermost loop on data in the first cache, those of layers that stay in float
too; bytes are what the operators of the fused program read and write, weights included, at the rate of a copy of a large
tensor. The limit is both, one behind the other: nothing is computed while a processor waits. The call is the least of
several at timesteps that were never had. Write results/roofline_MODEL_batchN.json, or ..._avx2.json.
"""

from __future__ import annotations

import argparse
import time

import torch
from bench_unet import MODELS, UNHOISTED, draw, never_seen
from machine import held_to_avx2, write
from torch import Tensor, fx

import dmqfx
from dmqfx.graph.program import Program
from dmqfx.runtime.kernels.native import library
from dmqfx.runtime.targets import lower
from dmqfx.runtime.timing import resized
from dmqfx.seeing.inventory import inventory

_COPIED = 2**28  # bytes
_WARM = 2  # calls, the second of which may be recorded


def moved(node: fx.Node) -> int:
    """Bytes that an operation reads and writes; 0 where it makes a view."""
    schema = getattr(node.target, "_schema", None)  # getitem has none, and makes a view
    if schema is None or any(each.alias_info is not None for each in schema.returns):
        return 0
    values = [each.meta.get("val") for each in (node, *node.all_input_nodes)]
    return sum(each.nbytes for each in values if isinstance(each, Tensor))


def bandwidth() -> float:
    """Bytes a second that a copy reads and writes."""
    source, target = torch.ones(_COPIED, dtype=torch.uint8), torch.ones(_COPIED, dtype=torch.uint8)
    spent = []
    for _ in range(8):
        started = time.perf_counter()
        target.copy_(source)
        spent.append(time.perf_counter() - started)
    return 2 * _COPIED / min(spent)


def limits(program: Program, batch: int, threads: int) -> dict[str, float]:
    """Operations and bytes of a call, the rates of both, and the milliseconds that they take one behind the other."""
    native = library()
    if native is None:
        raise SystemExit("there are no native kernels")
    whole = resized(program, B=batch)
    operations = 2.0 * batch * sum(item.macs for item in inventory(whole))
    nbytes = float(sum(map(moved, lower(whole, UNHOISTED).calls())))
    wide = any(
        site.got == 8 for item in inventory(program) for site in item.sites if site.site.arg == "weight"
    )
    multiplied = native.peak(
        native.chosen, widening=wide and native.chosen == "avx2"
    )  # and added, in 1e9 a second
    rate, speed = 2e9 * threads * multiplied, bandwidth()
    return {
        "gigaoperations": operations / 1e9,
        "peak_gops": rate / 1e9,
        "gigabytes": nbytes / 1e9,
        "gigabytes_a_second": speed / 1e9,
        "milliseconds_of_multiply_adds": 1e3 * operations / rate,
        "milliseconds_of_bytes": 1e3 * nbytes / speed,
    }


@torch.no_grad()
def main() -> None:
    """Count, measure, write."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", choices=list(MODELS), default="sd15")
    parser.add_argument(
        "--compiled", help="a directory of save_pretrained; w4a8-quick is compiled, unless said"
    )
    parser.add_argument("--batch", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--calls", type=int, default=6)
    parser.add_argument("--avx2", action="store_true", help="as on a machine without AVX-512 and VNNI")
    given = parser.parse_args()
    if given.avx2:
        held_to_avx2()
    torch.set_num_threads(given.threads)
    q = (
        dmqfx.load(given.compiled)
        if given.compiled
        else dmqfx.compile(MODELS[given.model][0](), "w4a8-quick", report_rows=0, progress=False)
    )
    found = limits(q.program, given.batch, given.threads)
    call, spent = never_seen(q, draw(given.model, given.batch), "timestep"), []
    for _ in range(_WARM + given.calls):
        started = time.perf_counter()
        call()
        spent.append(1e3 * (time.perf_counter() - started))
    least = found["milliseconds_of_multiply_adds"] + found["milliseconds_of_bytes"]
    taken = min(spent[_WARM:])
    result = {
        "what": f"{given.model} UNet, batch {given.batch}, {given.threads} threads: the limit of a call",
        "policy": q.policy.name if q.policy else "",
        **{name: round(each, 2) for name, each in found.items()},
        "milliseconds_a_call": round(taken, 1),
        "limit_over_call": round(least / taken, 3),
    }
    write(f"roofline_{given.model}_batch{given.batch}" + "_avx2" * given.avx2, result)


if __name__ == "__main__":
    main()
