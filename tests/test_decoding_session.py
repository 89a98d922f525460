import pytest
import torch

from lerobot_vla0 import vlm
from lerobot_vla0.decoding.kv_cache import KVCache
from lerobot_vla0.decoding.session import DecodingSession, acting_model, encode_prefix
from lerobot_vla0.families import family


@pytest.fixture(scope="module")
def model_and_processor(tiny_vlm):
    return vlm.load_vlm(tiny_vlm, revision=None, dtype="float32", attn_implementation=None)


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
    return inputs | family(processor).vision_inputs(processor, pictures, inputs["input_ids"])


@pytest.mark.parametrize(
    ("skip", "compiled"), [(0, False), (2, False), pytest.param(2, True, marks=pytest.mark.slow)]
)
def test_equals_a_full_pass(model_and_processor, skip, compiled):
    """Prompts of different lengths, drafts of different lengths behind them, of which different numbers are
    accepted: logits are those of Transformers' own forward on each whole sequence alone. So positions
    (multimodal RoPE included), masks and caches are right, and rejected drafts leave nothing behind."""
    model, processor = model_and_processor
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
        session = DecodingSession(acting, inputs, ids, room=32, prefix=prefix, compiled=compiled)
        steps = [
            session.start([[15, 16, 220], []]),
            session.extend([1, 0], [[17, 18], [19, 20, 21]]),
            session.extend([2, 1], [[22], [23, 24]]),
            session.extend([1, 2], [[15], []]),
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


def test_a_cache_is_used_again(model_and_processor):
    """Nothing of an earlier chunk in it has an effect."""
    model, processor = acting_model(model_and_processor[0]), model_and_processor[1]
    ids, cache, answers = list(range(15, 25)), KVCache(), []
    for seed in (0, 1, 0):
        inputs = prompts(processor, ["go"], seed)
        with torch.inference_mode():
            session = DecodingSession(model, inputs, ids, room=32, cache=cache)
            answers.append((session.start([[15, 16]]), session.extend([1], [[17, 18]])))
            for buffer in sum(cache.layers, ()):
                buffer.fill_(float("nan"))  # of a chunk with a broken picture
    assert all((first == third).all() for first, third in zip(answers[0], answers[2], strict=True))
    assert not (answers[0][0] == answers[1][0]).all()
