"""Golden values of the pixel distributions: `python make_likelihood.py` rewrites likelihood.safetensors beside it.

Made with Python 3.11.7 and PyTorch 2.15.0 (CPU). Deterministic: the same versions give the same bytes. Computed
in f64 from values that are exact in f32, stored as f32.

The mixture is the loss of PixelCNN++ (Salimans et al. 2017; openai/pixel-cnn, nn.py,
`discretized_mix_logistic_loss`) with the difference of the two sigmoids taken on the side where they are small: in
f64 these values need no fallback.

Tensors, for each case: CASE/params [N,P], CASE/pixels [N,C] (as f32), CASE/nats [N], CASE/means [N,C], CASE/weights
[N] and CASE/grad = d sum(weights * nats) / d params.
"""

import pathlib

import torch

from make_golden import write

torch.manual_seed(0)
torch.set_default_dtype(torch.float64)
ROWS, CHANNELS, MIXTURES = 16, 3, 5


def categorical(params, pixels):
    logits = params.reshape(ROWS, CHANNELS, 256)
    nats = torch.nn.functional.cross_entropy(
        logits.reshape(-1, 256), pixels.reshape(-1).long(), reduction="none"
    )
    means = (logits.softmax(-1) * torch.arange(256) / 255).sum(-1)
    return nats.reshape(ROWS, CHANNELS).sum(1), means


def mixture(params, pixels):
    parts = params.reshape(ROWS, -1, MIXTURES)
    logits, means, log_scales, coefficients = parts.split([1, 3, 3, 3], dim=1)
    weights = logits[:, 0].log_softmax(-1)
    log_scales = log_scales.clamp(min=-7)
    coefficients = coefficients.tanh()
    x = (pixels.double() / 127.5 - 1)[:, :, None].expand(-1, -1, MIXTURES)

    def conditional(of):
        first = means[:, 0]
        second = means[:, 1] + coefficients[:, 0] * of(0, first)
        third = means[:, 2] + coefficients[:, 1] * of(0, first) + coefficients[:, 2] * of(1, second)
        return torch.stack([first, second, third], dim=1)

    centred = x - conditional(lambda channel, _: x[:, channel])
    inverse = torch.exp(-log_scales)
    upper, lower = inverse * (centred + 1 / 255), inverse * (centred - 1 / 255)
    first, last = (pixels == 0)[:, :, None], (pixels == 255)[:, :, None]
    # Above the mean the difference of what lies above is taken: both sigmoids themselves round to 1 far up.
    below = upper.sigmoid().where(~last, 1.0) - lower.sigmoid().where(~first, 0.0)
    above = (-lower).sigmoid().where(~first, 1.0) - (-upper).sigmoid().where(~last, 0.0)
    mass = torch.where(centred > 0, above, below)
    nats = -torch.logsumexp(mass.log().sum(1) + weights, dim=-1)
    # No channel's mean leaves [-1, 1] for these parameters.
    expected = conditional(lambda _, mean: mean)
    assert expected.abs().max() < 1
    return nats, (weights.exp()[:, None] * expected).sum(-1) / 2 + 0.5


OUT = {}
pixels = torch.randint(0, 256, (ROWS, CHANNELS))
pixels[:4, 0], pixels[4:8, 1], pixels[8:12, 2], pixels[12:14] = 0, 255, 0, 255
weights = torch.linspace(-1, 2, ROWS).float().double()
for name, function, size in [("categorical", categorical, 768), ("mixture", mixture, 10 * MIXTURES)]:
    params = torch.randn(ROWS, size)
    if name == "mixture":
        parts = params.reshape(ROWS, 10, MIXTURES)
        parts[:, 1:4] *= 0.15
        parts[:, 4:7] = parts[:, 4:7] * 0.5 - 2
    # Exact in f32.
    params = params.float().double().requires_grad_()
    nats, means = function(params, pixels)
    assert nats.isfinite().all()
    (weights * nats).sum().backward()
    assert params.grad.isfinite().all()
    values = dict(params=params, pixels=pixels, nats=nats, means=means, weights=weights, grad=params.grad)
    OUT.update({f"{name}/{key}": value for key, value in values.items()})
write(pathlib.Path(__file__).with_name("likelihood.safetensors"), OUT)
