"""From logits to one token a row, exactly and reproducibly.

For each row: penalties on the logits, division by the temperature, top-k, top-p, min-p; then the inverse of the
cumulative distribution at one uniform number, which depends on the request's seed and the token's index alone.
Truncation removes tokens and keeps the order of the others, so a seed gives the same token whether a filter that
removes nothing is on or off.

The log-probability of the token is that under softmax(logits / temperature), before penalties and truncation;
a greedy row counts as temperature 1.

Shapes: n rows, V words.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.sampling_table import SamplingTable
from skyrl_train.engines.embedded.stops import NO_ID
from skyrl_train.engines.embedded.uniforms import uniforms

Indices = npt.NDArray[np.intp]


def sample(
    logits: torch.Tensor, seats: Seats, chosen: Indices
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
    """Next tokens [n] and their log-probabilities [n] for the rows of the seats `chosen` [n]; logits [n, V]."""
    table = seats.sampling
    raw = logits.float()
    temperature = torch.from_numpy(table.temperature[chosen])
    greedy = temperature == 0
    divisor = torch.where(greedy, 1.0, temperature)[:, None]
    adjusted = raw
    if table.penalises[chosen].any():
        adjusted = penalised(adjusted, seats, chosen)
    banned = banned_ids(seats, chosen)
    if banned is not None:
        adjusted = adjusted.clone() if adjusted is raw else adjusted
        adjusted[banned] = -torch.inf
    scaled = adjusted / divisor
    if table.truncates[chosen].any():
        scaled = truncated(scaled, table, chosen)
    index = seats.length[chosen] - seats.prompt_len[chosen]
    tokens = inverse_cdf(scaled, torch.from_numpy(uniforms(table.key[chosen], index)))
    if greedy.any():
        tokens = torch.where(greedy, adjusted.argmax(-1), tokens)
    logprobs = (raw / divisor).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.numpy(), logprobs.numpy()


def banned_ids(seats: Seats, chosen: Indices) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, token ids) of end tokens that come too early for min_new_tokens."""
    early = np.nonzero(seats.length[chosen] < seats.min_len[chosen])[0]
    if not len(early):
        return None
    ids = seats.stops.ids[chosen[early]]
    row, column = np.nonzero(ids != NO_ID)
    return torch.from_numpy(early[row]), torch.from_numpy(ids[row, column].astype(np.int64))


def inverse_cdf(scaled: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """The first token whose cumulative probability exceeds `uniform` [n]; never one of probability 0."""
    weights = (scaled - scaled.amax(-1, keepdim=True)).exp_().double()
    cumulative = weights.cumsum(-1)
    total = cumulative[:, -1]
    below_total = torch.nextafter(total, torch.zeros_like(total))
    target = torch.minimum(uniform * total, below_total)
    return torch.searchsorted(cumulative, target[:, None], right=True)[:, 0]


def penalised(logits: torch.Tensor, seats: Seats, chosen: Indices) -> torch.Tensor:
    """Repetition on prompt and answer (Keskar et al. 2019, CTRL), presence and frequency on the answer."""
    table = seats.sampling
    rows = np.nonzero(table.penalises[chosen])[0]
    chosen = chosen[rows]
    length = seats.length[chosen]
    width = int(length.max())
    tokens = torch.from_numpy(seats.tokens[chosen, :width].astype(np.int64))
    position = np.arange(width)[None]
    known = torch.from_numpy(position < length[:, None])
    answer = known & torch.from_numpy(position >= seats.prompt_len[chosen, None])

    part = logits[rows]
    seen = torch.zeros_like(part).scatter_add_(1, tokens, known.float()) > 0
    count = torch.zeros_like(part).scatter_add_(1, tokens, answer.float())
    repetition = torch.from_numpy(table.repetition[chosen])[:, None]
    part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
    part -= count * torch.from_numpy(table.frequency[chosen])[:, None]
    part -= (count > 0) * torch.from_numpy(table.presence[chosen])[:, None]
    result = logits.clone()
    result[torch.from_numpy(rows)] = part
    return result


def truncated(scaled: torch.Tensor, table: SamplingTable, chosen: Indices) -> torch.Tensor:
    """-inf where top-k, then top-p, then min-p drop a token. At least the most likely one stays.

    top-p keeps the smallest set of most likely tokens whose probability reaches p; min-p drops what is less likely
    than min_p times the most likely. Equal logits rank by token id.
    """
    rows = np.nonzero(table.truncates[chosen])[0]
    chosen = chosen[rows]
    part = scaled[rows]
    vocab = part.shape[-1]
    top_k = torch.from_numpy(table.top_k[chosen].astype(np.int64))[:, None]
    top_p = torch.from_numpy(table.top_p[chosen].astype(np.float64))[:, None]
    min_p = torch.from_numpy(table.min_p[chosen].astype(np.float64))[:, None]
    ordered, order = part.sort(dim=-1, descending=True, stable=True)
    weights = (ordered - ordered[:, :1]).double().exp()
    keep = (top_k == 0) | (torch.arange(vocab)[None] < top_k)
    weights = weights * keep
    mass_before = weights.cumsum(-1) - weights
    keep &= (top_p >= 1) | (mass_before < top_p * weights.sum(-1, keepdim=True))
    keep &= weights >= min_p
    keep[:, 0] = True
    ordered = torch.where(keep, ordered, -torch.inf)
    result = scaled.clone()
    result[torch.from_numpy(rows)] = torch.empty_like(part).scatter_(-1, order, ordered)
    return result
