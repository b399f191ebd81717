"""Cache slots by request: reads and writes of SGLang's table [requests, positions] -> slot, and what moves in slots.

All of these change an argument in place and return nothing, but for `build_draft_decode_metadata_cpu`.
"""

import ctypes

import torch


def _cells(rows, starts, ends):
    """Row and column of every table cell [starts[i], ends[i]) of rows[i], one after the other."""
    lengths = (ends - starts).long()
    before = lengths.cumsum(0) - lengths
    within = torch.arange(int(lengths.sum())) - before.repeat_interleave(lengths)
    return rows.long().repeat_interleave(lengths), starts.long().repeat_interleave(lengths) + within


def assign_req_to_token_pool_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    """Enters new slots into the table. Caller: mem_cache/allocation.py, for the tokens to verify."""
    rows, columns = _cells(req_pool_indices, start, end)
    req_to_token[rows, columns] = out_cache_loc[: len(rows)].to(req_to_token.dtype)


def assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, start, end, out_cache_loc, pool_len):
    """Lists the slots of [start, end) of each request. Caller: ops/speculative/cache_locs.py."""
    rows, columns = _cells(req_pool_indices, start, end)
    out_cache_loc[: len(rows)] = req_to_token[rows, columns].to(out_cache_loc.dtype)


def assign_draft_cache_locs_contiguous_cpu(
    req_pool_indices, req_to_token, seq_lens, out_cache_loc, pool_len, topk, num_steps
):
    """Lists the topk * num_steps slots after each sequence: the draft model's. Caller: ops/speculative/cache_locs.py"""
    ends = seq_lens + topk * num_steps
    assign_extend_cache_locs_cpu(req_pool_indices, req_to_token, seq_lens, ends, out_cache_loc, pool_len)


def build_draft_decode_metadata_cpu(req_to_token, req_pool_indices, seq_lens, topk, num_steps, pool_len):
    """A table [requests * topk, pool_len] with a row for each branch of the draft: prefix, then the branch's own slots.

    Behind a prefix of length s, branch t of the drafts owns positions [s + t * num_steps, s + (t + 1) * num_steps).
    Caller: layers/attention/intel_amx_backend.py, once for all steps of a draft.
    """
    table = req_to_token.new_zeros((len(seq_lens) * topk, pool_len))
    for request, (row, length) in enumerate(zip(req_pool_indices.tolist(), seq_lens.tolist(), strict=True)):
        branches = table[request * topk : (request + 1) * topk]
        branches[:, :length] = req_to_token[row, :length]
        own = req_to_token[row, length : length + topk * num_steps]
        branches[:, length : length + num_steps] = own.view(topk, num_steps)
    return table


def fill_bonus_tokens_cpu(accept_tokens, accept_lens, bonus_tokens, accept_stride):
    """The last accepted token of each request, which is the target model's own. Caller: ops/speculative/eagle.py."""
    by_request = accept_tokens.reshape(-1, accept_stride)[: len(accept_lens)]
    last = by_request.gather(1, accept_lens.long()[:, None] - 1)[:, 0]
    bonus_tokens[: len(last)] = last.to(bonus_tokens.dtype)


def fill_accept_out_cache_loc_cpu(accept_index, out_cache_loc, accept_out_cache_loc):
    """The slots of accepted drafts side by side; -1 marks what was refused. Caller: ops/speculative/eagle.py."""
    index = accept_index.flatten().long()
    kept = out_cache_loc[index[index >= 0]]
    accept_out_cache_loc[: len(kept)] = kept


def rotate_input_ids_cpu(input_ids, starts, lens, topk_index, select_index=None):
    """Each request's ids move one to the left and its newest id comes last (or where `select_index` says).

    Caller: ops/speculative/multi_layer_eagle.py, between the heads of a draft.
    """
    newest = topk_index.flatten()
    for request, (start, length) in enumerate(zip(starts.tolist(), lens.tolist(), strict=True)):
        if length > 0:
            ids = input_ids[start : start + length]
            ids[:-1] = ids[1:].clone()
            place = start + length - 1 if select_index is None else int(select_index[request])
            input_ids[place] = newest[request]


def copy_all_layer_kv_cache_cpu(data_ptrs, strides, tgt_loc, src_loc):
    """Moves slots in every layer's buffer, which comes as an address and bytes a slot.

    Caller: ops/kvcache/cache_move.py. The slots of an accepted branch of a tree are not neighbours: this makes them so.
    """
    if not len(src_loc):
        return
    source, target = src_loc.long(), tgt_loc.long()
    num_slots = int(torch.maximum(source.max(), target.max())) + 1
    for address, stride in zip(data_ptrs.tolist(), strides.tolist(), strict=True):
        memory = (ctypes.c_uint8 * (num_slots * stride)).from_address(address)
        slots = torch.frombuffer(memory, dtype=torch.uint8).view(num_slots, stride)
        slots[target] = slots[source]  # the right side is a copy: the two may overlap
