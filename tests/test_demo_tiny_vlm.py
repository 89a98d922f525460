import pytest
from tiny_vlm import TinyVLMConfig, make_tiny_vlm
from transformers import AutoModelForImageTextToText, AutoProcessor

from lerobot_vla0.chat import number_tokens


def test_is_a_qwen2_5_vl_that_transformers_loads(tiny_vlm):
    model = AutoModelForImageTextToText.from_pretrained(tiny_vlm)
    tokenizer = AutoProcessor.from_pretrained(tiny_vlm).tokenizer
    assert model.config.model_type == "qwen2_5_vl" and model.num_parameters() < 1e6
    assert all(len(tokenizer.encode(token)) == 1 for token in ("<|im_end|>", "<|image_pad|>"))
    text = "pick up the ketchup: 1000 7 é <|im_end|>\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text


def test_numbers_are_tokenised_as_by_qwen(tiny_vlm, qwen_processor):
    ours = AutoProcessor.from_pretrained(tiny_vlm).tokenizer
    assert number_tokens(ours) == number_tokens(qwen_processor.tokenizer)


def test_sizes(tmp_path):
    sizes = {"hidden_size": 96, "num_heads": 2, "num_layers": 1, "vision_layers": 1}
    one, two = (make_tiny_vlm(TinyVLMConfig(out=tmp_path / name, **sizes)) for name in "ab")
    assert (one / "model.safetensors").read_bytes() == (two / "model.safetensors").read_bytes()
    model = AutoModelForImageTextToText.from_pretrained(one)
    assert model.config.text_config.hidden_size == 96 and model.lm_head.weight.shape == (640, 96)
    with pytest.raises(ValueError, match="hidden_size=100 must be num_heads"):
        make_tiny_vlm(TinyVLMConfig(out=tmp_path / "c", hidden_size=100))
