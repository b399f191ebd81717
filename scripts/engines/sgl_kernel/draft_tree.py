"""Trees of draft tokens: node 0 is the last token that is certain, each other node proposes what follows its parent.

    node     0    1    2    3    4          0
    parent  -1    0    0    1    1         / \\
    child    1    3   -1   -1   -1        1   2       `child`: the first one. `sibling`: the next of the same parent.
    sibling -1    2   -1    4   -1       / \\
    depth    0    1    1    2    2      3   4         A node attends to itself and to what is above it.
"""

import torch


def links(parents):
    """First child and next sibling of each node, -1 for none; parents come before their children."""
    child, sibling = [-1] * len(parents), [-1] * len(parents)
    for node in range(len(parents) - 1, 0, -1):
        parent = parents[node]
        if parent >= 0:
            sibling[node] = child[parent]
            child[parent] = node
    return child, sibling


def build_tree_kernel_efficient_cpu(
    parent_list,
    selected_index,
    seq_lens,
    tree_mask,
    positions,
    retrieve_index,
    retrieve_next_token,
    retrieve_next_sibling,
    topk,
    depth,
    num_draft_tokens,
    tree_mask_mode,
):
    """Fills mask, positions and links from the draft's candidates. Caller: ops/speculative/spec_tree.py (EAGLE family).

    Candidates are numbered over all steps of the draft, `topk` for each candidate that a step went on from, and
    `selected_index` [requests, num_draft_tokens - 1] holds the chosen numbers, rising. Candidate c belongs to expansion
    c // topk: expansion 0 hangs on node 0, expansion e on the candidate with the number `parent_list[request, e]`.
    """
    if int(tree_mask_mode) != 1:  # QLEN_ONLY: the mask covers the tree alone; what SGLang takes on a CPU
        raise NotImplementedError(f"tree_mask_mode {tree_mask_mode}: on the CPU the mask covers the tree alone (1)")
    n, num_requests = num_draft_tokens, len(seq_lens)
    mask = tree_mask.view(-1)[: num_requests * n * n].view(num_requests, n, n)
    chosen = selected_index.view(num_requests, -1).tolist()
    expansions = parent_list.view(num_requests, -1).tolist()
    retrieve_index.view(-1)[: num_requests * n] = torch.arange(num_requests * n, dtype=retrieve_index.dtype)
    for request, length in enumerate(seq_lens.tolist()):
        node_of = {number: node for node, number in enumerate(chosen[request], start=1)}
        parents, depths = [-1], [0]
        sees = torch.eye(n, dtype=mask.dtype)
        sees[:, 0] = 1
        for node, number in enumerate(chosen[request], start=1):
            expansion = number // topk
            # Scores only fall along a branch, so a chosen candidate's parent is chosen too; else it can't be reached.
            parent = 0 if expansion == 0 else node_of.get(expansions[request][expansion], -1)
            parents.append(parent)
            depths.append(depths[parent] + 1 if parent >= 0 else 1)
            if parent > 0:
                sees[node] = torch.maximum(sees[node], sees[parent])
        mask[request] = sees
        here = slice(request * n, (request + 1) * n)
        positions.view(-1)[here] = torch.tensor(depths, dtype=positions.dtype) + length
        child, sibling = links(parents)
        retrieve_next_token.view(-1)[here] = torch.tensor(child, dtype=retrieve_next_token.dtype)
        retrieve_next_sibling.view(-1)[here] = torch.tensor(sibling, dtype=retrieve_next_sibling.dtype)


def verify_tree_greedy_cpu(
    predicts,
    accept_index,
    accept_token_num,
    candidates,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    target_predict,
):
    """Goes down each tree as long as a child is what the target model says. Caller: ops/speculative/spec_tree.py.

    `predicts` gets the target's token at every node on the way, the last of them being the bonus token.
    `accept_index` [requests, longest path] gets the nodes by their place in the batch (-1 stays elsewhere),
    `accept_token_num` the number of drafts that were right.
    """
    target = target_predict.reshape(candidates.shape).tolist()
    place, drafted = retrive_index.tolist(), candidates.tolist()
    children, siblings = retrive_next_token.tolist(), retrive_next_sibling.tolist()
    for request, wanted in enumerate(target):
        path = [0]
        while len(path) < accept_index.shape[1]:
            node = path[-1]
            child = children[request][node]
            while child >= 0 and drafted[request][child] != wanted[node]:
                child = siblings[request][child]
            if child < 0:
                break
            path.append(child)
        for step, node in enumerate(path):
            accept_index[request, step] = place[request][node]
            predicts[place[request][node]] = wanted[node]
        accept_token_num[request] = len(path) - 1


def reconstruct_indices_from_tree_mask(
    tree_mask,
    verified_seq_len,
    positions,
    retrive_index,
    retrive_next_token,
    retrive_next_sibling,
    batch_size,
    draft_token_num,
):
    """Positions and links from the mask alone: a node's parent is the last earlier node that it sees.

    Caller: srt/speculative/ngram_worker.py, whose trees come from matches in the text.
    """
    n = draft_token_num
    above = tree_mask.view(-1)[: batch_size * n * n].view(batch_size, n, n).bool().tril(-1)
    depths = above.sum(-1)
    order = torch.arange(n)
    parents = torch.where(above, order, -1).amax(-1).tolist()
    found = [links(of_request) for of_request in parents]
    positions.view(-1)[: batch_size * n] = (depths + verified_seq_len[:, None]).view(-1).to(positions.dtype)
    retrive_index.view(-1)[: batch_size * n] = torch.arange(batch_size * n, dtype=retrive_index.dtype)
    for target, lists in ((retrive_next_token, 0), (retrive_next_sibling, 1)):
        values = torch.tensor([pair[lists] for pair in found], dtype=target.dtype)
        target.view(-1)[: batch_size * n] = values.view(-1)
