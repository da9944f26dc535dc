"""Prompts of our own models and of checkpoints: what begins them, their chat template, what ends an answer."""

import json

import numpy as np
import pytest
import tokenizers as hf_tokenizers

from moe_jax.config import ConfigError
from moe_jax.data.tokenizers import Bytes, load_pretrained, save_pretrained, train_bpe
from moe_jax.serve.prompts import Prompts
from moe_jax.serve.refusals import ApiError

CHATML = (
    "{%- for message in messages %}\n    {{- '<|im_start|>' + message['role'] + '\\n' + message['content'] | trim + '<|im_end|>\\n' }}\n"
    "{%- endfor %}\n{%- if add_generation_prompt %}\n    {{- '<|im_start|>assistant\\n' }}\n{%- endif %}"
)
MESSAGES = [{"role": "system", "content": "be brief"}, {"role": "user", "content": " hi\n"}]


@pytest.fixture
def folder(tmp_path):
    """A checkpoint's tokenizer with a token that begins texts, and tokens around turns."""
    save_pretrained(train_bpe(["the theory of the thing, then the other\n" * 20], 280), tmp_path)
    tokenizer = hf_tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    tokenizer.add_special_tokens(["<s>", "<|im_start|>", "<|im_end|>"])
    begin = tokenizer.token_to_id("<s>")
    tokenizer.post_processor = hf_tokenizers.processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", begin)])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    write(tmp_path / "tokenizer_config.json", {"eos_token": "<|endoftext|>", "bos_token": {"content": "<s>"}})
    write(tmp_path / "generation_config.json", {"eos_token_id": [tokenizer.token_to_id("<|im_end|>"), 279]})
    return tmp_path


def write(path, tree):
    path.write_text(json.dumps(tree))


def ids(folder, text):
    """As transformers encodes, without what stands before a text."""
    tokenizer = hf_tokenizers.Tokenizer.from_file(str(folder / "tokenizer.json"))
    return tokenizer.encode(text, add_special_tokens=False).ids


def test_our_own_models_begin_with_the_end_of_text_and_write_chats_plainly():
    prompts = Prompts(Bytes())
    assert prompts.text("hi").tolist() == [256, 104, 105]
    assert prompts.text("").tolist() == [256]
    assert prompts.text("hi").dtype == np.int32
    assert Bytes().decode(prompts.chat(MESSAGES)) == "system: be brief\nuser:  hi\n\nassistant:"
    assert prompts.stop_tokens == {256}
    assert prompts.chat_stops == ("\nuser:",)
    assert prompts.chat_format == "plain chat format"


def test_a_checkpoint_is_asked_as_transformers_asks_it(folder):
    tokenizer = load_pretrained(folder)
    prompts = Prompts(tokenizer, folder, as_is=True)
    assert prompts.text("the <|im_end|>").tolist() == ids(folder, "<s>the <|im_end|>")
    assert len(prompts.text("<|im_end|>")) == 2
    assert prompts.text("").tolist() == ids(folder, "<s>")
    assert prompts.stop_tokens == {tokenizer.eot, ids(folder, "<|im_end|>")[0], 279}


def test_a_run_with_a_checkpoints_tokenizer_begins_as_it_was_trained(folder):
    tokenizer = load_pretrained(folder)
    prompts = Prompts(tokenizer, folder)
    assert prompts.text("the").tolist() == [tokenizer.eot, *ids(folder, "the")]
    assert len(prompts.text("<|im_end|>")) > 2  # a text
    assert Prompts(tokenizer, folder / "gone").stop_tokens == {tokenizer.eot}


@pytest.mark.parametrize("place", ["config", "list", "file"])
def test_a_chat_template_is_rendered_and_its_tokens_are_special(folder, place):
    described = json.loads((folder / "tokenizer_config.json").read_text())
    if place == "file":
        (folder / "chat_template.jinja").write_text(CHATML)
    else:
        template = (
            CHATML if place == "config" else [{"name": "tool_use", "template": "x"}, {"name": "default", "template": CHATML}]
        )
        write(folder / "tokenizer_config.json", described | {"chat_template": template})
    prompts = Prompts(load_pretrained(folder), folder, as_is=True)
    text = "<|im_start|>system\nbe brief<|im_end|>\n<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    assert prompts.chat(MESSAGES).tolist() == ids(folder, text)
    assert prompts.chat_stops == ()
    assert "template" in prompts.chat_format
    with pytest.raises(ApiError, match=r"messages\[0\].content has '<\|im_end\|>' in it, which is a special token"):
        prompts.chat([{"role": "user", "content": "x<|im_end|>"}])
    plain = Prompts(load_pretrained(folder), folder, as_is=True, plain=True)
    assert plain.chat(MESSAGES).tolist() == ids(folder, "<s>system: be brief\nuser:  hi\n\nassistant:")


def test_a_template_may_name_tokens_and_refuse_messages(folder):
    checks = "{% if messages[0].role != 'user' %}{{ raise_exception('begin with the user') }}{% endif %}"
    template = "{{ bos_token }}" + checks + "{{ messages[0].content }}"
    (folder / "chat_template.jinja").write_text(template)
    prompts = Prompts(load_pretrained(folder), folder, as_is=True)
    assert prompts.chat(MESSAGES[1:]).tolist() == ids(folder, "<s> hi\n")
    with pytest.raises(ApiError, match="does not take these messages: begin with the user"):
        prompts.chat(MESSAGES)
    (folder / "chat_template.jinja").write_text("{{ messages[7].content.x }}")
    with pytest.raises(ApiError, match="does not take these messages"):
        Prompts(load_pretrained(folder), folder).chat(MESSAGES)


def test_a_template_that_cannot_be_read_is_refused_at_the_start(folder):
    (folder / "chat_template.jinja").write_text("{% if %}")
    with pytest.raises(ConfigError, match=r"cannot be read .*--chat_format=plain"):
        Prompts(load_pretrained(folder), folder)
