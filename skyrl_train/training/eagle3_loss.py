"""The loss of an EAGLE-3 head: training-time test (arXiv:2503.01840, section 3.2).

At inference the head goes on from its own hidden states, so it is trained on them: the same rows run several times,
each time one token further, on what they said themselves before.

    step 0   row t: token t + 1, the policy's hidden state t      ──► hidden' t    ──► policy's distribution at t + 1
    step 1   row t: token t + 2, hidden' t of step 0              ──► hidden'' t   ──► policy's distribution at t + 2
    step s   row t stands at position t + s; it attends to the rows of step 0 at positions 0 to t, as at inference
             those are the tokens that are known, and to its own former selves in steps 1 to s

The loss of a step is the cross-entropy of the policy's whole distribution over the head's words; a row counts where the
policy's likeliest word is one of them, as in SafeAILab/EAGLE (eagle/traineagle3/cnets.py). Later steps count less.

Shapes: B sequences padded to L tokens, T = B * L rows, H hidden size, W words of the head, V of the policy.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F

from skyrl_train.engines.embedded.drafts.eagle.head import Eagle3Head, Target, word_ids


class PaddedCausal:
    """An AttentionContext for B sequences of L rows each: causal, padding at the end."""

    def __init__(self, num_sequences: int, length: int) -> None:
        self._shape = (num_sequences, length)

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        q, k, v = (self.split(x) for x in (query, key, value))
        length = self._shape[1]
        mask = None
        if sliding_window is not None and sliding_window < length:
            age = torch.arange(length, device=q.device)[:, None] - torch.arange(length, device=q.device)
            mask = (age >= 0) & (age < sliding_window)
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
        )
        return out.transpose(1, 2).flatten(0, 1)

    def split(self, rows: torch.Tensor) -> torch.Tensor:
        """[T, heads, D] -> [B, heads, L, D]."""
        return rows.view(*self._shape, *rows.shape[1:]).transpose(1, 2)


class Unrolled(PaddedCausal):
    """The same, called once a step: the first call is causal, later ones as the module's drawing says."""

    def __init__(self, num_sequences: int, length: int) -> None:
        super().__init__(num_sequences, length)
        self._steps: list[tuple[torch.Tensor, torch.Tensor]] = []

    def attend(
        self,
        layer_idx: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        *,
        scaling: float,
        sliding_window: int | None,
    ) -> torch.Tensor:
        assert sliding_window is None, "heads look at everything"
        group = query.shape[1] // key.shape[1]
        q, k, v = (self.split(x) for x in (query, key, value))
        self._steps.append((k.repeat_interleave(group, dim=1), v.repeat_interleave(group, dim=1)))
        if len(self._steps) == 1:
            return super().attend(layer_idx, query, key, value, scaling=scaling, sliding_window=None)
        (first_keys, first_values), *own = self._steps
        hidden = torch.ones(q.shape[2], q.shape[2], dtype=torch.bool, device=q.device).triu(1)
        scores = (q @ first_keys.transpose(-1, -2)).masked_fill(hidden, -torch.inf)
        own_scores = torch.stack([(q * keys).sum(-1) for keys, _ in own], dim=-1)
        weights = (torch.cat((scores, own_scores), dim=-1) * scaling).softmax(-1)
        out = weights[..., : q.shape[2]] @ first_values
        for i, (_, values) in enumerate(own):
            out = out + weights[..., q.shape[2] + i, None] * values
        return out.transpose(1, 2).flatten(0, 1)


@dataclass(frozen=True, kw_only=True, eq=False)
class PolicyView:
    """What the policy says of a padded batch: `tapped` [T, G * H] and `logits` [B, L, V]; no gradients."""

    tapped: torch.Tensor
    logits: torch.Tensor


@torch.no_grad()
def policy_view(model: torch.nn.Module, token_ids: torch.Tensor, taps: tuple[int, ...]) -> PolicyView:
    """token_ids [B, L]. The layers `taps` are before the last: -1 is the input of the first."""
    num_sequences, length = token_ids.shape
    positions = torch.arange(length, device=token_ids.device).repeat(num_sequences)
    out = model(
        input_ids=token_ids.flatten()[None],
        position_ids=positions[None],
        use_cache=False,
        output_hidden_states=True,
        attention_context=PaddedCausal(num_sequences, length),
    )
    tapped = torch.cat([out.hidden_states[tap + 1][0] for tap in taps], dim=-1)
    return PolicyView(tapped=tapped, logits=out.logits[0].unflatten(0, (num_sequences, length)))


@dataclass(frozen=True, kw_only=True, eq=False)
class UnrolledLoss:
    """Sums over rows, to be divided by the rows of all micro-batches. By step: `agreed` and `counted` rows."""

    total: torch.Tensor
    agreed: torch.Tensor  # [S]
    counted: torch.Tensor  # [S]


def unrolled_loss(
    head: Eagle3Head,
    target: Target,
    view: PolicyView,
    token_ids: torch.Tensor,
    is_answer: torch.Tensor,
    *,
    num_steps: int,
    decay: float,
) -> UnrolledLoss:
    """token_ids [B, L]; `is_answer` [B, L] marks the tokens whose prediction is to be learned.

    `total` is the sum over steps s of decay**s times the cross-entropies of its rows.
    """
    num_sequences, length = token_ids.shape
    words = word_ids(head)
    with torch.no_grad():
        embeds = target.embed(token_ids)
        # What follows position j is learned where token j + 1 is of an answer.
        learned = _ahead(is_answer, 1)
        logits = view.logits.float()
        if words is not None:
            assert head.t2d is not None
            learned = learned & head.t2d[logits.argmax(-1)]
            logits = logits[..., words]
        chances = logits.softmax(-1)
    context = Unrolled(num_sequences, length)
    positions = torch.arange(length, device=token_ids.device).repeat(num_sequences)
    hidden = head.fuse(view.tapped)
    total = torch.zeros((), device=hidden.device)
    agreed, counted = [], []
    for step in range(num_steps):
        out, for_logits = head(
            embeds=_ahead(embeds, step + 1).flatten(0, 1)[None],
            hidden=hidden[None],
            position_ids=(positions + step)[None],
            attention_context=context,
        )
        hidden = out[0]
        counts = _ahead(learned, step + 1)
        own = _logits(head, target, for_logits[0].view(num_sequences, length, -1)[counts])
        wanted = _ahead(chances, step + 1)[counts]
        total = total - decay**step * (wanted * own.log_softmax(-1)).sum()
        agreed.append((own.argmax(-1) == wanted.argmax(-1)).sum())
        counted.append(counts.sum())
    return UnrolledLoss(total=total, agreed=torch.stack(agreed).detach(), counted=torch.stack(counted))


def _logits(head: Eagle3Head, target: Target, hidden: torch.Tensor) -> torch.Tensor:
    if head.lm_head is not None:
        logits: torch.Tensor = head.lm_head(hidden)
        return logits.float()
    weight = target.lm_head.weight
    assert isinstance(weight, torch.Tensor)
    return F.linear(hidden, weight.detach()).float()  # the policy learns nothing from its draft


def _ahead(x: torch.Tensor, count: int) -> torch.Tensor:
    """[B, L, ...]: row t has what row t + `count` had; zeros behind the end."""
    moved = torch.zeros_like(x)
    moved[:, : x.shape[1] - count] = x[:, count:]
    return moved
