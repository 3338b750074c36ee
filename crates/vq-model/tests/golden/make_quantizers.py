"""Golden values for vq-model's quantizers: `python make_quantizers.py` rewrites quantizers.safetensors beside it.

Made with Python 3.11.7, PyTorch 2.15.0 (CPU) and vector-quantize-pytorch 1.32.0. Deterministic: the same
versions give the same bytes. Computed in f64 (the package's codebooks search in f32) from values that are
exact in f32, stored as f32.

Where the package departs from the paper, this script says so and follows the paper. Index backpropagation is
not in the package: its formulas are written out here.

Tensors, for each case: CASE/z [B,h,w,D], CASE/weights [B,h,w,D], CASE/param/NAME, CASE/codes (as f32),
CASE/z_q, CASE/total = sum(weights * z_q) + the losses, CASE/grad_z, CASE/grad/NAME of the total. With moving
averages also CASE/z.STEP and CASE/after.STEP/NAME.
"""

import pathlib

import torch
import torch.nn.functional as F
from vector_quantize_pytorch import FSQ, LFQ, ResidualVQ, SimVQ, VectorQuantize
from vector_quantize_pytorch import finite_scalar_quantization, lookup_free_quantization

from make_golden import write

B, H, W = 2, 3, 4
BETA = 0.25
DECAY = 0.9
OUT = {}


def vectors(dim, spread=1.0):
    """Exact in f32."""
    return (spread * torch.randn(B, H, W, dim)).float().double()


def flat(z):
    return z.reshape(B, H * W, z.shape[-1])


def clear(z, codebook, what):
    """No vector may lie so near to the middle between two codes that rounding decides."""
    two = torch.cdist(z.reshape(-1, z.shape[-1]), codebook).topk(2, dim=1, largest=False).values
    assert (two[:, 1] - two[:, 0]).min() > 1e-4, what


def codebook(size, z):
    """Codes near vectors of z, so that several are in use."""
    rows = z.detach().reshape(-1, z.shape[-1])
    chosen = rows[torch.randperm(len(rows))[: size - 2]]
    chosen = chosen + 0.3 * torch.randn_like(chosen)
    far = 3 * torch.randn(2, z.shape[-1]).double()
    return torch.cat([chosen, far]).float().double()


def record(case, z, z_q, codes, losses, parameters):
    weights = vectors(z.shape[-1], 0.1)
    z_q = z_q.reshape(z.shape)
    total = (weights * z_q).sum() + losses
    total.backward()
    codes = codes.reshape(B, H, W, -1)
    print(f"{case}: {codes.flatten().unique().numel()} codes in use, total {total.item():.6f}")
    assert codes.flatten().unique().numel() > 2
    OUT[f"{case}/z"] = z
    OUT[f"{case}/weights"] = weights
    OUT[f"{case}/codes"] = codes.squeeze(-1)
    OUT[f"{case}/z_q"] = z_q
    OUT[f"{case}/total"] = total
    OUT[f"{case}/grad_z"] = z.grad
    for name, value in parameters.items():
        OUT[f"{case}/param/{name}"] = value


def set_books(modules_and_books):
    for module, books in modules_and_books:
        stacked = torch.stack(books)
        module._codebook.embed.data.copy_(stacked)
        module._codebook.embed_avg.data.copy_(stacked)
        module._codebook.cluster_size.data.fill_(1.0)


def averages(case, step, codebooks, prefixes):
    """codebooks: pairs of a module and the number of its head."""
    for (module, head), prefix in zip(codebooks, prefixes):
        inner = module._codebook
        OUT[f"{case}/after.{step}/{prefix}codebook"] = inner.embed[head].detach().clone()
        OUT[f"{case}/after.{step}/{prefix}usage"] = inner.cluster_size[head].clone()


def vector_cosine_ema():
    """Codes and losses in the normalised space, codes of length 1 after every update."""
    torch.manual_seed(10)
    z = vectors(6).requires_grad_()
    book = F.normalize(codebook(10, F.normalize(z, dim=-1)), dim=-1).float().double()
    clear(F.normalize(z, dim=-1), book, "cosine")
    vq = VectorQuantize(6, 10, decay=DECAY, use_cosine_sim=True, rotation_trick=False).double().train()
    set_books([(vq, [book])])
    z_q, codes, loss = vq(flat(z))
    record("vector-cosine-ema", z, z_q, codes, loss, {"codebook": book})
    OUT["vector-cosine-ema/z.0"] = z
    averages("vector-cosine-ema", 0, [(vq, 0)], [""])
    for step in (1, 2):
        z = vectors(6)
        vq(flat(z))
        OUT[f"vector-cosine-ema/z.{step}"] = z
        averages("vector-cosine-ema", step, [(vq, 0)], [""])


def product(case, ema, rotation):
    torch.manual_seed(11 + ema)
    heads, dim, size = 3, 4, 8
    z = vectors(heads * dim).requires_grad_()
    parts = z.detach().split(dim, -1)
    books = [codebook(size, part) for part in parts]
    for part, book in zip(parts, books):
        clear(part, book, case)
    vq = VectorQuantize(
        heads * dim, size, codebook_dim=dim, heads=heads, separate_codebook_per_head=True, decay=DECAY,
        ema_update=ema, learnable_codebook=not ema, rotation_trick=rotation,
    ).double().train()
    set_books([(vq, books)])
    z_q, codes, loss = vq(flat(z))
    names = [f"groups.{g}." for g in range(heads)]
    # Where the codebook learns, the package's loss stands for codebook + commitment, which have its value each.
    if not ema:
        loss = loss + loss.detach()
    record(case, z, z_q, codes, loss, {f"{n}codebook": b for n, b in zip(names, books)})
    if not ema:
        for g, name in enumerate(names):
            OUT[f"{case}/grad/{name}codebook"] = vq._codebook.embed.grad[g]
        return
    OUT[f"{case}/z.0"] = z
    averages(case, 0, [(vq, g) for g in range(heads)], names)
    for step in (1, 2):
        z = vectors(heads * dim)
        vq(flat(z))
        OUT[f"{case}/z.{step}"] = z
        averages(case, step, [(vq, g) for g in range(heads)], names)


def residual(case, ema):
    """The package adds a straight-through step for every stage to the output, so its z_q passes the gradient
    G times; Zeghidour et al. 2021 and Lee et al. 2022 pass it once. Here it is put on once, from outside."""
    torch.manual_seed(20 + ema)
    stages, dim, size = 3, 5, 8
    z = vectors(dim).requires_grad_()
    rvq = ResidualVQ(
        dim=dim, num_quantizers=stages, codebook_size=size, decay=DECAY, rotation_trick=False,
        ema_update=ema, learnable_codebook=not ema,
    ).double().train()
    left, books = z.detach(), []
    for layer in rvq.layers:
        book = codebook(size, left)
        clear(left, book, case)
        set_books([(layer, [book])])
        books.append(book)
        left = left - book[torch.cdist(left.reshape(-1, dim), book).argmin(1)].view(left.shape)
    z_q, codes, losses = rvq(flat(z))
    (times,) = torch.autograd.grad(z_q.sum(), z, retain_graph=True)
    assert torch.allclose(times, torch.full_like(times, stages)), "the package has changed: read the note"
    z_q = z + (z_q.reshape(z.shape) - z).detach()
    names = [f"stages.{g}." for g in range(stages)]
    if not ema:
        losses = losses + losses.detach()
    record(case, z, z_q, codes, losses.sum(), {f"{n}codebook": b for n, b in zip(names, books)})
    if not ema:
        for layer, name in zip(rvq.layers, names):
            OUT[f"{case}/grad/{name}codebook"] = layer._codebook.embed.grad[0]
        return
    OUT[f"{case}/z.0"] = z
    averages(case, 0, [(layer, 0) for layer in rvq.layers], names)
    for step in (1, 2):
        z = vectors(dim)
        rvq(flat(z))
        OUT[f"{case}/z.{step}"] = z
        averages(case, step, [(layer, 0) for layer in rvq.layers], names)


def finite_scalar(case, levels):
    """Mentzer et al. 2023, appendix A.1, bounds with (1 - eps) and shifts by tan; the package has (1 + eps)
    and atanh. Both are set to the paper's."""
    torch.manual_seed(30)
    fsq = FSQ(levels).double()
    package_bound = fsq.bound
    fsq.bound = lambda z, hard_clamp=False: package_bound(z, eps=-1e-3, hard_clamp=hard_clamp)
    z = vectors(len(levels), 1.5).requires_grad_()
    finite_scalar_quantization.atanh = torch.tan
    with torch.no_grad():
        numbers = torch.tensor(levels)
        half = (numbers - 1) * (1 - 1e-3) / 2
        offset = torch.where(numbers % 2 == 0, 0.5, 0.0)
        bounded = torch.tanh(z + torch.tan(offset / half)) * half - offset
        assert ((bounded - bounded.floor() - 0.5).abs() > 1e-4).all(), "too close to the middle"
    z_q, codes = fsq(flat(z))
    record(case, z, z_q, codes, 0.0, {})


def binary(case, spherical, inv_temperature, bits=6):
    # The package cuts off the logarithm at 1e-5, the formula does not.
    lookup_free_quantization.log = lambda t, eps=1e-300: t.clamp(min=eps).log()
    torch.manual_seed(40 + spherical)
    lfq = LFQ(
        dim=bits, entropy_loss_weight=0.1, diversity_gamma=0.7, commitment_loss_weight=BETA,
        spherical=spherical, force_quantization_f32=False,
    ).double().train()
    z = vectors(bits, 0.2 if not spherical else 1.0).requires_grad_()
    z_q, codes, loss = lfq(flat(z), inv_temperature=inv_temperature)
    record(case, z, z_q, codes, loss, {})


def binary_bit_by_bit():
    """Zhao et al. 2024, section 4: both entropies are sums over the bits. Not in the package."""
    torch.manual_seed(50)
    bits, inv_temperature, gamma, weight = 18, 1.0, 1.0, 0.1
    z = vectors(bits).requires_grad_()
    u = flat(z) / flat(z).norm(dim=-1, keepdim=True)
    e = torch.where(u > 0, 1.0, -1.0) / bits**0.5
    # The softmax of 2 u.e / tau over e = +-1/sqrt(D), of which each bit is one of two.
    both = torch.stack([-u, u], -1) * 2 * inv_temperature / bits**0.5
    p = both.softmax(-1)
    entropy = lambda p: -(p * p.log()).sum(-1).sum(-1)
    loss = weight * (entropy(p).mean() - gamma * entropy(p.mean((0, 1))))
    loss = loss + BETA * F.mse_loss(u, e)
    codes = ((u > 0).long() * 2 ** torch.arange(bits - 1, -1, -1)).sum(-1)
    record("binary-spherical-18", z, u + (e - u).detach(), codes, loss, {})


def sim(case, rotation):
    torch.manual_seed(60 + rotation)
    dim, size = 5, 12
    z = vectors(dim).requires_grad_()
    vq = SimVQ(dim, size, rotation_trick=rotation, input_to_quantize_commit_loss_weight=BETA).double().train()
    fixed = codebook(size, z)
    vq.frozen_codebook.copy_(fixed)
    transform = (torch.eye(dim) + 0.2 * torch.randn(dim, dim)).float().double()
    vq.code_transform.weight.data.copy_(transform)
    clear(z, vq.codebook.detach(), case)
    z_q, codes, loss = vq(flat(z))
    record(case, z, z_q, codes, loss, {"fixed": fixed, "transform": transform})
    OUT[f"{case}/grad/transform"] = vq.code_transform.weight.grad


def index_backprop():
    """Shi et al. 2024, section 3, with their double loss; beta on the encoder's term (their code has it on the
    codebook's). Entropies with a temperature, without their 1e-5 in the logarithms."""
    torch.manual_seed(70)
    dim, size, temperature, gamma, weight = 5, 12, 0.5, 0.8, 0.1
    z = vectors(dim).requires_grad_()
    book = codebook(size, z).requires_grad_()
    rows = z.reshape(-1, dim)
    logits = rows @ book.T
    two = logits.detach().topk(2, dim=1).values
    assert (two[:, 0] - two[:, 1]).min() > 1e-4
    soft = logits.softmax(-1)
    codes = logits.argmax(-1)
    hard = F.one_hot(codes, size).double()
    z_q = (hard - soft.detach() + soft) @ book
    e = hard @ book
    q = (logits / temperature).softmax(-1)
    entropy = lambda p: -(p * p.log()).sum(-1)
    loss = F.mse_loss(z_q, rows) + F.mse_loss(e, rows.detach()) + BETA * F.mse_loss(e.detach(), rows)
    loss = loss + weight * (entropy(q).mean() - gamma * entropy(q.mean(0)))
    record("index-backprop", z, z_q, codes, loss, {"codebook": book.detach().clone()})
    OUT["index-backprop/grad/codebook"] = book.grad


def main():
    torch.set_num_threads(1)
    torch.use_deterministic_algorithms(True)
    vector_cosine_ema()
    product("product-gradient", ema=False, rotation=False)
    product("product-ema-rotation", ema=True, rotation=True)
    residual("residual-gradient", ema=False)
    residual("residual-ema", ema=True)
    finite_scalar("finite-scalar-mixed", [8, 5, 4, 3])
    finite_scalar("finite-scalar-even", [8, 6])
    binary("lookup-free", spherical=False, inv_temperature=5.0)
    binary("binary-spherical", spherical=True, inv_temperature=2.0)
    binary_bit_by_bit()
    sim("sim", rotation=False)
    sim("sim-rotation", rotation=True)
    index_backprop()
    write(pathlib.Path(__file__).with_name("quantizers.safetensors"), OUT)


if __name__ == "__main__":
    main()
