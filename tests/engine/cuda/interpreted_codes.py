"""Compares the kernel, run by Triton's interpreter on a CPU, with what numbers stand for; fails where they differ.

TRITON_INTERPRET=1 python -m kvferry.tests.engine.cuda.interpreted_codes
"""

from __future__ import annotations

import torch

from kvferry.engine.cuda.coded import TILES, in_tiles_of, product
from kvferry.engine.cuda.coded_kernel import multiply
from kvferry.engine.cuda.codes import Code, Codes
from kvferry.engine.weights.float8 import groups_to_float8

from ...emulation.products import meant_by
from .drawn_codes import FORMS, Form, draw

COUNTS = ([3, 0, 40, 1, 0], [0, 0, 0, 0, 2], [0, 130, 0, 7, 1])  # rows of each matrix
# The interpreter cuts results down to 16 bits where a card rounds them.
CLOSE = 2**-7


def check(form: Form, counts: list[int], num_outputs: int) -> None:
    """Multiply sorted rows by several matrices, and all rows by one."""
    codes, num_rows = draw(form, len(counts), num_outputs), sum(counts)
    x, order = torch.randn(50, codes.num_inputs).bfloat16(), torch.randint(0, 50, (num_rows + 2,))  # two of no matrix
    found = product(x, codes, torch.tensor(counts).cumsum(0).int(), order)[:num_rows]
    matrices = meant_by(codes)[torch.repeat_interleave(torch.arange(len(counts)), torch.tensor(counts))]
    compare(found, torch.einsum("ri,roi->ro", x[order[:num_rows]].float(), matrices), (form.code, counts, num_outputs))
    one = draw(form, 1, num_outputs)
    for num_rows in TILES:
        with in_tiles_of(num_rows):
            compare(product(x, one), x.float() @ meant_by(one)[0].T, (form.code, num_outputs, num_rows))
    if form.code is Code.FLOAT8:
        check_rounded(codes, x, order, torch.tensor(counts).cumsum(0).int(), matrices)


def check_rounded(codes: Codes, x: torch.Tensor, order: torch.Tensor, ends: torch.Tensor, each: torch.Tensor) -> None:
    """Multiply rows that are 8-bit floats. `each`: the matrix of each sorted row."""
    rows, scales = groups_to_float8(x, codes.group_size)
    found = multiply(rows, scales, codes, ends, order, 16)[: len(each)]
    meant = rows.float() * scales.repeat_interleave(codes.group_size, 1)
    compare(found, torch.einsum("ri,roi->ro", meant[order[: len(each)]], each), ("8-bit rows", codes.group_size))


def compare(found: torch.Tensor, expected: torch.Tensor, what: object) -> None:
    error = float((found.float() - expected).abs().max() / expected.abs().max())
    assert error < CLOSE, (what, error)


def main() -> None:
    torch.manual_seed(0)
    for form in FORMS:
        for counts in COUNTS:
            for num_outputs in (64, 80):
                check(form, counts, num_outputs)
    print(f"{len(FORMS)} forms of {len({form.code for form in FORMS})} of {len(Code)} kinds")


if __name__ == "__main__":
    main()
