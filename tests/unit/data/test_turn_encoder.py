"""What a chat template puts between two answers, as tokens."""

import pytest
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from mrl.data.embedded import build_embedded_tokenizer
from mrl.data.turn_encoder import TurnEncoder

CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% if no_thinking %}<think></think>{% endif %}{% endif %}"
)
QUESTION = [{"role": "user", "content": "two and two?"}]
FEEDBACK = [{"role": "tool", "content": "it is even"}, {"role": "user", "content": "again, please"}]


def chatml_tokenizer(template=CHATML):
    """A tokenizer of bytes with ChatML's two special tokens."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token) for token in ("<|im_start|>", "<|im_end|>", "<|endoftext|>")])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")
    fast.chat_template = template
    return fast


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("kwargs", [{}, {"no_thinking": True}])
def test_prompt_answer_and_messages_are_the_tokens_of_the_whole_conversation(kwargs):
    tokenizer = chatml_tokenizer()
    encoder = TurnEncoder(tokenizer, kwargs)
    prompt = ids_of(tokenizer, tokenizer.apply_chat_template(QUESTION, tokenize=False, add_generation_prompt=True))
    answer = ids_of(tokenizer, "fünf<|im_end|>")
    conversation = [*QUESTION, {"role": "assistant", "content": "fünf"}, *FEEDBACK]
    whole = tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True, **kwargs)
    assert [*prompt, *answer, *encoder.encode(FEEDBACK, last_token=answer[-1])] == ids_of(tokenizer, whole)
    assert encoder.decode(answer, has_ended=True) == "fünf"
    assert encoder.decode(answer, has_ended=False) == "fünf<|im_end|>"


LLAMA2 = (
    "{% for message in messages %}{% if message['role'] == 'user' %}<s>[INST] {{ message['content'] }} [/INST]"
    "{% else %} {{ message['content'] }} </s>{% endif %}{% endfor %}"
)
ZEPHYR = (
    "{% for message in messages %}<|{{ message['role'] }}|>\n{{ message['content'] }}</s>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}"
)


def sentencepiece_tokenizer(template, *, legacy, rstrip=False):
    """Letters and "▁" for spaces, put in front of a text as older or as newer SentencePiece tokenizers have it."""
    letters = sorted({*"abcdefghijklmnopqrstuvwxyz<>|[]/INSTaswer,?▁\n"})
    tokenizer = Tokenizer(models.BPE(vocab={letter: index for index, letter in enumerate(letters)}, merges=[]))
    if legacy:
        tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
        tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.Fuse(), decoders.Strip(" ", 1, 0)])
    else:
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
        tokenizer.decoder = decoders.Metaspace(prepend_scheme="first")
    tokenizer.add_special_tokens(
        [AddedToken("<s>", normalized=False), AddedToken("</s>", normalized=False, rstrip=rstrip)]
    )
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>")
    fast.chat_template = template
    return fast


@pytest.mark.parametrize("template", [LLAMA2, ZEPHYR], ids=["llama2", "zephyr"])
@pytest.mark.parametrize("legacy", [True, False])
@pytest.mark.parametrize("rstrip", [True, False])
def test_what_follows_an_answer_is_encoded_as_it_is_behind_it(template, legacy, rstrip):
    tokenizer = sentencepiece_tokenizer(template, legacy=legacy, rstrip=rstrip)
    conversation = [
        {"role": "user", "content": "two and two"},
        {"role": "assistant", "content": "five"},
        {"role": "user", "content": "try again"},
    ]
    whole = ids_of(tokenizer, tokenizer.apply_chat_template(conversation, tokenize=False, add_generation_prompt=True))
    ends = [place for place, token in enumerate(whole) if token == tokenizer.eos_token_id]
    # Zephyr's ends every message, Llama 2's the answers alone.
    expected = whole[ends[template == ZEPHYR] + 1 :]
    assert TurnEncoder(tokenizer).encode(conversation[2:], last_token=tokenizer.eos_token_id) == expected


def test_arguments_of_the_template_do_not_take_the_place_of_its_own():
    kwargs = {"add_generation_prompt": False, "tokenize": True}
    tokenizer = chatml_tokenizer()
    tokens = TurnEncoder(tokenizer, kwargs).encode(FEEDBACK[1:], last_token=tokenizer.eos_token_id)
    assert tokenizer.decode(tokens).endswith("<|im_start|>assistant\n")


def test_an_answer_that_ended_otherwise_is_ended_by_the_template():
    tokenizer = chatml_tokenizer()
    tokens = TurnEncoder(tokenizer).encode(FEEDBACK[1:], last_token=ids_of(tokenizer, "<|endoftext|>")[0])
    expected = "<|im_end|>\n<|im_start|>user\nagain, please<|im_end|>\n<|im_start|>assistant\n"
    assert tokenizer.decode(tokens) == expected


def test_a_template_that_ends_answers_with_nothing():
    tokenizer = build_embedded_tokenizer()
    tokens = TurnEncoder(tokenizer).encode([{"role": "user", "content": "34"}], last_token=tokenizer.eos_token_id)
    assert tokenizer.decode(tokens) == "<user>34"


@pytest.mark.parametrize(
    ("template", "message"),
    [
        (None, "this one has none"),
        ("{{ messages[0]['content'] }}", "does not show an answer once, as it is"),
        (CHATML + "{{ messages[1]['content'] }}", "does not show an answer once, as it is"),
        ("{{ messages[1]['content'] | upper }}", "does not show an answer once, as it is"),
        ("{{ raise_exception('no roles') }}", "cannot show .* no roles"),
    ],
)
def test_templates_that_cannot_hold_a_conversation_are_refused(template, message):
    with pytest.raises(ValueError, match=message):
        TurnEncoder(chatml_tokenizer(template))
