import torch
from ..core import select


def is_bias(name):
    return name.endswith("bias")


def magnitude_scores(p):
    return p.detach().abs().float()


def random_scores(name, shape, seed):
    import zlib

    g = torch.Generator().manual_seed((zlib.crc32(name.encode()) + seed) % 2**31)
    return torch.rand(shape, generator=g) + 1e-3


def load_scores(path):
    raise ValueError


def choose(scores, silos, budgets):
    out = {}
    for s, names in silos.items():
        ts = [scores[n].flatten() for n in names]
        sel = select([torch.zeros(1).expand(t.numel()) for t in ts], ts, budgets[s], "absolute")
        out |= dict(zip(names, sel.indices))
    return out
