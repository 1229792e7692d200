"""Numbers packed into bytes come out again, by look-ups alone."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from graphopt.passes.layers.code_packing import bases, digits, digits_of, pack, packed_bytes, per_byte


def looked_up(packed: list[Tensor], parts: tuple[int, ...], count: int) -> Tensor:
    found = torch.zeros(len(packed[0]), count, dtype=torch.int64)
    for part, (base, place) in zip(packed, digits_of(parts).values(), strict=True):
        found += (digits(base)[part.long()].flatten(1)[:, :count] * place).long()
    return found


@pytest.mark.parametrize("entries", [3, *(1 << bits for bits in range(1, 9))])
def test_all_numbers_come_out_again_in_rows_of_any_length(entries: int) -> None:
    parts = bases(entries)
    for count in (0, 1, 5, 7, 8, 9, 513):
        codes = torch.stack([torch.arange(count) % entries, torch.arange(count).flip(0) % entries])
        packed = pack(codes, parts)
        assert torch.equal(looked_up(packed, parts, count), codes)
        assert sum(part.nbytes for part in packed) == packed_bytes(2, count, parts)
        assert all(part.dtype is torch.uint8 for part in packed)


def test_bits_take_the_bytes_they_should() -> None:
    for bits in range(1, 9):
        assert packed_bytes(1, 800, bases(1 << bits)) == 100 * bits
    assert packed_bytes(1, 800, bases(3)) == 160


def test_the_first_number_is_in_the_lowest_digits() -> None:
    assert pack(torch.tensor([[1, 2]]), (16,))[0].tolist() == [[0x21]]
    assert pack(torch.tensor([[1, 0, 2]]), (3,))[0].tolist() == [[1 + 2 * 9]]
    assert pack(torch.tensor([[5, 2]]), (4, 2))[0].tolist() == [[0b1001]]
    assert pack(torch.tensor([[5, 2]]), (4, 2))[1].tolist() == [[0b01]]


def test_parts_are_digits_of_a_number() -> None:
    for bits in range(1, 9):
        product = 1
        for base, place in digits_of(bases(1 << bits)).values():
            assert place == product
            product *= base
            assert base ** per_byte(base) == 256
        assert product == 1 << bits
