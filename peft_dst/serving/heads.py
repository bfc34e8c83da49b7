"""Which modules of a model are heads: a delta may bring them in another size than the base has."""

from __future__ import annotations

from torch import nn


def heads_of(model: nn.Module) -> set[nn.Module]:
    """What is outside of a model's body, and its output embeddings.

    Models of transformers tell where these are. Of any other model all modules are returned, as nobody can tell.
    """
    body = getattr(model, "base_model", None)
    if not isinstance(body, nn.Module):
        return set(model.modules())
    # A bare body is its own, and so are some models with output embeddings.
    heads = set(model.modules()) - set(body.modules())
    output = getattr(model, "get_output_embeddings", lambda: None)()
    return heads | ({output} if isinstance(output, nn.Module) else set())
