"""The Triton kernels against their definitions, on the device that they are for."""

import pytest
import torch

from skyrl_train.engines.embedded.triton_attention import ragged_paged_attention, rows_per_block
from skyrl_train.engines.embedded.triton_sampler import sample_rows

pytestmark = pytest.mark.gpu


def slow_attention(query, keys, values, slots, row_request, row_position, scaling, window):
    """One row at a time, float64."""
    group = query.shape[1] // keys.shape[1]
    out = torch.empty_like(query, dtype=torch.float64)
    for t in range(len(query)):
        position = int(row_position[t])
        start = max(0, position - window + 1) if window else 0
        slot = slots[row_request[t], start : position + 1].long()
        k = keys[slot].double().repeat_interleave(group, 1)
        v = values[slot].double().repeat_interleave(group, 1)
        weights = torch.softmax(torch.einsum("hd,lhd->hl", query[t].double(), k) * scaling, -1)
        out[t] = torch.einsum("hl,lhd->hd", weights, v)
    return out


@pytest.mark.parametrize(("num_heads", "num_kv_heads", "head_dim"), [(14, 2, 64), (28, 4, 128), (4, 4, 32), (8, 1, 80)])
@pytest.mark.parametrize("window", [None, 37])
@pytest.mark.parametrize("num_splits", [1, 4, 16])
def test_decoding_and_prompt_chunks_attend_as_defined(num_heads, num_kv_heads, head_dim, window, num_splits) -> None:
    torch.manual_seed(0)
    num_requests, context = 4, 300
    num_slots = num_requests * context
    slots = torch.randperm(num_slots, device="cuda").view(num_requests, context).int()
    shape = (num_slots, num_kv_heads, head_dim)
    keys, values = (torch.randn(shape, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    lengths = [(0, 10, 130), (2, 0, 5), (1, 299, 300), (3, 0, 1)]
    rows = [(r, p) for r, begin, end in lengths for p in range(begin, end)]
    row_request, row_position = (torch.tensor(c, device="cuda", dtype=torch.int32) for c in zip(*rows, strict=True))
    # The model hands queries over as [Hq, T, D] seen through a transpose.
    query = torch.randn(num_heads, len(rows), head_dim, device="cuda", dtype=torch.bfloat16).transpose(0, 1)
    step = rows_per_block(num_heads // num_kv_heads)
    block_row, block_len, at = [], [], 0
    for _, begin, end in lengths:
        for first in range(0, end - begin, step):
            block_row.append(at + first)
            block_len.append(min(step, end - begin - first))
        at += end - begin
    blocks = tuple(torch.tensor(c, device="cuda", dtype=torch.int32) for c in (block_row, block_len))
    scaling = head_dim**-0.5
    expected = slow_attention(query, keys, values, slots, row_request, row_position, scaling, window)
    for cut in (blocks, None):
        out = ragged_paged_attention(
            query,
            keys,
            values,
            slots,
            row_request,
            row_position,
            blocks=cut,
            num_splits=num_splits,
            scaling=scaling,
            sliding_window=window,
        )
        error = (out.double() - expected).norm() / expected.norm()
        assert error < 1e-2, (cut is None, float(error))


@pytest.mark.parametrize("num_words", [50, 4096, 5000, 151_936])
def test_a_sampled_row_is_the_inverse_of_the_cumulative_distribution(num_words: int) -> None:
    torch.manual_seed(1)
    n = 200
    logits = torch.randn(n, num_words, device="cuda") * 3
    logits[:, 7] = -torch.inf
    temperature = torch.rand(n, device="cuda") + 0.3
    temperature[::5] = 0
    uniform = torch.rand(n, device="cuda", dtype=torch.float64)
    uniform[1], uniform[2] = 0.0, 1 - 2**-53
    tokens, logprobs = sample_rows(logits, temperature, uniform)
    divisor = torch.where(temperature == 0, 1.0, temperature)[:, None]
    scaled = logits / divisor
    assert torch.equal(tokens[::5], logits[::5].argmax(-1))
    wanted = scaled.log_softmax(-1).gather(1, tokens[:, None])[:, 0]
    torch.testing.assert_close(logprobs, wanted, atol=2e-5, rtol=0)
    # The token's interval of cumulative probability holds the uniform number, up to float32 sums.
    probability = scaled.double().softmax(-1)
    upper = probability.cumsum(-1).gather(1, tokens[:, None])[:, 0]
    lower = upper - probability.gather(1, tokens[:, None])[:, 0]
    drawn = temperature > 0
    assert (lower[drawn] <= uniform[drawn] + 1e-5).all() and (uniform[drawn] <= upper[drawn] + 1e-5).all()
    assert not (tokens == 7).any()
