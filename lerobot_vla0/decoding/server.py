"""From an observation to a chunk of actions, with the VLM behind an OpenAI-compatible HTTP server
(`--policy.server=http://host:port/v1`) that serves what `lerobot-vla0 export` wrote: vLLM, SGLang,
`transformers serve`. Sends pictures and text, and holds no weights.

The server is not trusted: attempts end after TIMEOUT_S, answers have a largest size and are checked, and no
redirect is followed, so that pictures and key go nowhere else (`huggingface_hub.InferenceClient` follows
them).
"""

import asyncio
import base64
import json
import logging
import os
import threading
import time
from functools import cache
from typing import Any

import httpx
import torch
from torch import Tensor
from torchvision.io import encode_png

from ..configuration_vla0 import VLA0Config
from ..dataset import to_data_set_bins
from ..examples import ExampleMaker, Observation
from .decoder import Plan
from .rtc import Committed

TIMEOUT_S = 30.0  # for one attempt at a request
ATTEMPTS = 3
RETRY_S = 1.0  # between two attempts
STARTUP_S = 600.0  # how long a server that refuses connections may be starting; vLLM needs minutes
MAX_ANSWER = 2**20  # bytes; the longest chunk has about 60,000 characters
API_KEY = "VLA0_SERVER_API_KEY"  # environment variable with the server's key, if it has one
BUSY = (408, 409, 429)  # status codes after which another attempt may succeed, as are all from 500
# Switch off what a served generation_config.json may ask for besides the temperature.
NEUTRAL = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}


class ServerDecoder:
    """Asks a server for chunks of actions, one request per row, all rows at once; `decode` is that of
    `Decoder`.

    The grammar is sent along as a regular expression, in the fields of vLLM (`structured_outputs`, from 0.12)
    and SGLang (`regex`), and so is NEUTRAL; a server that refuses such fields is asked without them.
    """

    def __init__(self, config: VLA0Config, examples: ExampleMaker) -> None:
        self.config, self.examples, self.url = config, examples, config.server.rstrip("/")
        self.model = config.server_model  # None: the server's only one
        self.takes_grammar = True  # and NEUTRAL, until it refuses them
        self.is_starting = False  # and a warning has said so
        key = os.environ.get(API_KEY, "")
        if not (key.isascii() and key.isprintable()):  # httpx's error would show it
            raise ValueError(f"{API_KEY} has line breaks or other characters that no key has: set it again.")
        authorization = {"Authorization": f"Bearer {key}"} if key else {}
        self.client = httpx.AsyncClient(headers={"Accept-Encoding": "identity"} | authorization, timeout=None)

    def decode(
        self, observation: Observation, steps: int, plans: list[Plan], committed: Committed | None = None
    ) -> Tensor:
        """The first `steps` timesteps of a chunk as bins, float32 (R, steps, D). The server is asked for the
        whole chunk, which begins with the committed integers.

        Raises:
            ConnectionError: no answer after several attempts, or the server refuses the request.
            ValueError: an answer is no chunk of actions.
        """
        chat, instructions = self.examples.chat, self.examples.instructions(observation)
        for instruction in instructions:
            chat.prompt_ids(instruction)  # raises if it is empty or has special tokens
        pictures = self.examples.pictures(observation, None).cpu()
        prefixes = committed.prefixes(chat.grammar.count) if committed else [[] for _ in instructions]
        rows = list(zip(instructions, pictures, prefixes, strict=True))
        chunks = asyncio.run_coroutine_threadsafe(self._chunks(rows), _event_loop())
        try:
            bins = torch.stack(chunks.result()).to(observation.cameras[0].device, torch.float32)
        finally:
            chunks.cancel()  # an interrupt (Ctrl-C) breaks the requests off
        return to_data_set_bins(bins[:, :steps], observation.task_range, self.config.num_bins)

    async def _chunks(self, rows: list[tuple[str, Tensor, list[int]]]) -> list[Tensor]:
        if self.model is None:
            names = [model["id"] for model in json.loads(await self._send("/models"))["data"]]
            if len(names) != 1:
                raise ValueError(
                    f"server={self.url} names the models {names}, not one: set --policy.server_model=<name>."
                )
            self.model = names[0]
        return await asyncio.gather(*(self._chunk(*row) for row in rows))

    async def _chunk(self, instruction: str, pictures: Tensor, prefix: list[int]) -> Tensor:
        """One row: pictures uint8 (N, 3, H, W) → int64 bins (chunk_size, D), which begin with `prefix`."""
        system, user = self.examples.chat.messages(instruction)
        images = iter([await asyncio.to_thread(_image_part, picture) for picture in pictures])
        grammar = self.examples.chat.grammar
        request = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": system["content"][0]["text"]},
                {
                    "role": "user",
                    "content": [
                        next(images) if part["type"] == "image" else part for part in user["content"]
                    ],
                },
            ],
            "temperature": self.config.temperature,
            "max_tokens": grammar.max_tokens,
        }
        regex = grammar.regex(prefix)
        optional = {"structured_outputs": {"regex": regex}, "regex": regex, **NEUTRAL}
        body = await self._send("/chat/completions", request, optional)
        try:
            text = str(json.loads(body)["choices"][0]["message"]["content"])
            bins = self.examples.codec.from_text(text, (self.config.chunk_size, self.examples.action_dim))
            if bins.flatten()[: len(prefix)].tolist() != prefix:
                raise ValueError("it does not begin with the actions that the robot is executing")
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise ValueError(
                f"server={self.url}: {body[:200]!r} is no chunk of actions ({error}). Does {self.model!r} "
                "serve the export of this checkpoint (lerobot-vla0 export), with structured output?"
            ) from error
        return bins

    async def _send(self, path: str, request: dict | None = None, optional: dict | None = None) -> bytes:
        """The body of the answer to a request, with the optional fields if the server takes them."""
        fields = optional if optional and self.takes_grammar else {}
        status, body = await self._retry(path, request | fields if fields else request)
        if fields and status in (400, 422):
            status, body = await self._retry(path, request)
            if status < 300 and self.takes_grammar:
                self.takes_grammar = False
                logging.warning(
                    f"server={self.url} takes no structured output: what it writes is checked, but not "
                    f"constrained. It also refuses {', '.join(NEUTRAL)}: its own settings count."
                )
        if not 200 <= status < 300:
            raise ConnectionError(
                f"server={self.url} refused the request with status {status}: {body[:200]!r}. Does the URL "
                f"end in /v1, is --policy.server_model={self.model} the server's name for the model, and is "
                f"its key in the environment variable {API_KEY}? Redirects are not followed."
            )
        return body

    async def _retry(self, path: str, request: dict | None) -> tuple[int, bytes]:
        """Status and body of the answer, which may be a refusal; repeats a request that is not answered."""
        began, attempts = time.monotonic(), 0
        while attempts < ATTEMPTS:
            attempts += 1
            try:
                async with asyncio.timeout(TIMEOUT_S):
                    status, body = await self._ask(path, request)
                self.is_starting = False
                if status not in BUSY and status < 500:
                    return status, body
                problem = f"status {status}: {body[:200]!r}"
            except (TimeoutError, httpx.TransportError) as error:
                problem = repr(error)
                if isinstance(error, httpx.ConnectError) and time.monotonic() - began < STARTUP_S:
                    attempts = 0
                    if not self.is_starting:
                        self.is_starting = True
                        logging.warning(f"server={self.url} refuses connections. Is it starting? ({error})")
            await asyncio.sleep(RETRY_S)
        raise ConnectionError(
            f"server={self.url}{path} gave no answer in {ATTEMPTS} attempts of at most {TIMEOUT_S:g} s "
            f"({problem}). Is it running, and is the URL right (it usually ends in /v1)?"
        )

    async def _ask(self, path: str, request: dict | None) -> tuple[int, bytes]:
        method, body = "POST" if request else "GET", bytearray()
        async with self.client.stream(method, self.url + path, json=request) as response:
            async for part in response.aiter_raw():  # a compressed answer stays small, and is no JSON
                body += part
                if len(body) > MAX_ANSWER:
                    raise ValueError(f"server={self.url}: its answer is larger than {MAX_ANSWER} bytes.")
        return response.status_code, bytes(body)


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Runs in a thread for all decoders: a request in it can be broken off, and the caller may have a running
    loop of its own (a notebook)."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_event_loop.cache_clear)  # threads end in a fork


def _image_part(picture: Tensor) -> dict[str, Any]:
    """uint8 (3, H, W) → PNG, which is lossless, as a part of a message."""
    png = base64.b64encode(encode_png(picture.contiguous()).numpy().tobytes()).decode()
    return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{png}"}}
