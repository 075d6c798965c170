"""A vLLM server over HTTP: waiting for it, checking it, completions and scores in token ids, and loading weights.

No text goes to the server or comes from it, because a round trip through text can change tokens. Log-probs are at the
sampling temperature (`--logprobs-mode processed_logprobs`). Each request holds all sampling parameters, because the
server would fill gaps from the model's generation config.
"""

import os
import threading
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack

import requests
from tqdm import tqdm

from ..config.modes import StructuredConfig
from ..config.settings import UserError

PARALLEL_REQUESTS = 256
# sampling parameters that leave the distribution as it is
NEUTRAL = {"top_p": 1.0, "top_k": 0, "min_p": 0.0}
NEUTRAL |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
START_IT = "start it with: python serve_vllm.py --cfg FILE (the same file)"


class ForgottenWeights(Exception):
    """The server has lost the weights that it was given: it was restarted, or somebody else has changed them."""


class VLLMServer:
    """The endpoints of the server that training uses.

    A request that may succeed later (no connection, an error inside the server) is repeated with growing pauses for
    vllm.timeout seconds. All other failures raise a UserError, which names the address.
    """

    def __init__(self, config: StructuredConfig):
        self.vllm, self.model_name = config.vllm, config.model.name_or_path
        self.url = config.vllm.url
        self.closed = threading.Event()  # set when the run has ended: requests that still wait in a thread give up
        self.gives_up = lambda: False  # called between two attempts: whether to stop trying
        self.session = requests.Session()
        self.session.trust_env = False  # no proxy for 127.0.0.1, and no other key from ~/.netrc
        self.session.mount("http://", requests.adapters.HTTPAdapter(pool_maxsize=PARALLEL_REQUESTS))
        key = config.vllm.api_key or os.environ.get("VLLM_API_KEY")
        if key:
            self.session.headers["Authorization"] = f"Bearer {key}"

    # --- requests -----------------------------------------------------------------------------------------------------

    def call(self, path: str, body: dict | None = None, *, waiting_line: bool = False) -> dict:
        """The JSON answer to a GET, or with a body to a POST.

        Raises UserError when the server refuses, or does not answer for vllm.timeout seconds.
        """
        started, pause, problem = time.monotonic(), 0.5, ""
        method, timeout = "GET" if body is None else "POST", (10, self.vllm.request_timeout)
        with ExitStack() as stack:
            line = None
            while (waited := time.monotonic() - started) < self.vllm.timeout or not problem:
                try:
                    answer = self.session.request(method, self.url + path, json=body, timeout=timeout)
                    if answer.status_code < 500:
                        return self._content_of(answer, path)
                    problem = f"it answers {path} with {answer.status_code}: {_message_of(answer)}"
                except requests.RequestException as error:  # a ConnectionError, a Timeout, an answer that breaks off
                    problem = f"{path}: {_reason_of(error)}"
                if line is None and waiting_line:
                    text = f"waiting for the vLLM server at {self.url}"
                    bar = tqdm(total=round(self.vllm.timeout), desc=text, unit="s", leave=False)
                    line = stack.enter_context(bar)
                if line is not None:
                    line.n = min(round(waited), line.total)
                    line.refresh()
                if self.gives_up() or self.closed.wait(min(pause, max(0.0, self.vllm.timeout - waited))):
                    break
                pause = min(1.5 * pause, 5.0)
        limit = f"{waited:.0f} s (vllm.timeout: {self.vllm.timeout:g})"
        without = "or train without one: ebft.use_vllm=false"
        raise UserError(f"no answer from the vLLM server at {self.url} for {limit}: {problem}; {START_IT}, {without}")

    def _content_of(self, answer: requests.Response, path: str) -> dict:
        if answer.status_code == 401:
            wrong = f"the vLLM server at {self.url} does not accept it"
            raise UserError(f"vllm.api_key: {wrong} (or the one in VLLM_API_KEY)")
        if answer.status_code != 200:
            text = _message_of(answer)
            if answer.status_code == 404 and "does not exist" in text:
                raise ForgottenWeights(text)
            raise UserError(f"the vLLM server at {self.url} answers {path} with {answer.status_code}: {text}")
        try:
            return answer.json()
        except ValueError:
            return {"text": answer.text}

    # --- what is there ------------------------------------------------------------------------------------------------

    def check(self, config: StructuredConfig) -> str:
        """Waits for the server and compares it with the configuration. Returns what it is, in words.

        Raises UserError, which names what to change, when the server does not fit the configuration.
        """
        self.call("/health", waiting_line=True)
        where = f"the vLLM server at {self.url}"
        models = self.call("/v1/models")["data"]
        names = [model["id"] for model in models if model.get("parent") is None]
        if self.model_name not in names:
            raise UserError(
                f"model.name_or_path: {where} serves {', '.join(map(repr, names))}, and the configuration names "
                f"{self.model_name!r}; {START_IT}"
            )
        try:
            info = self.call("/server_info?config_format=json")["vllm_config"]
        except UserError as error:
            wrong = "it runs without VLLM_SERVER_DEV_MODE=1, or is not vLLM"
            raise UserError(f"{where} has no /server_info: {wrong}; {START_IT} ({error})") from None
        model, lora = info["model_config"], info["lora_config"]
        if model["logprobs_mode"] != "processed_logprobs":
            raise UserError(
                f"{where} runs with --logprobs-mode {model['logprobs_mode']}: its log-probs are not those at the "
                f"sampling temperature; {START_IT}"
            )
        needed, keys = config.longest_sequence
        if model["max_model_len"] < needed:
            takes = f"{where} takes {model['max_model_len']} tokens"
            raise UserError(f"vllm.max_model_len: {takes}, and {keys} need {needed}")
        self._check_lora(config, where, lora, info["parallel_config"])
        self.max_model_len, self.dtype = model["max_model_len"], model["dtype"].removeprefix("torch.")
        version = self.call("/version")["version"]
        limit = f", adapters up to rank {lora['max_lora_rank']}" if lora else ""
        return f"vLLM {version} at {self.url}: {self.model_name} in {self.dtype}, {self.max_model_len} tokens{limit}"

    def _check_lora(self, config: StructuredConfig, where: str, lora: dict | None, parallel: dict) -> None:
        if config.lora is None:
            if lora is not None:
                raise UserError(
                    f"lora: {where} runs with --enable-lora, and the configuration has no lora section: "
                    f"full weights do not get there; {START_IT}"
                )
            return
        if lora is None:
            raise UserError(f"lora: {where} runs without --enable-lora; {START_IT}")
        rank, limit = config.lora.r, lora["max_lora_rank"]
        if limit < rank:
            takes = f"the rank {limit} that {where} takes (--max-lora-rank)"
            raise UserError(f"lora.r: {rank} is above {takes}; {START_IT}")
        if parallel["data_parallel_size"] > 1:
            copies = f"{parallel['data_parallel_size']} copies of the model"
            raise UserError(f"vllm.data_parallel_size: {where} has {copies}, and only one would get the adapter")

    # --- completions and scores ---------------------------------------------------------------------------------------

    def complete(
        self,
        model: str,
        contexts: list[list[int]],
        limits: list[int],
        seeds: list[int],
        n: int,
        temperature: float,
        stop_ids: list[int],
    ):
        """n completions of each context: lists of (tokens, log-probs, truncated).

        A completion that was not truncated ends with a stop token.
        """
        parameters = {"n": n, "temperature": temperature, "stop_token_ids": stop_ids}

        def one(context: list[int], limit: int, seed: int) -> list[tuple[list[int], list[float], bool]]:
            answer = self._sample(model, context, max_tokens=limit, seed=seed, **parameters)
            return [self._completion(choice, len(context)) for choice in answer["choices"]]

        with ThreadPoolExecutor(min(PARALLEL_REQUESTS, len(contexts))) as pool:
            return list(pool.map(one, contexts, limits, seeds))

    def score(
        self, model: str, tokens: list[int], num_sampled: int, temperature: float
    ) -> tuple[list[float], list[int], list[float]]:
        """Log-probs of tokens[1:] at temperature 1, and num_sampled sampled tokens with their log-probs.

        The latter are at the sampling temperature.
        """
        parameters = {"n": 1, "max_tokens": num_sampled, "seed": 0, "temperature": temperature}
        answer = self._sample(model, tokens, **parameters, ignore_eos=True, prompt_logprobs=0)
        (choice,) = answer["choices"]
        entries = zip(tokens[1:], choice["prompt_logprobs"][1:], strict=True)
        given = [entry[str(token)]["logprob"] for token, entry in entries]
        sampled, logprobs, _ = self._completion(choice, len(tokens))
        return given, sampled, logprobs

    def _sample(self, model: str, prompt: list[int], **parameters) -> dict:
        request = {"model": model, "prompt": prompt, "logprobs": 0, "return_token_ids": True, **NEUTRAL, **parameters}
        answer = self.call("/v1/completions", request)
        for choice in answer["choices"]:
            if choice.get("prompt_token_ids") != prompt:
                raise UserError(
                    f"the vLLM server at {self.url} has read another prompt than it was sent ({len(prompt)} tokens): "
                    "it does not take token ids as they are"
                )
        return answer

    def _completion(self, choice: dict, prompt_length: int) -> tuple[list[int], list[float], bool]:
        tokens, logprobs = choice["token_ids"], choice["logprobs"]["token_logprobs"] if choice["logprobs"] else []
        if not tokens or len(tokens) != len(logprobs) or choice["finish_reason"] not in ("stop", "length"):
            completion = f"{len(tokens)} tokens" if tokens else "an empty completion"
            raise UserError(
                f"the vLLM server at {self.url} answers a prompt of {prompt_length} tokens with {completion}, "
                f"{len(logprobs)} log-probs and finish_reason {choice['finish_reason']!r}"
            )
        return tokens, logprobs, choice["finish_reason"] == "length"

    # --- weights ------------------------------------------------------------------------------------------------------

    def load_adapter(self, name: str, folder: str) -> None:
        """Loads a LoRA adapter. Its name must be new, because vLLM's prefix cache is keyed by name and path."""
        try:
            self.call("/v1/load_lora_adapter", {"lora_name": name, "lora_path": folder})
        except UserError as error:
            if "already been loaded" not in str(error):  # the answer to a first attempt may have been lost
                raise

    def unload_adapter(self, name: str) -> None:
        """Unloads an adapter. It is no error when the server has already lost it."""
        try:
            self.call("/v1/unload_lora_adapter", {"lora_name": name})
        except (UserError, ForgottenWeights) as error:
            if "cannot be found" not in str(error) and not isinstance(error, ForgottenWeights):
                raise

    def reload_weights(self, folder: str, version: str) -> None:
        """Replaces all weights by those in a folder, under a version name."""
        self.call("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": folder}})
        self.finish_update(version)

    def finish_update(self, version: str) -> None:
        """Gives the server's weights a version name, and drops the prefix cache of the old ones."""
        deadline = time.monotonic() + self.vllm.timeout
        while not self.call("/reset_prefix_cache", {})["success"]:  # status 200 with false while requests are running
            if time.monotonic() > deadline:
                raise UserError(
                    f"the vLLM server at {self.url} does not give up its prefix cache, which holds states of old "
                    "weights: it is busy with other requests"
                )
            time.sleep(0.5)
        self.call("/update_weight_version", {"new_version": version})

    def weight_version(self) -> str:
        """The version name that `finish_update` gave."""
        return self.call("/weight_info")["weight_version"]


def _message_of(answer: requests.Response) -> str:
    try:
        content = answer.json()
        error = content.get("error", content) if isinstance(content, dict) else content
        text = error.get("message", error) if isinstance(error, dict) else error
    except ValueError:
        text = answer.text
    return str(text).strip()[:500] or answer.reason


def _reason_of(error: requests.RequestException) -> str:
    while error.__context__ is not None:
        error = error.__context__
    return f"{type(error).__name__}: {error}"[:300]
