import pytest
from transformers import AutoModelForImageTextToText, AutoProcessor

from lerobot_vla0.demo.tiny_vlm import SPECIAL_TOKENS, TinyVLMConfig, make_tiny_vlm
from lerobot_vla0.prompt import number_tokens


def test_is_a_qwen2_5_vl_that_transformers_loads(tiny_vlm):
    model, processor = (
        AutoModelForImageTextToText.from_pretrained(tiny_vlm),
        AutoProcessor.from_pretrained(tiny_vlm),
    )
    assert model.config.model_type == "qwen2_5_vl" and model.num_parameters() < 1e6
    assert all(len(processor.tokenizer.encode(t)) == 1 for t in SPECIAL_TOKENS)
    text = "pick up the ketchup: 1000 7 é <|im_end|>\n"
    assert processor.tokenizer.decode(processor.tokenizer.encode(text)) == text


def test_numbers_are_tokenised_as_by_qwen(tiny_vlm, qwen_processor):
    assert number_tokens(AutoProcessor.from_pretrained(tiny_vlm).tokenizer) == number_tokens(
        qwen_processor.tokenizer
    )


def test_sizes_and_seed(tmp_path):
    sizes = {"hidden_size": 96, "num_heads": 2, "num_layers": 1, "vision_layers": 1, "vocab_size": 600}
    folders = [tmp_path / n for n in "abc"]
    for folder, seed in zip(folders, (1, 1, 2), strict=True):
        make_tiny_vlm(TinyVLMConfig(out=folder, seed=seed, **sizes))
    a, b, c = (AutoModelForImageTextToText.from_pretrained(f) for f in folders)
    assert a.config.text_config.hidden_size == 96 and a.lm_head.weight.shape == (600, 96)
    assert a.lm_head.weight.equal(b.lm_head.weight) and not a.lm_head.weight.equal(c.lm_head.weight)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"hidden_size": 100}, "hidden_size=100 must be num_heads"),
        ({"vocab_size": 10}, "vocab_size=10 must be at least"),
    ],
)
def test_sizes_that_do_not_fit(tmp_path, overrides, message):
    with pytest.raises(ValueError, match=message):
        make_tiny_vlm(TinyVLMConfig(out=tmp_path / "vlm", **overrides))


def test_never_overwrites(tiny_vlm):
    with pytest.raises(FileExistsError, match="exists and is not empty"):
        make_tiny_vlm(TinyVLMConfig(out=tiny_vlm))
