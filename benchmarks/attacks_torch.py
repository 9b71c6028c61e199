"""The reference of benchmarks/attacks.py: torchattacks' attacks in the order and with the settings of AutoAttack.

    python benchmarks/attacks_torch.py WEIGHTS NET NORM EPS IMAGES

Needs torch and torchattacks, and nothing of lipbounds. Prints one line of JSON. Every example is checked in float64.
"""

import json
import sys
import time

import numpy as np
import torch
import torchattacks
from torch import nn


def network(arrays, name):
    def dense(key, inputs=None):
        kernel = torch.tensor(arrays[f"{key}.kernel"])
        if inputs is not None:  # flax flattens (H, W, C), torch (C, H, W)
            height, width, channels = inputs
            kernel = (
                kernel.reshape(height, width, channels, -1)
                .permute(2, 0, 1, 3)
                .reshape(height * width * channels, -1)
            )
        layer = nn.Linear(*kernel.shape)
        layer.weight.data, layer.bias.data = kernel.T.contiguous(), torch.tensor(arrays[f"{key}.bias"])
        return layer

    def convolution(key):
        kernel = torch.tensor(arrays[f"{key}.kernel"]).permute(3, 2, 0, 1).contiguous()
        layer = nn.Conv2d(kernel.shape[1], kernel.shape[0], 4, 2, 1)
        layer.weight.data, layer.bias.data = kernel, torch.tensor(arrays[f"{key}.bias"])
        return layer

    if name == "digits":
        layers = [nn.Flatten(), dense("first"), nn.ReLU(), dense("second"), nn.ReLU(), dense("last")]
    else:
        body = [convolution("first"), nn.ReLU(), convolution("second"), nn.ReLU(), nn.Flatten()]
        layers = [*body, dense("dense", (7, 7, 16)), nn.ReLU(), dense("last")]
    return nn.Sequential(*layers).eval()


def main():
    path, name, norm, eps, images = sys.argv[1:]
    arrays, eps = np.load(path), float(eps)
    model = network(arrays, name)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    x = torch.tensor(arrays["x"][: int(images)]).permute(0, 3, 1, 2).contiguous()
    y = torch.tensor(arrays["y"][: int(images)])
    kind = {"2": "L2", "inf": "Linf"}[norm]
    common = {"norm": kind, "eps": eps, "seed": 0}
    attacks = {
        "APGD-CE": torchattacks.APGD(model, steps=100, loss="ce", **common),
        "APGD-T": torchattacks.APGDT(model, steps=100, n_classes=10, **common),
        "FAB-T": torchattacks.FAB(model, steps=100, multi_targeted=True, n_classes=10, **common),
        "Square": torchattacks.Square(model, n_queries=5000, p_init=0.8, **common),
    }
    begin, cpu = time.perf_counter(), time.process_time()
    with torch.no_grad():
        robust = model(x).argmax(1) == y
    columns, stages = {"clean": robust.float().mean().item()}, {}
    for title, attack in attacks.items():
        start = time.perf_counter()
        rows = robust.nonzero().flatten()
        if len(rows):
            found = attack(x[rows], y[rows])
            with torch.no_grad():
                broken = model(found).argmax(1) != y[rows]
            shift = (found.double() - x[rows].double()).flatten(1)
            far = shift.abs().amax(1) if norm == "inf" else shift.norm(dim=1)
            broken &= (far <= eps * (1 + 1e-5)) & (found.amin((1, 2, 3)) >= 0) & (found.amax((1, 2, 3)) <= 1)
            robust[rows[broken]] = False
        columns[title] = robust.float().mean().item()
        stages[title] = time.perf_counter() - start
    record = {
        "columns": columns,
        "seconds": time.perf_counter() - begin,
        "cpu_seconds": time.process_time() - cpu,
        "stages": stages,
        "torch": torch.__version__,
        "torchattacks": torchattacks.__version__,
    }
    print(json.dumps(record))


if __name__ == "__main__":
    main()
