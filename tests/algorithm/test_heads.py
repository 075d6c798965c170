"""The head as the model defines it: scaled, capped, with a bias; in log-probs, their gradients, and sampling."""

import pytest
import torch

from ebft_utils.algorithm import losses
from ebft_utils.algorithm.architecture import Head, decoder_of, head_of
from ebft_utils.algorithm.decoding import sample_tokens
from ebft_utils.algorithm.losses import head_logits, token_logprobs
from families import FAMILIES, build
from strided_cases import random_tokens

HEADS = pytest.mark.parametrize(
    ("bias", "scale", "softcap"), [(False, 0.5, None), (True, 3.0, None), (False, 1.0, 2.0), (True, 0.25, 3.0)]
)


def made(bias: bool, scale: float, softcap: float | None, dtype=torch.float32):
    torch.manual_seed(0)
    linear = torch.nn.Linear(6, 30, bias=bias).to(dtype)
    with torch.no_grad():
        linear.weight.mul_(8)
    return torch.randn(3, 15, 6, dtype=dtype), Head(linear, scale, softcap), torch.randint(30, (3, 15))


def obvious(hidden, head: Head, token_ids, temperature: float):
    """Full logits, by autograd."""
    logits = head.linear(hidden) * head.scale
    if head.softcap is not None:
        logits = head.softcap * torch.tanh(logits / head.softcap)
    return (logits.float() / temperature).log_softmax(-1).gather(-1, token_ids[..., None])[..., 0]


@HEADS
@pytest.mark.parametrize("temperature", [1.0, 0.6])
def test_log_probs_and_gradients(monkeypatch, bias, scale, softcap, temperature):
    monkeypatch.setattr(losses, "LOGITS_PER_CHUNK", 1)  # 16 rows at a time
    hidden, head, token_ids = made(bias, scale, softcap)
    weights, results = torch.randn(3, 15), []
    for function in (token_logprobs, obvious):
        given = hidden.clone().requires_grad_()
        values = function(given, head, token_ids, temperature)
        parameters = [given, *head.linear.parameters()]
        results.append([values, *torch.autograd.grad((values * weights).sum(), parameters)])
    for found, expected in zip(*results, strict=True):
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=1e-5)


@HEADS
def test_bfloat16(bias, scale, softcap):
    """The product is in bfloat16, scale and cap in float32."""
    hidden, head, token_ids = made(bias, scale, softcap, torch.bfloat16)
    given = hidden.clone().requires_grad_()
    values = token_logprobs(given, head, token_ids, 0.6)
    exactly = Head(torch.nn.Linear(6, 30, bias=bias), scale, softcap)
    exactly.linear.load_state_dict({name: tensor.float() for name, tensor in head.linear.state_dict().items()})
    reference, plain = hidden.float().requires_grad_(), hidden.clone().requires_grad_()
    expected, in_bfloat16 = obvious(reference, exactly, token_ids, 0.6), obvious(plain, head, token_ids, 0.6)
    assert values.dtype == torch.float32
    assert (values - expected).norm() <= 1.5 * (in_bfloat16 - expected).norm()  # as near as the model's own bfloat16
    pairs = ((values, given), (expected, reference), (in_bfloat16, plain))
    found, wanted, usual = (torch.autograd.grad(out.sum(), into)[0].float() for out, into in pairs)
    assert (found - wanted).norm() <= 1.5 * (usual - wanted).norm() + 1e-3 * wanted.norm()


@HEADS
def test_sampling_and_entropy(bias, scale, softcap):
    """The share of each token in evenly spread draws is its probability; their mean -log-prob is the entropy."""
    hidden, head, _ = made(bias, scale, softcap)
    uniforms = ((torch.arange(20_000, dtype=torch.float64) + 0.5) / 20_000).expand(2, -1)
    with torch.no_grad():
        drawn = sample_tokens(hidden[0, :2], head, 0.7, uniforms)
        every = torch.arange(30).expand(2, -1)
        logps = obvious(hidden[0, :2, None].expand(-1, 30, -1), head, every, 0.7)
        shares = torch.stack([row.bincount(minlength=30) for row in drawn]) / 20_000
        torch.testing.assert_close(shares, logps.exp(), atol=1e-4, rtol=0)
        scored = token_logprobs(hidden[0, :2, None].expand(-1, 20_000, -1), head, drawn, 0.7)
    torch.testing.assert_close(-scored.mean(1), -(logps.exp() * logps).sum(1), atol=2e-3, rtol=0)


@pytest.mark.parametrize(
    "family",
    ["cohere", "cohere2", "falcon_h1", "gemma2", "gemma3_text", "gpt_oss", "granite", "granitemoehybrid", "gptj"]
    + ["hyperclovax", "llama", "minicpm3", "nanochat", "phi", "recurrent_gemma", "vaultgemma", "xlstm"],
)
def test_heads_of_families(family):
    model, tokens = build(family), random_tokens(2, 12)
    assert family in FAMILIES
    with torch.no_grad():
        hidden = decoder_of(model)(input_ids=tokens, use_cache=False).last_hidden_state
        made_here = head_logits(hidden.flatten(0, 1), head_of(model)).view(2, 12, -1)
        torch.testing.assert_close(made_here, model(tokens).logits.float(), atol=1e-5, rtol=1e-5)
