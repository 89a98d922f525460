import pytest
import torch

from lerobot_vla0 import backbone
from lerobot_vla0.decoding.kv_cache import KVCache
from lerobot_vla0.decoding.session import DecodingSession, acting_model, encode_prefix


@pytest.fixture(scope="module")
def vlm(tiny_vlm):
    return backbone.load_vlm(tiny_vlm, revision=None, dtype="float32", attn_implementation=None)


def prompts(processor, texts: list[str], seed: int = 0) -> dict[str, torch.Tensor]:
    """Right-padded prompts of different lengths, with the same first words and one picture each."""
    processor.tokenizer.padding_side = "right"
    picture = "look " + "<|vision_start|><|image_pad|><|vision_end|>"
    generator = torch.Generator().manual_seed(seed)
    pictures = torch.randint(0, 256, (len(texts), 1, 3, 56, 112), generator=generator).byte()
    tokens = processor(
        text=[picture + t for t in texts],
        images=list(pictures[:, 0]),
        images_kwargs={"do_resize": False},
        padding=True,
        return_tensors="pt",
    )
    inputs = {key: tokens[key] for key in ("input_ids", "attention_mask")}
    return inputs | backbone.family(processor).vision_inputs(processor, pictures, inputs["input_ids"])


@pytest.mark.parametrize(
    ("skip", "compiled"), [(0, False), (2, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_equals_a_full_pass(vlm, skip, compiled):
    """Prompts of different lengths, drafts of different lengths behind them, of which different numbers hold:
    logits are those of Transformers' own forward on each whole sequence alone. So positions (multimodal RoPE
    included), masks and caches are right, and rejected drafts leave nothing behind."""
    model, processor = vlm
    ids = list(range(15, 25))
    inputs = prompts(processor, ["go", "put the bowl on the plate"])
    assert inputs["attention_mask"].sum(1).unique().numel() == 2

    def alone(row: int, answer: list[int], places: int) -> torch.Tensor:
        real = inputs["attention_mask"][row].bool()
        tokens = torch.cat([inputs["input_ids"][row][real], torch.tensor(answer, dtype=torch.int64)])[None]
        patches = inputs["pixel_values"].view(2, -1, inputs["pixel_values"].shape[-1])[row]
        output = model(
            input_ids=tokens,
            attention_mask=torch.ones_like(tokens),
            pixel_values=patches,
            image_grid_thw=inputs["image_grid_thw"][row : row + 1],
            mm_token_type_ids=(tokens == processor.image_token_id).int(),
        )
        return output.logits[0, -places:, ids]

    with torch.no_grad():
        acting = acting_model(model)
        prefix = encode_prefix(acting, inputs["input_ids"][:1, :skip]) if skip else None
        cache = DecodingSession(acting, inputs, ids, room=32, prefix=prefix, compiled=compiled)
        steps = [
            cache.start([[15, 16, 220], []]),
            cache.extend([1, 0], [[17, 18], [19, 20, 21]]),
            cache.extend([2, 1], [[22], [23, 24]]),
            cache.extend([1, 2], [[15], []]),
        ]
        expected = [
            [alone(0, [15, 16, 220], 4), alone(1, [], 1)],
            [alone(0, [15, 17, 18], 2), alone(1, [19, 20, 21], 3)],
            [alone(0, [15, 17, 18, 22], 1), alone(1, [19, 23, 24], 2)],
            [alone(0, [15, 17, 18, 22, 15], 1)],
        ]
        for got, rows in zip(steps, expected, strict=True):
            for row, logits in enumerate(rows):
                assert torch.allclose(torch.from_numpy(got[row, : len(logits)]), logits, atol=1e-5)


def test_buffers_are_used_again(vlm):
    """What an earlier chunk left in them changes nothing, and two chunks cannot use them at once."""
    model, processor = acting_model(vlm[0]), vlm[1]
    ids, buffers = list(range(15, 25)), KVCache()
    answers = []
    for seed in (0, 1, 0):
        inputs = prompts(processor, ["go"], seed)
        with torch.no_grad():
            cache = DecodingSession(model, inputs, ids, room=32, buffers=buffers)
            answers.append((cache.start([[15, 16]]), cache.extend([1], [[17, 18]])))
        keys = buffers.layers[0][0]
        with torch.inference_mode():
            for buffer in sum(buffers.layers, ()):
                buffer.fill_(float("nan"))  # of a chunk with a broken picture
    assert all((first == third).all() for first, third in zip(answers[0], answers[2], strict=True))
    assert not (answers[0][0] == answers[1][0]).all()
    earlier = cache
    with torch.no_grad():
        DecodingSession(model, inputs, ids, room=32, buffers=buffers)
    assert buffers.layers[0][0] is keys
    with pytest.raises(RuntimeError, match="another chunk was begun.*compile_model=False"):
        earlier.extend([0], [[15]])
