"""What the tests of quantised bases start from."""

from __future__ import annotations

import pytest
import torch
import transformers as hf
from peft import get_peft_model

from peft_dst import DSTConfig
from tests.models import BUILDERS, logits, train
from tests.quantised.bases import KINDS, quantization_config, with_stand_ins


# bitsandbytes' 4-bit kernel wants outputs by 32 and inputs by 64.
WIDE = {"bert": {"hidden_size": 64, "intermediate_size": 128}, "gpt2": {"n_embd": 64}}


@pytest.fixture(params=KINDS)
def kind(request):
    return request.param


@pytest.fixture
def base(tmp_path):
    """Load a tiny base, always the same: in float32, or quantised."""

    def make(kind=None, name="bert"):
        folder = tmp_path / f"base_{name}"
        if not folder.is_dir():
            torch.manual_seed(0)
            model = BUILDERS[name]()
            config = type(model.config)(**{**model.config.to_dict(), **WIDE[name]})
            type(model)(config).save_pretrained(folder)
        # Saved configs name their architecture.
        architecture = getattr(hf, hf.AutoConfig.from_pretrained(folder).architectures[0])
        if kind in (None, "stand-in"):
            model = architecture.from_pretrained(folder)
            return with_stand_ins(model).eval() if kind else model
        return architecture.from_pretrained(folder, quantization_config=quantization_config(kind)).eval()

    return make


@pytest.fixture
def adapter(base, tmp_path):
    """Train an adapter on the float32 base and save it; its folder and its logits."""

    def make(name="bert", label="a", dtype=torch.float32, first=0, **options):
        folder = tmp_path / label
        model = get_peft_model(base(None, name).to(dtype), DSTConfig(**{"epsilon": 0.05, **options}))
        train(model, name, steps=4, lr=0.03, first=first)
        model.save_pretrained(folder)
        return folder, logits(model, name)

    return make
