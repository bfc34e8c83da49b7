import hashlib

import pytest
import torch

from peft_dst.subsets import (
    change_scores,
    check_scores,
    combined_scores,
    is_bias,
    magnitude_scores,
    random_scores,
)


def split_mix_64(state):
    """The next state and output, in Python's integers."""
    state = (state + 0x9E3779B97F4A7C15) % 2**64
    z = (state ^ (state >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB % 2**64
    return state, z ^ (z >> 31)


def test_the_reference_generator_is_split_mix_64():
    # The first outputs for the state 0, as published with the generator.
    state, first = split_mix_64(0)
    assert (first, split_mix_64(state)[1]) == (0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4)


@pytest.mark.parametrize(("name", "seed"), [("encoder.layer.0.weight", 0), ("ü", -3), ("", 2**70)])
def test_random_scores_equal_plain_integers(name, seed):
    scores = random_scores(name, (3, 5), seed)
    state = int.from_bytes(hashlib.blake2b(f"{seed}:{name}".encode(), digest_size=8).digest(), "little")
    for score in scores.flatten().tolist():
        state, output = split_mix_64(state)
        assert score == ((output >> 40) + 1) / 2**24


def test_random_scores_never_change():
    scores = random_scores("encoder.layer.0.attention.self.query.weight", (2, 3), 17)
    assert (scores.double() * 2**24).long().tolist() == [[13616841, 15409066, 11222194], [14698902, 6237745, 405905]]
    far = random_scores("w", (200_000,), 0)[-1].double() * 2**24
    assert int(far) == 16625942


def test_random_scores_are_uniform_and_of_their_own():
    scores = random_scores("w", (1000, 1000), 0)
    assert scores.dtype == torch.float32
    assert scores.min() > 0
    assert scores.max() <= 1
    # Standard errors: 0.29 / 1000 of the mean, 0.0004 of a share.
    assert abs(scores.mean().item() - 0.5) < 0.0015
    assert abs((scores > 0.8).float().mean().item() - 0.2) < 0.002
    assert scores.flatten()[:-1].sub(0.5).mul(scores.flatten()[1:] - 0.5).mean().abs() < 0.0005
    for other in (random_scores("w", (1000, 1000), 1), random_scores("v", (1000, 1000), 0)):
        assert abs(torch.corrcoef(torch.stack([scores.flatten(), other.flatten()]))[0, 1].item()) < 0.005


def test_random_scores_depend_on_the_flat_index_alone():
    # Tiles of 65,536 components.
    scores = random_scores("w", (300_000,), 5)
    assert torch.equal(random_scores("w", (70_000,), 5), scores[:70_000])
    assert torch.equal(random_scores("w", (300, 1000), 5).flatten(), scores)
    assert random_scores("w", (), 5) == scores[0]
    assert random_scores("w", (0, 3), 5).shape == (0, 3)


def test_magnitude_scores():
    parameter = torch.nn.Parameter(torch.tensor([[-2.5, 0.0], [1.5, -0.0]], dtype=torch.bfloat16))
    scores = magnitude_scores(parameter)
    assert scores.tolist() == [[2.5, 0.0], [1.5, 0.0]]
    assert scores.dtype == torch.float32
    assert not scores.requires_grad
    weight = torch.tensor([-1.0])
    assert magnitude_scores(weight) == 1
    assert weight == -1


def test_biases_by_name():
    biases = ["bias", "encoder.layer.0.output.LayerNorm.bias", "attn.in_proj_bias", "classifier.bias"]
    others = ["relative_attention_bias.weight", "bias.weight", "unbiased", "a.biases", ""]
    assert [name for name in biases + others if is_bias(name)] == biases


def test_biases_of_bert(build):
    model = build("bert")
    biases = [name for name, _ in model.named_parameters() if is_bias(name)]
    modules = dict(model.named_modules())
    wanted = [
        f"{name}.bias" for name, module in modules.items() if isinstance(module, torch.nn.Linear | torch.nn.LayerNorm)
    ]
    assert sorted(biases) == sorted(wanted)


def test_combined_scores():
    downstream = {"w": torch.tensor([[4.0, 3.0]]), "b": torch.tensor([0.5])}
    pretraining = {"b": torch.tensor([0.0]), "w": torch.tensor([[1.0, 0.5]]), "head": torch.tensor([9.0])}
    scores = combined_scores(downstream, pretraining)
    assert list(scores) == ["w", "b"]
    assert scores["w"].tolist() == [[2.0, 2.0]]
    assert scores["b"].tolist() == [0.5]
    assert downstream["w"].tolist() == [[4.0, 3.0]]


def test_combined_scores_refuses_what_does_not_go_together():
    one = {"w": torch.ones(2), "head": torch.ones(1)}
    with pytest.raises(ValueError, match=r"'head' is missing in the pretraining scores.*leave it out of `names`"):
        combined_scores(one, {"w": torch.ones(2)})
    with pytest.raises(ValueError, match=r"'w' has shape \(1, 2\) in the pretraining scores, \(2,\) in the downstream"):
        combined_scores(one, {"w": torch.ones(1, 2), "head": torch.ones(1)})
    for bad in (one | {"w": -torch.ones(2)}, one | {"w": torch.full((2,), float("nan"))}):
        with pytest.raises(ValueError, match="'w' has values from"):
            combined_scores(one, bad)
        with pytest.raises(ValueError, match="'w' has values from"):
            combined_scores(bad, one)


def test_change_scores():
    seed = {"w": torch.tensor([1.0, -1.0, 0.0]), "b": torch.tensor([1.0], dtype=torch.bfloat16)}
    tuned = {"w": torch.tensor([0.5, -2.0, 0.0]), "b": torch.tensor([1.0 + 2**-9]), "head": torch.ones(1)}
    scores = change_scores(seed, tuned)
    assert {name: score.tolist() for name, score in scores.items()} == {"w": [0.5, 1.0, 0.0], "b": [2**-9]}
    assert tuned["w"].tolist() == [0.5, -2.0, 0.0]
    exact = change_scores({"w": torch.ones(1).double()}, {"w": torch.tensor([1 + 1e-9], dtype=torch.float64)})["w"]
    assert exact.item() == pytest.approx(1e-9)
    assert exact.dtype == torch.float32


def test_change_scores_refuses_another_model():
    with pytest.raises(ValueError, match="'w' is missing in the tuned model"):
        change_scores({"w": torch.ones(1)}, {})
    with pytest.raises(ValueError, match=r"'w' has shape \(2,\) in the tuned model, \(1,\) in the seed"):
        change_scores({"w": torch.ones(1)}, {"w": torch.ones(2)})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1e-30])
def test_what_is_no_score_is_refused(value):
    with pytest.raises(ValueError, match=r"'w' has values from .* finite and not negative"):
        check_scores({"v": torch.ones(1), "w": torch.tensor([0.0, value, 1.0])})
    with pytest.raises(ValueError, match=r"'w' is torch.float64 on cpu.*score.float\(\).cpu\(\)"):
        check_scores({"w": torch.ones(1).double()})
    with pytest.raises(ValueError, match=r"'w' has shape \(1,\), the parameter \(1, 1\)"):
        check_scores({"w": torch.ones(1)}, {"w": (1, 1)})
    check_scores({"w": torch.empty(0), "v": torch.tensor([-0.0]), "u": torch.ones(())}, {"v": [1]})
