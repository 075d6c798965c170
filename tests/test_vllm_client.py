"""The client against a server that misbehaves as real ones do now and then: errors inside, other tokens, empty answers, a cache that it keeps."""

import json
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from conftest import assert_holds

from ebft_utils.config import EvalConfig, LoraConfig, ModelConfig, PromptDataConfig, StructuredConfig, StructuredEBFTConfig, TrainConfig, UserError, VLLMConfig
from ebft_utils.vllm_client import ForgottenWeights, VLLMServer

INFO = {
    "model_config": {"logprobs_mode": "processed_logprobs", "max_model_len": 100, "dtype": "torch.float32"},
    "lora_config": {"max_lora_rank": 16},
    "parallel_config": {"data_parallel_size": 1},
}


class Fake(BaseHTTPRequestHandler):
    """Answers what the test has put into `answers[path]`: a list of (status, body), the last one again and again."""

    def do_GET(self):
        self.reply(None)

    def do_POST(self):
        self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

    def reply(self, body):
        path = self.path.partition("?")[0]
        self.server.requests.append((path, body, self.headers.get("Authorization")))
        answers = self.server.answers[path]
        status, answer = answers.pop(0) if len(answers) > 1 else answers[0]
        content = json.dumps(answer(body) if callable(answer) else answer).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *arguments):
        pass


def completion(body, **changes):
    choice = {"prompt_token_ids": body["prompt"], "token_ids": [7, 0], "logprobs": {"token_logprobs": [-1.0, -2.0]}, "finish_reason": "stop", **changes}
    return {"choices": [choice] * body["n"]}


@pytest.fixture
def fake():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    server.requests = []
    server.answers = {
        "/health": [(200, {})], "/v1/models": [(200, {"data": [{"id": "some/model", "parent": None}]})], "/server_info": [(200, {"vllm_config": INFO})],
        "/version": [(200, {"version": "0.32.0"})], "/v1/completions": [(200, completion)], "/reset_prefix_cache": [(200, {"success": True})],
        "/update_weight_version": [(200, {})],
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield server
    server.shutdown()
    server.server_close()


def config_of(fake, **vllm) -> StructuredConfig:
    return StructuredConfig(
        model=ModelConfig("some/model"),
        data=PromptDataConfig("unused", max_prompt_length=50),
        ebft=StructuredEBFTConfig(max_completion_length=40),
        train=TrainConfig("unused"),
        eval=EvalConfig(),
        lora=LoraConfig(r=16),
        vllm=VLLMConfig(port=fake.server_port, timeout=2.0, **vllm),
    )


def asked(fake, **vllm):
    return VLLMServer(config_of(fake, **vllm)).complete("some/model", [[1, 2], [3]], [9, 8], [11, 12], 2, 0.7, [0, 5])


def test_a_request_says_everything(fake):
    """What it leaves open the server would fill from the model's generation config; the seed is each prompt's own."""
    assert asked(fake, api_key="hush") == [[([7, 0], [-1.0, -2.0], False)] * 2] * 2
    bodies = sorted((body for path, body, _ in fake.requests), key=lambda body: body["seed"])
    assert {key for _, _, key in fake.requests} == {"Bearer hush"}
    common = {
        "model": "some/model", "n": 2, "temperature": 0.7, "stop_token_ids": [0, 5], "logprobs": 0, "return_token_ids": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
    }
    assert bodies == [{**common, "prompt": [1, 2], "max_tokens": 9, "seed": 11}, {**common, "prompt": [3], "max_tokens": 8, "seed": 12}]


def test_an_error_that_passes_is_asked_again(fake):
    """Guards against a run of days that ends with one bad answer."""
    fake.answers["/v1/completions"] = [(500, {"error": {"message": "oops"}}), (503, {}), (200, completion)]
    assert len(asked(fake)) == 2


def test_an_error_that_stays_ends_in_time(fake):
    """With the address, the server's own words, and the setting."""
    fake.answers["/v1/completions"] = [(500, {"error": {"message": "EngineCore encountered an issue"}})]
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        asked(fake)
    assert time.monotonic() - started < 8
    assert f"http://127.0.0.1:{fake.server_port} " in str(caught.value)
    assert_holds(str(caught.value), "EngineCore encountered an issue", "vllm.timeout")


def test_waiting_ends_with_the_run(fake):
    """Guards against a process that stays behind, because a thread still waits for a server."""
    fake.answers["/v1/completions"] = [(500, {})]
    server = VLLMServer(config_of(fake))
    server.vllm.timeout = 60.0
    threading.Timer(0.5, server.closed.set).start()
    started = time.monotonic()
    with pytest.raises(UserError):
        server.complete("some/model", [[1]], [9], [1], 2, 0.7, [0])
    assert time.monotonic() - started < 5


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"prompt_token_ids": [1, 2, 3, 4]}, "another prompt than it was sent"),
        ({"token_ids": [], "logprobs": {"token_logprobs": []}}, "an empty completion"),
        ({"logprobs": None}, "0 log-probs"),
        ({"finish_reason": "abort"}, "finish_reason 'abort'"),
    ],
)
def test_a_wrong_answer_is_no_rollout(fake, changes, words):
    """Guards against training on tokens that the policy was not asked for."""
    fake.answers["/v1/completions"] = [(200, lambda body: completion(body, **changes))]
    with pytest.raises(UserError, match=words):
        asked(fake)


def test_an_unknown_adapter_means_lost_weights(fake):
    """The server was started again: not an error of the user."""
    fake.answers["/v1/completions"] = [(404, {"error": {"message": "The model `ebft-1` does not exist."}})]
    with pytest.raises(ForgottenWeights):
        asked(fake)


def test_the_prefix_cache_is_really_dropped(fake):
    """200 with success false means no; asked until it says yes, and not for ever."""
    fake.answers["/reset_prefix_cache"] = [(200, {"success": False}), (200, {"success": False}), (200, {"success": True})]
    VLLMServer(config_of(fake)).finish_update("v1")
    assert [path for path, _, _ in fake.requests] == ["/reset_prefix_cache"] * 3 + ["/update_weight_version"]
    fake.answers["/reset_prefix_cache"] = [(200, {"success": False})]
    with pytest.raises(UserError, match="does not give up its prefix cache"):
        VLLMServer(config_of(fake)).finish_update("v2")


@pytest.mark.parametrize(
    "path, answer, words",
    [
        ("/v1/models", (200, {"data": [{"id": "other", "parent": None}]}), ["model.name_or_path", "'other'", "'some/model'"]),
        ("/v1/models", (401, {"error": "Unauthorized"}), ["vllm.api_key"]),
        ("/server_info", (404, {"detail": "Not Found"}), ["VLLM_SERVER_DEV_MODE=1", "serve_vllm.py"]),
        ("/server_info", {"model_config": {"logprobs_mode": "raw_logprobs"}}, ["--logprobs-mode raw_logprobs"]),
        ("/server_info", {"model_config": {"max_model_len": 80}}, ["vllm.max_model_len", "80", "90"]),
        ("/server_info", {"lora_config": None}, ["lora", "--enable-lora"]),
        ("/server_info", {"lora_config": {"max_lora_rank": 8}}, ["lora.r", "16", "8", "--max-lora-rank"]),
        ("/server_info", {"parallel_config": {"data_parallel_size": 2}}, ["vllm.data_parallel_size", "2"]),
    ],
)
def test_the_wrong_server(fake, path, answer, words):
    """Each fault with its own message, before anything is sent."""
    if isinstance(answer, dict):
        answer = (200, {"vllm_config": {name: None if name in answer and answer[name] is None else {**section, **answer.get(name, {})} for name, section in INFO.items()}})
    fake.answers[path] = [answer]
    config = config_of(fake)
    with pytest.raises(UserError) as caught:
        VLLMServer(config).check(config)
    assert f"http://127.0.0.1:{fake.server_port}" in str(caught.value)
    assert_holds(str(caught.value), *words)


def test_the_right_server(fake):
    """What is there, in words."""
    config = config_of(fake)
    assert VLLMServer(config).check(config) == f"vLLM 0.32.0 at http://127.0.0.1:{fake.server_port}: some/model in float32, 100 tokens, adapters up to rank 16"
