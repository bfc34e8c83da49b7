import pytest
from torch import nn

from peft_dst.core import partition
from peft_dst.core.silos import compile_silo_patterns, read_names
from tests.models import BUILDERS


def names_of(model: nn.Module) -> list[str]:
    return [name for name, _ in model.named_parameters()]


# The kinds of module that each architecture has, inside a layer and outside.
KINDS = {
    "bert": ({"attention", "feed_forward"}, {"embeddings", "head"}),
    "gpt2": ({"attention", "feed_forward"}, {"embeddings"}),
    "llama": ({"attention", "feed_forward"}, {"embeddings", "head"}),
    "mixtral": ({"attention", "router", "experts"}, {"embeddings", "head"}),
    "qwen_moe": ({"attention", "router", "experts", "feed_forward"}, {"embeddings", "head"}),
    "roberta": ({"attention", "feed_forward"}, {"embeddings", "head"}),
    "t5": ({"attention", "cross_attention", "feed_forward"}, {"embeddings"}),
    "vit": ({"attention", "feed_forward"}, {"embeddings", "head"}),
}


def test_every_architecture_has_its_kinds(architecture):
    found = read_names(names_of(BUILDERS[architecture]())).values()
    inside = {kind for layer, kind in found if layer}
    outside = {kind for layer, kind in found if not layer} - {"norm"}
    assert (inside, outside) == KINDS[architecture]


def test_silos_of_t5_by_hand():
    silos = partition(names_of(BUILDERS["t5"]()), "module_and_layer")
    assert silos["decoder.block.1.cross_attention"] == [
        *(f"decoder.block.1.layer.1.EncDecAttention.{name}.weight" for name in "qkvo"),
        "decoder.block.1.layer.1.layer_norm.weight",
    ]
    assert silos["encoder.block.0.attention"][-2].endswith("relative_attention_bias.weight")
    assert "encoder.block.0.feed_forward" in silos
    assert silos["embeddings"] == ["shared.weight"]


def test_silos_of_bert_by_hand():
    silos = partition(names_of(BUILDERS["bert"]()), "module_and_layer")
    layer = "bert.encoder.layer.1"
    projections = ("attention.self.query", "attention.self.key", "attention.self.value", "attention.output.dense")
    assert silos[f"{layer}.attention"] == [
        f"{layer}.{p}.{kind}" for p in (*projections, "attention.output.LayerNorm") for kind in ("weight", "bias")
    ]
    assert silos[f"{layer}.feed_forward"] == [
        f"{layer}.{p}.{kind}"
        for p in ("intermediate.dense", "output.dense", "output.LayerNorm")
        for kind in ("weight", "bias")
    ]
    assert silos["head"] == [
        "bert.pooler.dense.weight",
        "bert.pooler.dense.bias",
        "classifier.weight",
        "classifier.bias",
    ]


def test_experts_are_three_dimensional_and_one_silo():
    model = BUILDERS["mixtral"]()
    silos = partition(names_of(model), "module_and_layer")
    assert silos["model.layers.0.experts"] == [
        "model.layers.0.mlp.experts.gate_up_proj",
        "model.layers.0.mlp.experts.down_proj",
        "model.layers.0.post_attention_layernorm.weight",
    ]
    assert all(model.get_parameter(n).dim() == 3 for n in silos["model.layers.0.experts"][:2])
    assert silos["model.layers.0.router"] == ["model.layers.0.mlp.gate.weight"]


@pytest.mark.parametrize("siloing", ["module_and_layer", "module", "none", "parameter"])
def test_a_partition_is_disjoint_and_complete(architecture, siloing):
    names = names_of(BUILDERS[architecture]())
    silos = partition(names, siloing)
    assert sorted(n for members in silos.values() for n in members) == sorted(names)
    count = len(silos)
    assert {"none": count == 1, "parameter": count == len(names), "module": 1 < count <= 8}.get(siloing, count > 5)


@pytest.mark.parametrize(
    ("name", "attention", "feed_forward", "outside"),
    [
        ("gpt2", "ln_1", "ln_2", "transformer.ln_f"),
        ("llama", "input_layernorm", "post_attention_layernorm", "model.norm"),
        ("vit", "layernorm_before", "layernorm_after", "vit.layernorm"),
    ],
)
def test_norms_go_with_the_module_they_serve(name, attention, feed_forward, outside):
    read = read_names(names_of(BUILDERS[name]()))
    norms = {n.split(".")[-2]: kind for n, (layer, kind) in read.items() if layer}
    assert norms[attention] == "attention"
    assert norms[feed_forward] == "feed_forward"
    assert read[f"{outside}.weight"] == ("", "norm")


def test_module_siloing_spans_layers():
    silos = partition(names_of(BUILDERS["llama"]()), "module")
    assert {n.split(".")[2] for n in silos["attention"]} == {"0", "1"}


def test_pattern_for_an_unknown_model():
    names = ["stem.w", "blocks.0.mixer.a", "blocks.0.ff.b", "blocks.1.mixer.a", "blocks.1.ff.b"]
    patterns = compile_silo_patterns(r"(?P<layer>blocks\.\d+)\.(?P<module>mixer|ff)")
    assert list(partition(names, "module_and_layer", patterns)) == [
        "stem", "blocks.0.mixer", "blocks.0.ff", "blocks.1.mixer", "blocks.1.ff",
    ]  # fmt: skip
    assert partition(names, "module", patterns)["mixer"] == ["blocks.0.mixer.a", "blocks.1.mixer.a"]
    # The first pattern that is found decides.
    patterns = compile_silo_patterns([r"^blocks\.0\.(?P<module>mixer)", r"(?P<module>blocks)"])
    assert list(partition(names, "module_and_layer", patterns)) == ["stem", "mixer", "blocks"]


def test_bad_patterns_are_named():
    with pytest.raises(ValueError, match=r"silo_pattern '\('.*not a valid regular expression"):
        compile_silo_patterns("(")
    with pytest.raises(ValueError, match="no group named 'module'"):
        compile_silo_patterns(r"blocks\.(\d+)")


def test_plain_torch_names():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
    assert partition(names_of(model), "module_and_layer") == {
        "0.other": ["0.weight", "0.bias"],
        "2.other": ["2.weight", "2.bias"],
    }
