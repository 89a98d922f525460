import pytest
import torch

from lerobot_vla0 import vlm
from lerobot_vla0.chat import IGNORE, ChatFormatter, number_tokens


@pytest.fixture(scope="module")
def tiny_processor(tiny_vlm):
    from transformers import AutoProcessor

    return AutoProcessor.from_pretrained(tiny_vlm)


def make_chat(processor, **overrides) -> ChatFormatter:
    settings = {
        "horizon": 8,
        "dim": 7,
        "num_bins": 1000,
        "num_pictures": 1,
        "picture_size": (224, 448),
        "add_vision_id": True,
    } | overrides
    mark, text = vlm.family(processor).picture_text(processor, *settings["picture_size"])
    return ChatFormatter(processor, picture_mark=mark, picture_text=text, **settings)


def golden_bins(golden) -> torch.Tensor:
    return torch.tensor([int(v) for v in golden["action_text"].split()]).view(1, 8, 7)


def test_golden_sample(qwen_processor, golden):
    """Token ids and labels of the published sample, with the real tokenizer."""
    batch = make_chat(qwen_processor).training_batch([golden["instruction"]], golden_bins(golden))
    ids, labels = batch["input_ids"][0].tolist(), batch["labels"][0].tolist()
    assert ids == golden["input_ids"]
    masked = golden["num_masked_labels"]
    assert labels == [IGNORE] * masked + golden["input_ids"][masked:]
    assert sum(i == qwen_processor.image_token_id for i in ids) == golden["num_image_tokens"]
    assert qwen_processor.tokenizer.decode(ids[-209:]) == golden["action_text"] + "<|im_end|>\n"


def test_golden_prompt_for_acting(qwen_processor, golden):
    batch = make_chat(qwen_processor).inference_batch([golden["instruction"]])
    assert batch["input_ids"][0].tolist() == golden["input_ids"][: golden["num_masked_labels"]]


def test_tiny_tokenizer_writes_the_same_chat(tiny_processor, golden):
    """The template and the number tokens of the tiny VLM are Qwen's, so decoding its ids gives the golden
    text."""
    chat = make_chat(tiny_processor)
    batch = chat.training_batch([golden["instruction"]], golden_bins(golden))
    text = tiny_processor.tokenizer.decode(batch["input_ids"][0])
    expected = golden["text"].rstrip("\n") + "\n"
    assert text.replace("<|image_pad|>" * 128, "<|image_pad|>") == expected
    assert chat.digit_ids == list(range(15, 25)) and chat.space_id == 220


def test_vision_id_and_several_pictures(qwen_processor):
    two = make_chat(qwen_processor, num_pictures=2, picture_size=(224, 224))
    text = qwen_processor.tokenizer.decode(two.prompt_ids("open the drawer"))
    assert "Picture 1: <|vision_start|>" in text and "Picture 2: <|vision_start|>" in text
    assert text.count("<|image_pad|>") == 2 * 64
    plain = make_chat(qwen_processor, add_vision_id=False)
    assert "Picture" not in qwen_processor.tokenizer.decode(plain.prompt_ids("open the drawer"))


def test_prompt_is_the_processors_own(qwen_processor):
    """Image tokens are counted once; every prompt must still be what the VLM's processor makes of it."""
    chat = make_chat(qwen_processor, num_pictures=2, picture_size=(56, 84))
    images = [torch.zeros(3, 56, 84, dtype=torch.uint8)] * 2
    for instruction in ("open the drawer", "stop\nState: 0 1000 7"):
        text = chat._render(chat.messages(instruction), True)
        own = qwen_processor(text=[text], images=images, images_kwargs={"do_resize": False})
        assert chat.prompt_ids(instruction) == list(own["input_ids"][0])


def test_place_values(tiny_processor):
    chat = make_chat(tiny_processor, horizon=1, dim=3, picture_size=(56, 56))
    batch = chat.training_batch(["go"], torch.tensor([[[407, 0, 1000]]]))
    places = batch["places"][0][batch["labels"][0] != IGNORE].tolist()
    assert places == [100, 10, 1, 0, 1, 0, 1000, 100, 10, 1, *([0] * len(chat.tail_ids))]


def test_masked_action_augmentation(tiny_processor):
    """0..40 % of the characters become "?" and leave the loss; 10 % of the examples stay; the end is never
    hidden."""
    chat = make_chat(tiny_processor, picture_size=(56, 56))
    bins = torch.full((1, 8, 7), 123)
    clean = chat.training_batch(["go"], bins)
    answer = clean["labels"][0] != IGNORE
    answer[-len(chat.tail_ids) :] = False
    generator, shares = torch.Generator().manual_seed(0), []
    for _ in range(400):
        batch = chat.training_batch(["go"], bins, mask_prob=0.4, mask_skip_prob=0.1, generator=generator)
        hidden = batch["input_ids"][0] == chat.mask_id
        assert torch.equal(hidden, (batch["labels"][0] == IGNORE) & answer)
        assert torch.equal(batch["input_ids"][0][~hidden], clean["input_ids"][0][~hidden])
        shares.append(hidden.sum().item() / answer.sum().item())
    untouched = sum(s == 0 for s in shares) / len(shares)
    assert 0.06 < untouched < 0.16  # 10 % skipped, and the shares below one character
    assert max(shares) <= 0.4 and 0.15 < sum(shares) / len(shares) < 0.21  # 0.9 · E[U(0, 0.4)] = 0.18


def test_padded_timesteps_leave_the_loss(tiny_processor):
    chat = make_chat(tiny_processor, horizon=3, dim=2, picture_size=(56, 56))
    bins = torch.tensor([[[10, 2], [3, 444], [3, 444]]])
    padded = torch.tensor([[False, True, True]])
    batch = chat.training_batch(["go"], bins, padded_steps=padded)
    kept = batch["labels"][0][batch["labels"][0] != IGNORE].tolist()
    assert tiny_processor.tokenizer.decode(kept) == "10 2<|im_end|>\n"
    full = chat.training_batch(["go"], bins)
    assert torch.equal(batch["input_ids"], full["input_ids"])


def test_special_tokens_in_an_instruction(tiny_processor):
    with pytest.raises(ValueError, match="contains the special token"):
        make_chat(tiny_processor).prompt_ids("see <|image_pad|>")


def test_tokenizer_that_merges_digits():
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    raw = Tokenizer(models.BPE())
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    raw.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    raw.train_from_iterator(["1000 1000 407 407 12 12"] * 9, trainer)
    with pytest.raises(ValueError, match="to be one token"):
        number_tokens(PreTrainedTokenizerFast(tokenizer_object=raw))
