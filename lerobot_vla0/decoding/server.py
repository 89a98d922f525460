"""From an observation to timesteps of actions, with the VLM behind an OpenAI-compatible HTTP server
(`--policy.server=http://host:port/v1`) that has what `lerobot-vla0 export` wrote: vLLM, SGLang,
`transformers serve`. Sends pictures and text, and holds no weights.

The server is not trusted: a request has one deadline and an answer a largest size, no redirect is followed,
and what is no chunk of actions is an error.

Why httpx and a loop: huggingface_hub depends on httpx anyway, while the `openai` client would be a dependency
more, and translating its exceptions would take more lines than its retries save.
"""

import asyncio
import base64
import json
import logging
import os
import threading
import time
from collections.abc import Iterator
from functools import cache
from typing import Any, NamedTuple

import httpx
import torch
from torch import Tensor
from torchvision.io import encode_png

from ..configuration_vla0 import VLA0Config
from ..examples import ExampleMaker, Observation
from ..task_stats import to_data_set_bins
from .chunk_decoder import EpisodeState
from .rtc import LeftOver

ATTEMPTS = 3  # at a request, until it is answered
BACKOFF_S = 0.5  # before the second attempt; doubled before each further one
STARTUP_S = 600.0  # for which a server that refuses connections is taken to be starting; vLLM needs minutes
STARTUP_RETRY_S = 1.0
MAX_CONNECTIONS = 32
MAX_ANSWER = 2**20  # bytes of an answer; the longest chunk has about 60,000 characters
API_KEY = "VLA0_SERVER_API_KEY"  # environment variable with the server's key, if it wants one
BUSY = (408, 409, 429)  # status codes after which another attempt may succeed, as are all from 500
# Switch off what a served generation_config.json may ask for beside the temperature.
NEUTRAL = {"repetition_penalty": 1.0, "top_p": 1.0, "top_k": -1, "min_p": 0.0}


class Answer(NamedTuple):
    status: int
    body: bytes

    @property
    def shown(self) -> str:
        """Its beginning, for messages, without control characters."""
        return repr(self.body[:200].decode(errors="replace"))


class ServerDecoder:
    """Asks a server for chunks of actions, one request per row, all rows at once.

    Greedy or sampled as `config.temperature` says. The grammar is sent along as a regular expression, in the
    fields of vLLM (`structured_outputs`, from 0.12) and SGLang (`regex`), and so is NEUTRAL; a server that
    refuses such fields is asked without them. In either case the answer is checked. Same methods as
    `ChunkDecoder`.

    Args:
        config: with `server`, `server_timeout`, `server_model`.
        examples: of the same config.

    Raises:
        ValueError: `server` is no URL, or the key has characters that no key has.
    """

    def __init__(self, config: VLA0Config, examples: ExampleMaker) -> None:
        self.config, self.examples, self.url = config, examples, _base_url(config.server)
        self.shape = torch.Size((config.chunk_size, examples.action_dim))
        self.takes_optional = True  # fields, see the class; until it refuses them
        key = os.environ.get(API_KEY, "")
        if not (key.isascii() and key.isprintable()):
            raise ValueError(f"{API_KEY} has line breaks or other characters that no key has: set it again.")
        self.client = httpx.AsyncClient(
            # Compressed, a small answer may fill the memory.
            headers={"Accept-Encoding": "identity", **({"Authorization": f"Bearer {key}"} if key else {})},
            timeout=None,  # `_send` has one for all of a request
            limits=httpx.Limits(max_keepalive_connections=MAX_CONNECTIONS),
        )
        self.model, self.waiting = config.server_model, False

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
        self,
        observation: Observation,
        steps: int,
        episodes: list[EpisodeState],
        left_over: LeftOver | None = None,
    ) -> Iterator[Tensor]:
        """Yields the first `steps` timesteps, bins (R, D) as float32, on the observation's device.

        The server is asked for whole chunks when the first timestep is. An interrupt ends this at once. What
        `left_over` has committed is the beginning of the grammar that is sent along.

        Raises:
            ConnectionError: no answer after several attempts, or the server refuses the request.
            ValueError: an answer is no chunk of actions.
        """
        instructions = self.examples.instructions(observation)
        for instruction in instructions:
            self.examples.chat.prompt_ids(instruction)  # raises if it is empty or has special tokens
        pictures = self.examples.pictures(observation, None).cpu()
        prefixes = [[] for _ in instructions] if left_over is None else left_over.prefixes(self.shape.numel())
        asked = asyncio.run_coroutine_threadsafe(
            self._chunks(instructions, pictures, prefixes), _event_loop()
        )
        try:
            chunks = torch.stack(asked.result())
        finally:
            asked.cancel()
        chunks = chunks.to(observation.cameras[0].device, torch.float32)  # (R, chunk_size, D)
        for step in range(steps):
            yield to_data_set_bins(chunks[:, step], observation.task_range, self.config.num_bins)

    async def _chunks(
        self, instructions: list[str], pictures: Tensor, prefixes: list[list[int]]
    ) -> list[Tensor]:
        if self.model is None:
            self.model = await self._only_model()
        free = asyncio.Semaphore(MAX_CONNECTIONS)
        rows = [
            asyncio.create_task(self._chunk(*row, free))
            for row in zip(instructions, pictures, prefixes, strict=True)
        ]
        try:
            return await asyncio.gather(*rows)
        finally:
            for row in rows:
                row.cancel()

    async def _chunk(
        self, instruction: str, pictures: Tensor, prefix: list[int], free: asyncio.Semaphore
    ) -> Tensor:
        """One row: pictures uint8 (N, 3, H, W) → int64 bins (chunk_size, D), which begin with `prefix`."""
        chat = self.examples.chat
        regex = chat.grammar.regex(prefix)
        system, user = chat.messages(instruction)
        urls = [await asyncio.to_thread(_data_url, picture) for picture in pictures]
        images = iter([{"type": "image_url", "image_url": {"url": url}} for url in urls])
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
        async with free:
            optional = {"structured_outputs": {"regex": regex}, "regex": regex, **NEUTRAL}
            optional = optional if self.takes_optional else {}
            answer = await self._send("POST", "/chat/completions", request | optional)
            if optional and answer.status in (400, 422):
                optional = {}
                answer = await self._send("POST", "/chat/completions", request)
                if answer.status < 300 and self.takes_optional:
                    self.takes_optional = False
                    logging.warning(
                        f"server={self.url} takes no structured output: what it writes is checked, but not "
                        f"constrained. It also refuses {', '.join(NEUTRAL)}: its own settings count."
                    )
        read = self._json(answer)
        try:
            text = read["choices"][0]["message"]["content"]
            if not isinstance(text, str):
                raise TypeError("no text")
        except (KeyError, IndexError, TypeError) as error:
            raise ValueError(f"server={self.url}: no chat completion, but {answer.shown}.") from error
        try:
            bins = self.examples.codec.from_text(text, self.shape)
            if bins.flatten()[: len(prefix)].tolist() != prefix:
                raise ValueError("they do not begin with those that the robot is executing")
            return bins
        except ValueError as error:
            raise ValueError(
                f"server={self.url}: the model {self.model!r} wrote no actions: {error}. Does it serve the "
                "export of this checkpoint (lerobot-vla0 export)?"
                + (" It was sent the grammar, and may ignore structured output." if optional else "")
            ) from error

    async def _only_model(self) -> str:
        answer = await self._send("GET", "/models")
        read = self._json(answer)
        models = read.get("data") if isinstance(read, dict) else None
        if not isinstance(models, list):
            raise ValueError(f"server={self.url}: no list of models, but {answer.shown}.")
        names = [m["id"] for m in models if isinstance(m, dict) and isinstance(m.get("id"), str)]
        if len(names) != 1:
            raise ValueError(
                f"server={self.url} names the models {names[:10]}, not one. Choose: "
                "--policy.server_model=<name>"
            )
        return names[0]

    async def _send(self, method: str, path: str, request: dict[str, Any] | None = None) -> Answer:
        """The server's answer, which may be a refusal; repeats a request that is not answered."""
        body = None if request is None else json.dumps(request).encode()
        began, attempt = time.monotonic(), 0
        while True:
            try:
                async with asyncio.timeout(self.config.server_timeout):
                    answer = await self._ask(method, path, body)
                self.waiting = False
                if answer.status not in BUSY and answer.status < 500:
                    return answer
                problem = f"status {answer.status}: {answer.shown}"
            except TimeoutError:
                problem = "TimeoutError: the answer was not complete"
            # Broken off, or no such host; UnicodeError is of names that no host can have.
            except (httpx.TransportError, UnicodeError) as error:
                problem = f"{type(error).__name__}: {error}"
                if _is_refused(error) and time.monotonic() - began < STARTUP_S:
                    if not self.waiting:
                        self.waiting = True
                        logging.warning(
                            f"server={self.url} refuses connections. Is it starting? Trying again for "
                            f"{STARTUP_S:g} s."
                        )
                    await asyncio.sleep(STARTUP_RETRY_S)
                    continue
            attempt += 1
            if attempt == ATTEMPTS:
                break
            await asyncio.sleep(BACKOFF_S * 2 ** (attempt - 1))
        raise ConnectionError(
            f"server={self.url}{path} gave no answer in {ATTEMPTS} attempts of at most "
            f"{self.config.server_timeout:g} s ({problem}). Is it running, and is the URL right (it usually "
            "ends in /v1)? For a slow server raise --policy.server_timeout."
        )

    async def _ask(self, method: str, path: str, body: bytes | None) -> Answer:
        headers = {"Content-Type": "application/json"}
        async with self.client.stream(method, self.url + path, content=body, headers=headers) as response:
            encoding = response.headers.get("Content-Encoding", "identity")
            if encoding != "identity":
                raise ValueError(f"server={self.url} compressed its answer ({encoding!r}), unasked.")
            content = bytearray()
            async for part in response.aiter_raw():
                content += part
                if len(content) > MAX_ANSWER:
                    raise ValueError(
                        f"server={self.url}: its answer is larger than {MAX_ANSWER} bytes, and no chunk of "
                        f"actions is. It begins with {Answer(0, bytes(content[:200])).shown}."
                    )
        if response.has_redirect_location:
            raise ConnectionError(
                f"server={self.url} redirects to {response.headers.get('Location')!r}, where pictures and "
                "key are not sent. If it is the right place, give it as --policy.server."
            )
        return Answer(response.status_code, bytes(content))

    def _json(self, answer: Answer) -> Any:
        if not 200 <= answer.status < 300:
            named = f" Is --policy.server_model={self.model} its name for the model, and does"
            hints = {
                401: f" Its key: environment variable {API_KEY}.",
                404: f"{named if self.model else ' Does'} the URL end in /v1?",
            }
            raise ConnectionError(
                f"server={self.url} refused the request with status {answer.status}: {answer.shown}."
                + hints.get(answer.status, "")
            )
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError) as error:
            raise ValueError(f"server={self.url} answered no JSON, but {answer.shown}.") from error


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    """Runs in a thread for all decoders. Unlike the calls of a pool of threads, a request in it can be broken
    off; and whoever acts may be in any thread, also in one with a loop of its own (a notebook). The process
    does not wait for it when it ends."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="vla0-server", daemon=True).start()
    return loop


os.register_at_fork(after_in_child=_event_loop.cache_clear)  # threads end in a fork


def _base_url(server: str) -> str:
    try:
        url = httpx.URL(server)
        if not url.host or (url.port or 1) >= 2**16 or url.query or url.fragment:
            raise httpx.InvalidURL("it has a host, and may have a port and a path")
    except (httpx.InvalidURL, UnicodeError) as error:
        raise ValueError(
            f"server={server!r} is no URL of a server ({error}). Example: http://localhost:8000/v1"
        ) from error
    return server.rstrip("/")


def _is_refused(error: BaseException | None) -> bool:
    """Whether nobody listens at the port, as while a server starts."""
    while error is not None:
        if isinstance(error, ConnectionRefusedError):
            return True
        if isinstance(error, ExceptionGroup):  # one of each address of the host
            return any(map(_is_refused, error.exceptions))
        error = error.__cause__ or error.__context__
    return False


def _data_url(picture: Tensor) -> str:
    """uint8 (3, H, W) → PNG, which is lossless."""
    png = encode_png(picture.contiguous()).numpy().tobytes()
    return "data:image/png;base64," + base64.b64encode(png).decode()
