"""The notation prints, parses back, and splits real tensors so that the pieces make the whole again."""

import pytest
import torch

from passes.ir import TensorType, size_symbol
from passes.placement import (
    PARTIAL,
    Shard,
    local_shape,
    local_shard,
    notation,
    parse_notation,
    parse_type,
    type_text,
    whole_tensor,
)  # fmt: skip

B, T = size_symbol("B"), size_symbol("T")
CASES = [
    ((3072, 768), {}, "3072 768"),
    ((3072, 768), {"tp": Shard(0)}, "3072/tp 768"),
    ((768, 3072), {"tp": Shard(1)}, "768 3072/tp"),
    ((2304, 768), {"tp": Shard(0, 3, 64)}, "(3 12/tp 64) 768"),
    ((2304,), {"tp": Shard(0, 3)}, "(3 768/tp)"),
    ((768,), {"tp": Shard(0, 1, 64)}, "768/tp"),
    ((1280, 64), {"tp": Shard(0, (768, 256, 256))}, "(768/tp + 256/tp + 256/tp) 64"),
    ((8, 8), {"tp": PARTIAL}, "8 8 partial(tp)"),
    ((16, 8), {"tp": Shard(0), "dp": Shard(1)}, "16/tp 8/dp"),
    ((), {}, "scalar"),
]


@pytest.mark.parametrize(("shape", "sharding", "text"), CASES)
def test_notation_prints_and_parses_back(shape, sharding, text):
    assert notation(shape, sharding) == text
    parsed = parse_notation(text, ("tp", "dp"))
    assert parsed == (shape, sharding)
    assert notation(*parsed) == text


@pytest.mark.parametrize(
    ("shape", "sharding", "text"),
    [
        ((B, T, 4096), {"tp": Shard(2)}, "f32[B, T, 4096/tp]"),
        ((B * T, 256), {"tp": Shard(1)}, "f32[B*T, 256/tp]"),
        ((B * T, 256), {"tp": Shard(0, B)}, "f32[(B T/tp), 256]"),
        ((B, T, 128), {"tp": PARTIAL}, "f32[B, T, 128] partial(tp)"),
        ((), {}, "f32[]"),
    ],
)
def test_types_print_and_parse_back(shape, sharding, text):
    assert type_text(TensorType(torch.float32, shape), sharding) == text
    assert parse_type(text, ("tp",)) == (TensorType(torch.float32, shape), sharding)


def test_local_shape():
    assert local_shape("f32[B, T, (3 12/tp 64)]", {"B": 2, "T": 5}, {"tp": 4}) == (torch.float32, (2, 5, 576))
    assert local_shape("bf16[(B T/tp), 8]", {"B": 2, "T": 6}, {"tp": 2}) == (torch.bfloat16, (6, 8))


@pytest.mark.parametrize("axis_size", [2, 4])
@pytest.mark.parametrize("placement", [Shard(0), Shard(0, 3), Shard(0, (32, 8, 8)), Shard(1)])
def test_shards_make_the_whole_again(placement, axis_size):
    whole = torch.arange(48 * 8).view(48, 8)
    pieces = [local_shard(whole, placement, axis_size=axis_size, coord=coord) for coord in range(axis_size)]
    assert torch.equal(whole_tensor(pieces, placement), whole)


def test_a_fused_dim_is_not_split_in_contiguous_halves():
    whole = torch.arange(6)
    assert local_shard(whole, Shard(0, 3), axis_size=2, coord=0).tolist() == [0, 2, 4]
