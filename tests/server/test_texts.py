"""Texts and tokens: what is told of an answer while it comes is what the tokenizer makes of it as a whole."""

from __future__ import annotations

import random

import pytest
import torch
import transformers as hf
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from peft_dst.server.limits import Refused
from peft_dst.server.texts import UNFINISHED, Decoding, Prompts, Telling, longest


def fast(vocabulary, decoder=None, pre_tokenizer=None, **options):
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate(vocabulary)}, unk_token=vocabulary[0]))
    made.pre_tokenizer = pre_tokenizer or pre_tokenizers.WhitespaceSplit()
    if decoder is not None:
        made.decoder = decoder
    return hf.PreTrainedTokenizerFast(tokenizer_object=made, unk_token=vocabulary[0], **options)


def like_llama():
    """Spaces before words, the first of which is dropped; bytes for characters that are no words."""
    words = ["<unk>", "<s>", "▁girl", "▁named", "▁Lily", ".", "▁", "ing", "▁日"]
    decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return fast([*words, *(f"<0x{byte:02X}>" for byte in range(256))], decoder, bos_token="<s>")


def like_gpt2():
    """Bytes are characters of their own, which are put together when they are decoded."""
    words = ["<unk>", "<s>", "Ġgirl", "Ġnamed", "ĠLily", ".", "Ġ", "ing"]
    return fast([*words, *pre_tokenizers.ByteLevel.alphabet()], decoders.ByteLevel(), bos_token="<s>")


def words_apart():
    return fast(["<unk>", "<s>", "girl", "named", "Lily", ".", "n't", "ing"], bos_token="<s>")


def told(tokenizer, before, tokens, stops=()):
    """The pieces of an answer, until a stop."""
    telling, pieces = Telling(Decoding(tokenizer, before), stops), []
    for token in [*tokens, None]:
        text, stopped = telling.tell(token)
        pieces.append(text)
        if stopped:
            break
    return pieces


def whole(tokenizer, tokens):
    return tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False)


def sentence(rng, tokenizer, length):
    """Words, and characters of several bytes, as tokens."""
    found = []
    for _ in range(length):
        character = rng.choice("éß日本🙂").encode()
        if tokenizer.convert_tokens_to_ids("<0xE6>"):
            as_bytes = tokenizer.convert_tokens_to_ids([f"<0x{byte:02X}>" for byte in character])
        elif tokenizer.convert_tokens_to_ids("Ã"):
            pieces = pre_tokenizers.ByteLevel(add_prefix_space=False).pre_tokenize_str(character.decode())
            as_bytes = tokenizer.convert_tokens_to_ids(list("".join(piece for piece, _ in pieces)))
        else:
            as_bytes = []
        found += rng.choice([[rng.randrange(2, 8)], [rng.randrange(2, 8)], as_bytes])
    return found


@pytest.mark.parametrize("kind", [like_llama, like_gpt2, words_apart])
def test_pieces_are_the_whole_less_the_prompt(kind):
    tokenizer, rng = kind(), random.Random(0)
    for _ in range(300):
        before = [1, *sentence(rng, tokenizer, rng.randrange(1, 30))]
        tokens = sentence(rng, tokenizer, rng.randrange(12))
        pieces = told(tokenizer, before, tokens)
        assert whole(tokenizer, before) + "".join(pieces) == whole(tokenizer, before + tokens)
        assert UNFINISHED not in "".join(pieces)
        # A text of its own.
        assert "".join(told(tokenizer, [], tokens)) == whole(tokenizer, tokens)


def test_special_tokens_before_an_answer_are_no_context():
    tokenizer = like_llama()
    assert told(tokenizer, [2, 3] + [1] * 20, [4, 5]) == [" Lily", ".", ""]


def test_nothing_is_cleaned_up_behind_what_was_told():
    tokenizer = fast(["[UNK]", "he", "does", "n't", "know", "."], clean_up_tokenization_spaces=True)
    assert told(tokenizer, [1], [2, 3, 4, 5]) == [" does", " n't", " know", " .", ""]


def test_characters_that_never_become_whole():
    tokenizer = like_gpt2()
    start = tokenizer.convert_tokens_to_ids("æ")
    # At the end; before another; in a row, of which nothing is kept for ever.
    assert told(tokenizer, [2], [3, start]) == [" named", "", UNFINISHED]
    assert "".join(told(tokenizer, [2], [start, 3])) == f"{UNFINISHED} named"
    pieces = told(tokenizer, [2], [start] * 100)
    assert "".join(pieces) == UNFINISHED * 100
    assert max(map(len, pieces)) <= 16
    # A prompt that ends in the middle of one.
    first, *rest = tokenizer.convert_tokens_to_ids(list("æĹ¥"))
    assert told(tokenizer, [2, first], rest) == ["", "日", ""]
    # Bytes that spoil those before them, which were told.
    tokenizer = like_llama()
    character = tokenizer.convert_tokens_to_ids(["<0xE6>", "<0x97>", "<0xA5>"])
    assert told(tokenizer, [2], [*character, character[0]]) == ["", "", "日", "", UNFINISHED]


@pytest.mark.parametrize("tokens", [[2, 3, 4] * 200, [1] * 600])
def test_a_token_costs_the_same_in_a_long_answer(tokens, monkeypatch):
    tokenizer, decoded = like_llama(), []
    decode = tokenizer.decode
    monkeypatch.setattr(tokenizer, "decode", lambda ids, **options: decoded.append(len(ids)) or decode(ids, **options))
    told(tokenizer, [2] * 1000, tokens)
    assert max(decoded) <= 64
    assert sum(decoded) <= 20 * len(tokens)


def test_stops_across_tokens():
    tokenizer = like_llama()
    tokens = [2, 3, 4, 5, 3]
    assert told(tokenizer, [1], tokens, ["named L"]) == ["girl", " ", ""]
    assert told(tokenizer, [2], tokens, ["y.", "Lily"]) == [" girl", " named", " "]
    assert "".join(told(tokenizer, [2], tokens, [". nameless", "Lil. "])) == whole(tokenizer, [2, *tokens])[4:]
    assert told(tokenizer, [2, 3], [2, 3], ["named girl"]) == [" girl", " ", "named"]


# Prompts


class Counting:
    """A tokenizer that takes a character for a token."""

    model_max_length = 10**30
    chat_template = None

    def __init__(self):
        self.read = 0

    def __call__(self, text, **options):
        self.read += len(text)
        return {"input_ids": [1] * len(text)}


def test_a_text_that_is_much_too_long_is_not_read():
    tokenizer = Counting()
    prompts = Prompts(tokenizer, 10, 20, 100)
    for text, read in (("a" * 30, 30), ("a" * 101, 0)):
        tokenizer.read = 0
        with pytest.raises(Refused, match=r"the 20 (tokens )?that are") as error:
            prompts.read(text, 1)
        assert (error.value.code, tokenizer.read) == ("context_length_exceeded", read)


@pytest.mark.parametrize("padding", [1, 3])
def test_positions_that_are_counted_from_behind_the_padding(padding):
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = hf.RobertaConfig(vocab_size=20, max_position_embeddings=22, pad_token_id=padding, **sizes)
    model = hf.RobertaForSequenceClassification(config).eval()
    size = longest(model, Counting(), 2048)
    ids = torch.full((1, size + 1), 7)
    with torch.no_grad():
        model(input_ids=ids[:, 1:])
        with pytest.raises((IndexError, RuntimeError), match="out of"):
            model(input_ids=ids)


def test_the_least_of_all_limits():
    config = hf.LlamaConfig(
        vocab_size=20, hidden_size=16, num_hidden_layers=1, num_attention_heads=2, max_position_embeddings=64
    )
    model, tokenizer = hf.LlamaForCausalLM(config), Counting()
    assert longest(model, tokenizer, 2048) == 64
    assert longest(model, tokenizer, 30) == 30
    tokenizer.model_max_length = 48
    assert longest(model, tokenizer, 2048) == 48


def test_positions_that_change_with_the_length_of_others_are_not_used():
    """Longrope takes other frequencies for all of a batch where one text is longer than the model was first trained on."""
    rope = {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [4.0] * 4,
        "original_max_position_embeddings": 16,
        "rope_theta": 10000.0,
    }
    config = hf.Phi3Config(
        vocab_size=61, hidden_size=16, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=2, max_position_embeddings=64, original_max_position_embeddings=16, pad_token_id=0,
        eos_token_id=1, bos_token_id=2, rope_parameters=rope, initializer_range=0.5,
    )  # fmt: skip
    torch.manual_seed(0)
    model = hf.Phi3ForCausalLM(config).eval()
    size = longest(model, Counting(), 2048)
    assert size == 16
    with torch.no_grad():
        alone = model(torch.arange(4)[None]).logits
        for length in (size, size + 1):
            found = model(torch.arange(length)[None]).logits[:, :4]
            assert torch.allclose(found, alone, atol=1e-4) == (length == size)
