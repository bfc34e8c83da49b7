"""Continuing texts together gives what continuing each alone gives."""

from __future__ import annotations

import pytest
import torch
import transformers as hf

from peft_dst.server.cohorts import Cohort, Continuation, check_model
from peft_dst.server.sampling import Sampling, pick
from tests.models import BUILDERS


# In double precision: what a batch rounds otherwise is far below what tells two tokens apart.
@pytest.fixture(params=["gpt2", "llama"])
def model(request):
    torch.manual_seed(0)
    return BUILDERS[request.param]().double().eval()


PROMPTS = [[5, 6, 7], [8], [9, 10, 11, 12, 13, 14], [15, 16]]


def alone(model, prompt, limit, ends=frozenset()):
    """The plain twin: the whole text is read again for every token."""
    tokens: list[int] = []
    while len(tokens) < limit:
        with torch.no_grad():
            token = int(model(input_ids=torch.tensor([[*prompt, *tokens]])).logits[0, -1].argmax())
        if token in ends:
            break
        tokens.append(token)
    return tokens


def run(cohort):
    while cohort.members:
        cohort.step()


def test_together_as_alone(model):
    members = [Continuation(prompt, limit) for prompt, limit in zip(PROMPTS, (5, 9, 1, 3), strict=True)]
    run(Cohort(model, members))
    assert [member.tokens for member in members] == [alone(model, m.prompt, m.limit) for m in members]
    assert {member.finished for member in members} == {"length"}


def test_of_a_prompt_only_the_last_logits_are_made(model):
    made = []
    model.lm_head.register_forward_hook(lambda *call: made.append(call[2].shape[1]))
    run(Cohort(model, [Continuation(prompt, 3) for prompt in PROMPTS]))
    assert made == [1, 1, 1]


def test_a_head_larger_than_the_embeddings(model):
    """What could not be read again is never picked."""
    want = [alone(model, prompt, 4) for prompt in PROMPTS]
    size, width = model.lm_head.weight.shape
    head = torch.nn.Linear(width, size + 2, bias=False, dtype=torch.float64)
    loud = 1e3 * torch.randn(width)
    with torch.no_grad():
        head.weight[:size] = model.lm_head.weight
        # Whatever they are given, one of the two is larger than all others.
        head.weight[size:] = torch.stack([loud, -loud])
    model.lm_head = head
    cohort = Cohort(model, members := [Continuation(prompt, 4) for prompt in PROMPTS])
    run(cohort)
    assert cohort.width == size + 2
    assert [member.tokens for member in members] == want


def test_it_is_what_generate_gives(model):
    (member,) = members = [Continuation(PROMPTS[2], 8)]
    run(Cohort(model, members))
    ids = torch.tensor([PROMPTS[2]])
    made = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, min_new_tokens=8, do_sample=False)
    assert member.tokens == made[0, ids.shape[1] :].tolist()


@pytest.mark.parametrize("after", [0, 1, 4])
def test_joining_between_steps(model, after):
    """Whenever others come in, and however long they are."""
    first = [Continuation(prompt, 8) for prompt in PROMPTS[:2]]
    second = [Continuation(prompt, limit) for prompt, limit in zip(PROMPTS[2:], (3, 10), strict=True)]
    cohort = Cohort(model, first)
    for _ in range(after):
        cohort.step()
    cohort.join(Cohort(model, second))
    run(cohort)
    for member in (*first, *second):
        assert member.tokens == alone(model, member.prompt, member.limit)


def test_padding_goes_with_those_who_needed_it(model):
    long, short = Continuation(PROMPTS[2], 2), Continuation(PROMPTS[1], 4)
    cohort = Cohort(model, [long, short])
    assert cohort.mask.shape == (2, 6)
    cohort.step()
    assert cohort.members == [short]
    assert cohort.mask.tolist() == [[1, 1]]
    assert cohort.cache.layers[0].keys.shape[2] == 2
    run(cohort)
    assert short.tokens == alone(model, PROMPTS[1], 4)


def test_ends_are_not_part_of_the_answer(model):
    ends = frozenset(alone(model, PROMPTS[0], 9)[3:5])
    want = alone(model, PROMPTS[0], 9, ends)
    assert len(want) < 9
    (member,) = members = [Continuation(PROMPTS[0], 9, ends=ends)]
    run(Cohort(model, members))
    assert (member.tokens, member.finished) == (want, "stop")


def test_tokens_are_told_as_they_come(model):
    seen: list[int] = []
    member = Continuation(PROMPTS[0], 4, on_token=seen.append)
    cohort = Cohort(model, [member])
    assert len(seen) == 1
    cohort.step()
    assert len(seen) == 2
    member.cancelled = True
    cohort.step()
    assert (member.finished, cohort.members, seen) == ("cancelled", [], member.tokens)


def test_what_cannot_be_continued():
    with pytest.raises(ValueError, match="the prompt has no tokens"):
        Continuation([], 3)
    with pytest.raises(ValueError, match="at least one new token must be asked for, got 0"):
        Continuation([1], 0)
    sliding = hf.MistralConfig(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, sliding_window=4,
    )  # fmt: skip
    with pytest.raises(ValueError, match=r"MistralForCausalLM keeps a DynamicSlidingWindowLayer of what it has read"):
        Cohort(hf.MistralForCausalLM(sliding), [Continuation([1], 3)])


# Sampling


def test_sampling():
    logits = torch.tensor([0.5, 2.0, 1.0]).log()
    assert pick(logits, Sampling(), torch.Generator()) == 1

    def counts(sampling, n=4000):
        generator = sampling.generator()
        return torch.bincount(torch.tensor([pick(logits, sampling, generator) for _ in range(n)]), minlength=3) / n

    assert torch.allclose(counts(Sampling(1.0, seed=0)), torch.tensor([1, 4, 2]) / 7, atol=0.03)
    # At temperature 1/2 probabilities are squared.
    assert torch.allclose(counts(Sampling(0.5, seed=0)), torch.tensor([1, 16, 4]) / 21, atol=0.03)
    # 4/7 alone do not reach .6, with 2/7 they do.
    assert torch.allclose(counts(Sampling(1.0, 0.6, seed=0)), torch.tensor([0, 2, 1]) / 3, atol=0.03)
    assert counts(Sampling(1.0, 0.5, seed=0)).tolist() == [0, 1, 0]


def test_a_seed_decides_whoever_else_is_there(model):
    def made(members):
        run(Cohort(model, members))
        return members[0].tokens

    sampling = Sampling(1.0, seed=7)
    one = made([Continuation(PROMPTS[0], 8, sampling)])
    assert one == made([Continuation(p, 8, sampling) for p in PROMPTS])
    assert one != made([Continuation(PROMPTS[0], 8, Sampling(1.0, seed=8))])


@pytest.mark.parametrize("after", [0, 1, 5])
def test_divided_and_joined_again(model, after):
    members = [Continuation(prompt, limit) for prompt, limit in zip(PROMPTS, (9, 12, 7, 10), strict=True)]
    cohort = Cohort(model, members)
    for _ in range(after):
        cohort.step()
    parts = cohort.divide(["a", "b", "a", "c"])
    assert [[members.index(member) for member in part.members] for part in parts] == [[0, 2], [1], [3]]
    for part in parts:
        part.step()
    first, *others = parts
    for other in others:
        first.join(other)
    run(first)
    assert [member.tokens for member in members] == [alone(model, m.prompt, m.limit) for m in members]


def test_one_part_is_the_cohort_itself(model):
    cohort = Cohort(model, [Continuation(prompt, 4) for prompt in PROMPTS])
    assert cohort.divide(["a"] * 4) == [cohort]


@pytest.mark.parametrize("lengths", [(2, 0), (0, 2)])
def test_after_an_error_two_batches_are_as_they_were(model, lengths):
    """Of the second layer, when the first one is joined; and whichever of the two was padded for it."""
    members = [[Continuation(PROMPTS[i], 9)] for i in lengths]
    one, other = (Cohort(model, of_one) for of_one in members)
    values = other.cache.layers[1].values
    other.cache.layers[1].values = values[..., :1]
    with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
        one.join(other)
    other.cache.layers[1].values = values
    for cohort, of_one in zip((one, other), members, strict=True):
        assert cohort.members == of_one
        run(cohort)
        assert of_one[0].tokens == alone(model, of_one[0].prompt, 9)


def test_what_was_interrupted_goes_on(model):
    members = [Continuation(prompt, 8) for prompt in PROMPTS]
    cohort = Cohort(model, members)
    cohort.step()
    cohort.step()
    run(Cohort(model, members))
    assert [member.tokens for member in members] == [alone(model, m.prompt, m.limit) for m in members]


def test_next_to_no_temperature_takes_the_most_probable():
    logits = torch.tensor([0.5, 2.0, 1.0, -torch.inf])
    for temperature in (1e-320, 1e-30):
        assert pick(logits, Sampling(temperature), torch.Generator()) == 1


@pytest.mark.parametrize("bad", [torch.nan, torch.inf])
@pytest.mark.parametrize("sampling", [Sampling(), Sampling(1.0)])
def test_logits_that_are_no_numbers(bad, sampling):
    with pytest.raises(ArithmeticError, match=f"the model's largest logit is {bad}"):
        pick(torch.tensor([0.5, bad, 1.0]), sampling, torch.Generator())


@pytest.mark.parametrize("wrong", ["logits", "on_token"])
def test_an_error_of_one_is_not_that_of_others(model, wrong):
    def fails(token):
        raise RuntimeError("nobody listens")

    members = [Continuation(prompt, 6) for prompt in PROMPTS]
    cohort = Cohort(model, members)
    cohort.step()
    if wrong == "on_token":
        members[1].on_token = fails
    else:

        def spoil(module, args, output):
            output[1] = torch.nan

        hook = model.lm_head.register_forward_hook(spoil)
    cohort.step()
    assert (members[1].finished, members[1] in cohort.members) == ("error", False)
    assert isinstance(members[1].error, RuntimeError if wrong == "on_token" else ArithmeticError)
    if wrong == "logits":
        hook.remove()
    run(cohort)
    for member in (members[0], *members[2:]):
        assert member.tokens == alone(model, member.prompt, 6)


SMALL = {"vocab_size": 61, "hidden_size": 16, "num_hidden_layers": 1}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        (hf.MistralConfig(**SMALL, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2), "SlidingWindow"),
        (
            hf.Gemma2Config(
                **SMALL, intermediate_size=32, num_attention_heads=2, num_key_value_heads=2, head_dim=8,
                layer_types=["sliding_attention"],
            ),
            "SlidingWindow",
        ),
        (hf.MambaConfig(**SMALL), "LinearAttentionLayer"),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)  # fmt: skip
def test_models_that_cannot_be_continued_here(config, message):
    model = hf.AutoModelForCausalLM.from_config(config).eval()
    with pytest.raises(ValueError, match=message):
        check_model(model)
    told: list[int] = []
    with pytest.raises(ValueError, match=message):
        Cohort(model, [Continuation([1], 3, on_token=told.append)])
    assert told == []


@pytest.mark.parametrize(
    ("config", "message"),
    [
        # It reads in both directions: what its second layer keeps of earlier tokens does not know the later ones.
        (
            hf.BertConfig(
                **SMALL | {"num_hidden_layers": 2}, intermediate_size=32, num_attention_heads=2, initializer_range=1.0
            ),
            "gives other logits",
        ),
        (
            hf.T5Config(
                vocab_size=61, d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2, decoder_start_token_id=0
            ),
            "T5ForConditionalGeneration cannot continue texts side by side",
        ),
    ],
    ids=lambda value: getattr(value, "model_type", ""),
)
def test_models_that_are_not_causal(config, message):
    kind = hf.AutoModelForSeq2SeqLM if config.is_encoder_decoder else hf.AutoModelForCausalLM
    torch.manual_seed(0)
    with pytest.raises(ValueError, match=message):
        check_model(kind.from_config(config).eval())


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_models_that_can(model, dtype):
    check_model(model.to(dtype))
