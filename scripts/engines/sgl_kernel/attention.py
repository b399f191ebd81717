"""Attention over the paged cache: torch.ops.sgl_kernel.decode_attention_cpu and extend_attention_cpu.

Callers: layers/attention/intel_amx_backend.py, the one CPU backend that takes the batches of a draft and of its
verification. No AMX is used here. Keys and values lie in buffers [slots, kv heads, head dim]; row r of `req_to_token`
names the slots of request r's tokens, in order.
"""

import torch
from torch.nn.functional import scaled_dot_product_attention


def _refuse(logit_cap, is_cross, window, sinks):
    for name, used in {
        "a logit cap": logit_cap != 0,
        "cross attention": is_cross,
        "a sliding window": window > 0,
        "attention sinks": sinks is not None,
    }.items():
        if used:
            raise NotImplementedError(f"the PyTorch stand-in for sgl_kernel knows no {name}")


def _decode(
    query, key_buffer, value_buffer, key_scale, value_scale, output, key, value, slots, scratch, req_to_token,
    rows, seq_lens, scaling, logit_cap, is_cross, window, encoder_lens, sinks,
):  # fmt: skip
    """One new token a request. query, output [requests, heads, dim]; its key and value are stored first."""
    _refuse(logit_cap, is_cross, window, sinks)
    if key is not None:
        key_buffer[slots] = key.view(-1, *key_buffer.shape[1:]).to(key_buffer.dtype)
        value_buffer[slots] = value.view(-1, *value_buffer.shape[1:]).to(value_buffer.dtype)
    longest = int(seq_lens.max())
    visible = torch.arange(longest) < seq_lens[:, None]
    # What lies behind a request's end may be no slot at all: it reads slot 0 and is masked.
    places = req_to_token[rows, :longest].long().masked_fill(~visible, 0)
    attended = scaled_dot_product_attention(
        query[:, :, None],
        key_buffer[places].transpose(1, 2),
        value_buffer[places].transpose(1, 2),
        attn_mask=visible[:, None, None],
        scale=scaling,
        enable_gqa=query.shape[1] != key_buffer.shape[1],
    )
    output.copy_(attended[:, :, 0])


def _extend(
    query, key, value, output, key_buffer, value_buffer, key_scale, value_scale, req_to_token, rows, seq_lens,
    extend_lens, extend_starts, max_extend_len, scaling, logit_cap, is_cross, window, encoder_lens, sinks, tree_mask,
    is_causal,
):  # fmt: skip
    """Several new tokens a request, in the cache already: a part of a prompt, or a tree of drafts to verify.

    query, output [all new tokens, heads, dim]. All of them see what came before; among themselves they see what
    `tree_mask` [requests * new * new] says, else the earlier ones.
    """
    _refuse(logit_cap, is_cross, window, sinks)
    lengths = zip(rows.tolist(), seq_lens.tolist(), extend_lens.tolist(), extend_starts.tolist(), strict=True)
    for request, (row, length, num_new, start) in enumerate(lengths):
        if num_new == 0:
            continue
        new = slice(start, start + num_new)
        visible = torch.ones(num_new, length, dtype=torch.bool)
        if tree_mask is not None:
            square = num_new * num_new
            own = tree_mask.view(-1)[request * square : (request + 1) * square]
            visible[:, length - num_new :] = own.view(num_new, num_new)
        elif is_causal:
            visible[:, length - num_new :].tril_()
        places = req_to_token[row, :length].long()
        attended = scaled_dot_product_attention(
            query[new].transpose(0, 1)[None],
            key_buffer[places].transpose(0, 1)[None],
            value_buffer[places].transpose(0, 1)[None],
            attn_mask=visible,
            scale=scaling,
            enable_gqa=query.shape[1] != key_buffer.shape[1],
        )
        output[new] = attended[0].transpose(0, 1)


# The library must outlive the operators that it registers.
LIBRARY = torch.library.Library("sgl_kernel", "FRAGMENT")
LIBRARY.define(
    "decode_attention_cpu(Tensor query, Tensor(a!) key_buffer, Tensor(b!) value_buffer, float key_scale, "
    "float value_scale, Tensor(c!) output, Tensor? key, Tensor? value, Tensor slots, Tensor(d!) scratch, "
    "Tensor req_to_token, Tensor rows, Tensor seq_lens, float scaling, float logit_cap, bool is_cross, int window, "
    "Tensor? encoder_lens, Tensor? sinks) -> ()"
)
LIBRARY.define(
    "extend_attention_cpu(Tensor query, Tensor? key, Tensor? value, Tensor(a!) output, Tensor key_buffer, "
    "Tensor value_buffer, float key_scale, float value_scale, Tensor req_to_token, Tensor rows, Tensor seq_lens, "
    "Tensor extend_lens, Tensor extend_starts, int max_extend_len, float scaling, float logit_cap, bool is_cross, "
    "int window, Tensor? encoder_lens, Tensor? sinks, Tensor? tree_mask, bool is_causal) -> ()"
)
LIBRARY.impl("decode_attention_cpu", _decode, "CPU")
LIBRARY.impl("extend_attention_cpu", _extend, "CPU")
