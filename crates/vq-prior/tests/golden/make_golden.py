"""Golden values for vq-prior from PyTorch: `python make_golden.py` rewrites golden.safetensors beside it.

Made with Python 3.11.7 and PyTorch 2.15.0 (CPU); nothing else is needed. Deterministic: the same versions
give the same bytes. Computed in f64 from parameters that are exact in f32, stored as f32.

Tensors, for each case: CASE/codes and CASE/labels (as f32), CASE/param/NAME, CASE/logits.G [B, h, w, K],
CASE/loss, CASE/grad/NAME.
"""

import json
import pathlib
import struct

import torch

import networks

GRID, SIZES, CLASSES, BATCH = (3, 5), [6, 4], 2, 2
PIXELCNN = dict(channels=6, layers=3, hidden=8, skip=5, first=5, kernel=3)
TRANSFORMER = dict(channels=8, layers=2, hidden=7, mlp=10)


def case(kind, settings, features):
    generator = torch.Generator().manual_seed(len(kind))

    def draw(shape, scale):
        values = torch.rand(shape, generator=generator, dtype=torch.float64) * 2 - 1
        return (values * scale).float().double()

    p = {}
    for name, shape in networks.shapes(kind, GRID, SIZES, CLASSES, **settings).items():
        fan_in = max(1, shape[1] * shape[2] * shape[3]) if name.endswith("weight") else 1
        values = draw(shape, (3.0 / fan_in) ** 0.5 if name.endswith("weight") else 0.5)
        p[name] = (values + (1.0 if name.endswith("gain") else 0.0)).requires_grad_()
    codes = torch.stack(
        [torch.randint(0, size, (BATCH, *GRID), generator=generator) for size in SIZES], dim=-1
    )
    labels = torch.tensor([1, CLASSES])
    logits = networks.head(p, features(p, codes, labels), codes)
    loss = networks.loss(logits, codes)
    loss.backward()
    tensors = {f"{kind}/codes": codes, f"{kind}/labels": labels, f"{kind}/loss": loss.reshape(1)}
    for index, value in enumerate(logits):
        tensors[f"{kind}/logits.{index}"] = value.permute(0, 2, 3, 1)
    for name, value in p.items():
        tensors[f"{kind}/param/{name}"] = value
        # The vertical gate of the last layer feeds nothing.
        tensors[f"{kind}/grad/{name}"] = torch.zeros_like(value) if value.grad is None else value.grad
    return tensors


def write(path, tensors):
    header, data = {}, b""
    for name, tensor in sorted(tensors.items()):
        values = tensor.detach().float().contiguous()
        raw = struct.pack(f"<{values.numel()}f", *values.flatten().tolist())
        offsets = [len(data), len(data) + len(raw)]
        header[name] = {"dtype": "F32", "shape": list(values.shape), "data_offsets": offsets}
        data += raw
    text = json.dumps(header).encode()
    text += b" " * (-len(text) % 8)
    path.write_bytes(struct.pack("<Q", len(text)) + text + data)


def main():
    torch.use_deterministic_algorithms(True)
    layers = PIXELCNN["layers"]
    tensors = case("pixelcnn", PIXELCNN, lambda p, c, l: networks.pixelcnn(p, c, l, layers))
    layers = TRANSFORMER["layers"]
    tensors |= case(
        "transformer", TRANSFORMER, lambda p, c, l: networks.transformer(p, c, l, layers, heads=2)
    )
    write(pathlib.Path(__file__).parent / "golden.safetensors", tensors)


main()
