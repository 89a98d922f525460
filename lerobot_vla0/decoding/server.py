"""From an observation to timesteps of actions, with the VLM behind an OpenAI-compatible HTTP server
(`--policy.server=http://host:port/v1`) that has what `lerobot-vla0 export` wrote: vLLM, SGLang,
`transformers serve`. Sends pictures and text, and holds no weights.

Why httpx and a loop: huggingface_hub depends on httpx anyway, while the `openai` client would be a dependency
more, and translating its exceptions would take more lines than its retries save.
"""

import base64
import logging
import os
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import torch
from torch import Tensor
from torchvision.io import encode_png

from ..configuration_vla0 import VLA0Config
from ..examples import ExampleMaker, Observation
from ..task_stats import to_data_set_bins
from .chunk_decoder import EpisodeState

ATTEMPTS = 3  # at a request, until it is answered
BACKOFF_S = 0.5  # before the second attempt; doubled before each further one
MAX_CONNECTIONS = 32
API_KEY = "VLA0_SERVER_API_KEY"  # environment variable with the server's key, if it wants one
BUSY = (408, 409, 429)  # status codes after which another attempt may succeed, as are all from 500


class ServerDecoder:
    """Asks a server for chunks of actions, one request per row, all rows at once.

    Greedy or sampled as `config.temperature` says. The grammar is sent along as a regular expression, in the
    fields of vLLM (`structured_outputs`, from 0.12) and SGLang (`regex`); a server that refuses such fields
    is asked without them. In either case the answer is checked. Same methods as `ChunkDecoder`.

    Args:
        config: with `server`, `server_timeout`, `server_model`.
        examples: of the same config.
    """

    def __init__(self, config: VLA0Config, examples: ExampleMaker) -> None:
        self.config, self.examples, self.url = config, examples, config.server.rstrip("/")
        self.shape = (config.chunk_size, examples.action_dim)
        regex = examples.chat.grammar.regex
        self.structured = {"structured_outputs": {"regex": regex}, "regex": regex}
        key = os.environ.get(API_KEY)
        self.client = httpx.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=config.server_timeout,
            limits=httpx.Limits(max_connections=MAX_CONNECTIONS),
        )
        self.model = config.server_model

    def require_weights(self) -> None:
        """Raises ValueError: a policy without weights can be neither trained nor saved."""
        raise ValueError(
            f"server={self.config.server!r}: the weights are on the server, so that this policy can act but "
            "not train or be saved. Leave server out."
        )

    def release(self) -> None:
        """Nothing to drop: the weights are on the server."""

    def new_episodes(self, rows: int) -> list[EpisodeState]:
        """States of `rows` environments that act together."""
        return [EpisodeState.begin(self.config, drafter=None) for _ in range(rows)]

    def decode_chunk(
        self, observation: Observation, steps: int, episodes: list[EpisodeState]
    ) -> Iterator[Tensor]:
        """Yields the first `steps` timesteps, bins (R, D) as float32, on the observation's device.

        The server is asked for whole chunks when the first timestep is.

        Raises:
            ConnectionError: no answer after several attempts, or the server refuses the request.
            ValueError: an answer is no chunk of actions.
        """
        if self.model is None:
            self.model = self._only_model()
        instructions = self.examples.instructions(observation)
        for instruction in instructions:
            self.examples.chat.prompt_ids(instruction)  # raises if it is empty or has special tokens
        pictures = self.examples.pictures(observation, None).cpu()
        with ThreadPoolExecutor(min(len(instructions), MAX_CONNECTIONS)) as pool:
            chunks = torch.stack(list(pool.map(self._chunk, instructions, pictures)))
        chunks = chunks.to(observation.cameras[0].device, torch.float32)  # (R, chunk_size, D)
        for step in range(steps):
            yield to_data_set_bins(chunks[:, step], observation.task_range, self.config.num_bins)

    def _chunk(self, instruction: str, pictures: Tensor) -> Tensor:
        """One row: pictures uint8 (N, 3, H, W) → int64 bins (chunk_size, D)."""
        chat = self.examples.chat
        system, user = chat.messages(instruction)
        images = iter(
            [{"type": "image_url", "image_url": {"url": _data_url(picture)}} for picture in pictures]
        )
        content = [next(images) if part["type"] == "image" else part for part in user["content"]]
        request = {
            "model": self.model,
            "messages": [
                {"role": "system", "content": system["content"][0]["text"]},
                {"role": "user", "content": content},
            ],
            "temperature": self.config.temperature,
            "max_tokens": chat.grammar.max_tokens,
        }
        structured = self.structured
        response = self._send("POST", "/chat/completions", request | structured)
        if structured and response.status_code in (400, 422):
            response = self._send("POST", "/chat/completions", request)
            if response.is_success and self.structured:
                self.structured = {}
                logging.warning(
                    f"{self.url} takes no structured output: what it writes is checked, but not constrained."
                )
        answer = self._json(response)
        try:
            text = answer["choices"][0]["message"]["content"]
            return self.examples.codec.from_text(text, self.shape)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"server={self.url}: no chat completion, but {str(answer)[:200]!r}.") from error
        except ValueError as error:
            raise ValueError(
                f"server={self.url}: the model {self.model!r} wrote no actions: {error}. Does it serve the "
                "export of this checkpoint (lerobot-vla0 export)?"
            ) from error

    def _only_model(self) -> str:
        answer = self._json(self._send("GET", "/models"))
        models = answer.get("data") if isinstance(answer, dict) else None
        names = [m["id"] for m in models or [] if isinstance(m, dict) and "id" in m]
        if len(names) != 1:
            raise ValueError(
                f"server={self.url} names the models {names}, not one. Choose: --policy.server_model=<name>"
            )
        return names[0]

    def _send(self, method: str, path: str, request: dict[str, Any] | None = None) -> httpx.Response:
        """The server's answer, which may be a refusal; repeats a request that is not answered."""
        for attempt in range(ATTEMPTS):
            if attempt:
                time.sleep(BACKOFF_S * 2 ** (attempt - 1))
            try:
                response = self.client.request(method, self.url + path, json=request)
            except httpx.TransportError as error:  # connection refused or broken off, timeout
                problem = f"{type(error).__name__}: {error}"
                continue
            if response.status_code not in BUSY and response.status_code < 500:
                return response
            problem = f"status {response.status_code}: {response.text[:200]}"
        raise ConnectionError(
            f"server={self.url}{path} gave no answer in {ATTEMPTS} attempts of at most "
            f"{self.config.server_timeout:g} s ({problem}). Is it running, and is the URL right (it usually "
            "ends in /v1)? For a slow server raise --policy.server_timeout."
        )

    def _json(self, response: httpx.Response) -> Any:
        if not response.is_success:
            raise ConnectionError(
                f"server={self.url} refused the request with status {response.status_code}: "
                f"{response.text[:300]}"
                + (f" (its key: environment variable {API_KEY})" if response.status_code == 401 else "")
            )
        try:
            return response.json()
        except ValueError as error:
            raise ValueError(f"server={self.url} answered no JSON: {response.text[:200]!r}.") from error


def _data_url(picture: Tensor) -> str:
    """uint8 (3, H, W) → PNG, which is lossless."""
    png = encode_png(picture.contiguous()).numpy().tobytes()
    return "data:image/png;base64," + base64.b64encode(png).decode()
