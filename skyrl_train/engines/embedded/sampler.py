"""From logits to one token a row, exactly and reproducibly.

For each row: the request's rule (see rules), penalties on the logits, division by the temperature, top-k, top-p,
min-p; then the inverse of the cumulative distribution at one uniform number, which depends on the request's seed and
the token's index alone.
Truncation removes tokens and keeps the order of the others, so a seed gives the same token whether a filter that
removes nothing is on or off.

The log-probability of the token is that under softmax(logits / temperature), before rules, penalties and truncation;
a greedy row counts as temperature 1.

Shapes: n rows, V words.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import numpy.typing as npt
import torch

from skyrl_train.engines.embedded.request import Seats
from skyrl_train.engines.embedded.rules.rule import ruled
from skyrl_train.engines.embedded.sampling_table import SamplingTable
from skyrl_train.engines.embedded.stops import NO_ID
from skyrl_train.engines.embedded.uniforms import uniforms

Indices = npt.NDArray[np.intp]
Ints = npt.NDArray[np.int32]
Floats = npt.NDArray[np.float32]
Doubles = npt.NDArray[np.float64]
Picked = tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]
Pick = Callable[[torch.Tensor, torch.Tensor, Floats, Doubles], Picked]
Truncate = Callable[[torch.Tensor, SamplingTable, Indices], torch.Tensor]

LANES = 16
"""Of native/vector.h: the scratch rows are padded to it."""

FEW_CANDIDATES = 512


class Sampler:
    """`pick` is native where the C kernels can be built; both give the same tokens up to rounding."""

    def __init__(self, native: ctypes.CDLL | None) -> None:
        self._pick: Pick = pick if native is None else NativePick(native)
        self._truncate: Truncate = truncated

    def sample(
        self, logits: torch.Tensor, seats: Seats, chosen: Indices, known: Ints | None = None
    ) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float32]]:
        """Next tokens [n] and their log-probabilities [n] for the rows of the seats `chosen` [n]; logits [n, V].

        Row i follows the first `known[i]` tokens of its seat, all that are known if it is None; a seat may have several
        rows. Raises FloatingPointError where the model's logits are not finite.
        """
        table = seats.sampling
        known = seats.length[chosen] if known is None else known
        raw = logits.float()
        draw = raw
        temperature = table.temperature[chosen]
        banned = banned_ids(seats, chosen, known)
        if banned is not None:
            draw = draw.clone()
            draw[banned] = -torch.inf
        if seats.rules:
            draw = ruled(draw, seats.rules, chosen)
        if table.penalises[chosen].any():
            draw = penalised(draw, seats, chosen, known)
        if table.truncates[chosen].any():
            draw = self._truncate(draw, table, chosen)
        index = known - seats.prompt_len[chosen]
        tokens, logprobs = self._pick(draw, raw, temperature, uniforms(table.key[chosen], index))
        if not np.isfinite(logprobs).all():
            bad = seats.owners[chosen[np.nonzero(~np.isfinite(logprobs))[0][0]]]
            name = bad.request.request_id if bad is not None else "?"
            raise FloatingPointError(f"the model's logits for request {name} are not finite")
        return tokens, logprobs


def pick(draw: torch.Tensor, score: torch.Tensor, temperature: Floats, uniform: Doubles) -> Picked:
    """Tokens from softmax(draw / temperature), scored under softmax(score / temperature); 0 is greedy."""
    greedy = torch.from_numpy(temperature == 0)
    divisor = torch.from_numpy(np.where(temperature == 0, np.float32(1), temperature))[:, None]
    tokens = inverse_cdf(draw / divisor, torch.from_numpy(uniform))
    # NaN logits have no place in the cumulative sum; their log-probability, which the caller checks, is NaN.
    tokens = torch.where(greedy, draw.argmax(-1), tokens).clamp(max=draw.shape[-1] - 1)
    logprobs = (score / divisor).log_softmax(-1).gather(-1, tokens[:, None])[:, 0]
    return tokens.numpy(), logprobs.numpy()


class NativePick:
    """`pick` in C: native/sampling.c."""

    def __init__(self, native: ctypes.CDLL) -> None:
        pointer, int32, int64 = ctypes.c_void_p, ctypes.c_int32, ctypes.c_int64
        self._kernel = native.sample_rows
        self._kernel.restype = None
        self._kernel.argtypes = (pointer, int64, pointer, int64, int32, int32, *(pointer,) * 5, int32)

    def __call__(self, draw: torch.Tensor, score: torch.Tensor, temperature: Floats, uniform: Doubles) -> Picked:
        num_rows, vocab = draw.shape
        draw, score = (x if x.stride(1) == 1 else x.contiguous() for x in (draw, score))
        temperature, uniform = np.ascontiguousarray(temperature), np.ascontiguousarray(uniform)
        tokens = np.empty(num_rows, dtype=np.int64)
        logprobs = np.empty(num_rows, dtype=np.float32)
        num_threads = torch.get_num_threads()
        scratch = torch.empty((num_threads, vocab + LANES), dtype=torch.float32)
        self._kernel(
            draw.data_ptr(),
            draw.stride(0),
            score.data_ptr(),
            score.stride(0),
            num_rows,
            vocab,
            temperature.ctypes.data,
            uniform.ctypes.data,
            tokens.ctypes.data,
            logprobs.ctypes.data,
            scratch.data_ptr(),
            num_threads,
        )
        return tokens, logprobs


def banned_ids(seats: Seats, chosen: Indices, known: Ints) -> tuple[torch.Tensor, torch.Tensor] | None:
    """(rows, token ids) of end tokens that come too early for min_new_tokens."""
    early = np.nonzero(known < seats.min_len[chosen])[0]
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


def penalised(logits: torch.Tensor, seats: Seats, chosen: Indices, known: Ints) -> torch.Tensor:
    """Repetition on prompt and answer (Keskar et al. 2019, CTRL), presence and frequency on the answer."""
    table = seats.sampling
    rows = np.nonzero(table.penalises[chosen])[0]
    chosen, length = chosen[rows], known[rows]
    width = int(length.max())
    tokens = torch.from_numpy(seats.tokens[chosen, :width].astype(np.int64))
    position = np.arange(width)[None]
    text = torch.from_numpy(position < length[:, None])
    answer = text & torch.from_numpy(position >= seats.prompt_len[chosen, None])

    part = logits[rows]
    seen = torch.zeros_like(part).scatter_add_(1, tokens, text.float()) > 0
    count = torch.zeros_like(part).scatter_add_(1, tokens, answer.float())
    repetition = torch.from_numpy(table.repetition[chosen])[:, None]
    part = torch.where(seen, torch.where(part > 0, part / repetition, part * repetition), part)
    part -= count * torch.from_numpy(table.frequency[chosen])[:, None]
    part -= (count > 0) * torch.from_numpy(table.presence[chosen])[:, None]
    result = logits.clone()
    result[torch.from_numpy(rows)] = part
    return result


def truncated(logits: torch.Tensor, table: SamplingTable, chosen: Indices) -> torch.Tensor:
    """-inf where top-k, then top-p, then min-p drop a token. At least the most likely one stays.

    All three look at softmax(logits / temperature). top-p keeps the smallest set of most likely tokens whose
    probability reaches p; min-p drops what is less likely than min_p times the most likely. Equal logits rank by id.
    """
    result = logits.clone()
    rows = np.nonzero(table.truncates[chosen] & (table.temperature[chosen] > 0))[0]
    vocab = logits.shape[-1]
    # What stays is nearly always among a few hundred tokens; only rows where it isn't are sorted as a whole.
    widths = (FEW_CANDIDATES, vocab) if vocab > 4 * FEW_CANDIDATES else (vocab,)
    for width in widths:
        decided = _truncate_rows(result, logits, rows, table, chosen[rows], width)
        rows = rows[~decided]
        if not len(rows):
            break
    return result


def _truncate_rows(
    result: torch.Tensor, logits: torch.Tensor, rows: Indices, table: SamplingTable, chosen: Indices, width: int
) -> npt.NDArray[np.bool_]:
    """Truncate `rows` of `result`, looking at the `width` largest logits; which rows [n] that was enough for."""
    part = logits[torch.from_numpy(rows)]
    vocab = part.shape[-1]
    temperature = torch.from_numpy(table.temperature[chosen].astype(np.float64))[:, None]
    top_k = torch.from_numpy(table.top_k[chosen].astype(np.int64))[:, None]
    top_p = torch.from_numpy(table.top_p[chosen].astype(np.float64))[:, None]
    min_p = torch.from_numpy(table.min_p[chosen].astype(np.float64))[:, None]
    ordered, order = _largest(part, width)
    weights = ((ordered - ordered[:, :1]).double() / temperature).exp()
    keep = (top_k == 0) | (torch.arange(width) < top_k)
    weights = weights * keep
    total = weights.sum(-1, keepdim=True)
    if width < vocab and ((top_k == 0) & (top_p < 1)).any():
        everything = ((part - ordered[:, :1]).double() / temperature).exp().sum(-1, keepdim=True)
        total = torch.where(top_k == 0, everything, total)
    mass_before = weights.cumsum(-1) - weights
    keep &= (top_p >= 1) | (mass_before < top_p * total)
    keep &= weights >= min_p
    keep[:, 0] = True
    # Enough: top-k ends within the width, and no token beyond it ties with the last one that stays.
    last = ordered.gather(-1, keep.sum(-1, keepdim=True) - 1)
    enough = ((last > ordered[:, -1:]) & (top_k < width))[:, 0] | (width == vocab)
    rows, order, kept = rows[enough.numpy()], order[enough], torch.where(keep, ordered, -torch.inf)[enough]
    result[torch.from_numpy(rows)] = torch.full((len(rows), vocab), -torch.inf).scatter_(-1, order, kept)
    decided: npt.NDArray[np.bool_] = enough.numpy()
    return decided


def _largest(logits: torch.Tensor, width: int) -> tuple[torch.Tensor, torch.Tensor]:
    """The `width` largest of each row and their ids, in falling order; ties by id."""
    if width == logits.shape[-1]:
        return logits.sort(dim=-1, descending=True, stable=True)
    ids = logits.topk(width, dim=-1, sorted=False).indices.sort(dim=-1).values
    values, order = logits.gather(-1, ids).sort(dim=-1, descending=True, stable=True)
    return values, ids.gather(-1, order)
