"""Packing of codes: against a slow loop over single bits, and there and back."""

import pytest
import torch

from engine.packing import QuantizedWeight, pack, unpack


def slow_pack(codes: torch.Tensor, bits: int) -> torch.Tensor:
    """Every bit by itself, as the format says."""
    rows, columns = codes.shape
    words = [[0] * (-(-columns * bits // 32)) for _ in range(rows)]
    for n in range(rows):
        for k in range(columns):
            for b in range(bits):
                if int(codes[n, k]) >> b & 1:
                    place = k * bits + b
                    words[n][place // 32] |= 1 << place % 32
    return torch.tensor(words, dtype=torch.int64).to(torch.int32)


@pytest.mark.parametrize("bits", [2, 3, 4, 5, 8])
@pytest.mark.parametrize("columns", [32, 40, 33])
def test_pack_equals_the_slow_loop_and_unpacks(bits: int, columns: int) -> None:
    codes = torch.randint(0, 2**bits, (5, columns), generator=torch.Generator().manual_seed(bits)).to(torch.uint8)
    packed = pack(codes, bits)
    torch.testing.assert_close(packed, slow_pack(codes, bits))
    torch.testing.assert_close(unpack(packed, bits, columns), codes)


def test_the_docstring_example() -> None:
    word = pack(torch.tensor([[1, 2, 3, 4, 5, 6, 7, 8]], dtype=torch.uint8), 4)
    assert int(word[0, 0]) & 0xFFFFFFFF == 0x87654321


def test_dequantize_and_bits_per_weight() -> None:
    codes = torch.tensor([[0, 15, 8, 9]], dtype=torch.uint8)
    weight = QuantizedWeight(
        codes, torch.tensor([[0.5, 2.0]], dtype=torch.bfloat16), torch.tensor([[8, 9]], dtype=torch.uint8), 4, False
    )
    torch.testing.assert_close(weight.dequantize().float(), torch.tensor([[-4.0, 3.5, -2.0, 0.0]]))
    assert weight.group_size == 2
    assert weight.bits_per_weight() == 4 + (16 + 4) * 2 / 4
