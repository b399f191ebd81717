"""The fused kernels of the head against the tensor operations that they replace, in float64."""

import pytest
import torch

from skyrl_train.training.logprobs import token_logprobs

pytestmark = pytest.mark.gpu


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 1e-4), (torch.bfloat16, 2e-2)])
@pytest.mark.parametrize("with_entropy", [False, True])
@pytest.mark.parametrize("num_words", [300, 50_000])
def test_values_and_gradients_equal_those_in_float64(dtype, tolerance, with_entropy, num_words) -> None:
    torch.manual_seed(0)
    n, hidden_size = 700, 64
    hidden = torch.randn(n, hidden_size, device="cuda").to(dtype).requires_grad_()
    weight = (torch.randn(num_words, hidden_size, device="cuda") * 0.3).to(dtype).requires_grad_()
    targets = torch.randint(0, num_words, (n,), device="cuda")
    pull, entropy_pull = torch.randn(n, device="cuda"), torch.randn(n, device="cuda")

    def gradients(hidden: torch.Tensor, weight: torch.Tensor, device: str):
        out = token_logprobs(hidden, weight, targets.to(device), temperature=0.7, max_chunk_bytes=4 * num_words * 256)
        loss = (out.logprobs * pull.to(device)).sum()
        if with_entropy:
            loss = loss + (out.entropy * entropy_pull.to(device)).sum()
        return (out.logprobs, out.entropy, *torch.autograd.grad(loss, (hidden, weight)))

    got = gradients(hidden, weight, "cuda")
    judge = [x.detach().double().cpu().requires_grad_() for x in (hidden, weight)]
    for mine, theirs in zip(got, gradients(*judge, "cpu"), strict=True):
        error = (mine.detach().double().cpu() - theirs.detach()).norm() / theirs.detach().norm()
        assert error < tolerance, float(error)
