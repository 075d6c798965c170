"""The client against a server that misbehaves, as real ones do now and then.

Errors inside, other tokens, empty answers, a cache that it keeps.
"""

import json
import socket
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from ebft_utils.config.data import EvalConfig, PromptDataConfig
from ebft_utils.config.modes import StructuredConfig
from ebft_utils.config.sections import LoraConfig, ModelConfig, StructuredEBFTConfig, TrainConfig, VLLMConfig
from ebft_utils.config.settings import UserError
from ebft_utils.models import Policy, load_policy
from ebft_utils.run.distributed import AgreedError, prepare_accelerator
from ebft_utils.server.client import ForgottenWeights, VLLMServer
from ebft_utils.server.weight_sync import ServedPolicy
from helpers import assert_holds

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
    choice = {"prompt_token_ids": body["prompt"], "token_ids": [7, 0], "logprobs": {"token_logprobs": [-1.0, -2.0]}}
    choice |= {"finish_reason": "stop", **changes}
    return {"choices": [choice] * body["n"]}


@pytest.fixture
def fake():
    server = ThreadingHTTPServer(("127.0.0.1", 0), Fake)
    server.requests = []
    server.answers = {
        "/health": [(200, {})],
        "/v1/models": [(200, {"data": [{"id": "some/model", "parent": None}]})],
        "/server_info": [(200, {"vllm_config": INFO})],
        "/version": [(200, {"version": "0.32.0"})],
        "/v1/completions": [(200, completion)],
        "/reset_prefix_cache": [(200, {"success": True})],
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
        train=TrainConfig("unused", max_steps=1),
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
    common = {"model": "some/model", "n": 2, "temperature": 0.7, "stop_token_ids": [0, 5]}
    common |= {"logprobs": 0, "return_token_ids": True, "top_p": 1.0, "top_k": 0, "min_p": 0.0}
    common |= {"repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0}
    assert bodies == [
        {**common, "prompt": [1, 2], "max_tokens": 9, "seed": 11},
        {**common, "prompt": [3], "max_tokens": 8, "seed": 12},
    ]


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
    no, yes = (200, {"success": False}), (200, {"success": True})
    fake.answers["/reset_prefix_cache"] = [no, no, yes]
    VLLMServer(config_of(fake)).finish_update("v1")
    assert [path for path, _, _ in fake.requests] == ["/reset_prefix_cache"] * 3 + ["/update_weight_version"]
    fake.answers["/reset_prefix_cache"] = [no]
    with pytest.raises(UserError, match="does not give up its prefix cache"):
        VLLMServer(config_of(fake)).finish_update("v2")


OTHER_MODEL = {"data": [{"id": "other", "parent": None}]}
WRONG_SERVERS = [  # a path, its answer or what it changes in INFO, words of the message
    ("/v1/models", (200, OTHER_MODEL), ["model.name_or_path", "'other'", "'some/model'"]),
    ("/v1/models", (401, {"error": "Unauthorized"}), ["vllm.api_key"]),
    ("/server_info", (404, {"detail": "Not Found"}), ["VLLM_SERVER_DEV_MODE=1", "serve_vllm.py"]),
    ("/server_info", {"model_config": {"logprobs_mode": "raw_logprobs"}}, ["--logprobs-mode raw_logprobs"]),
    ("/server_info", {"model_config": {"max_model_len": 80}}, ["vllm.max_model_len", "80", "90"]),
    ("/server_info", {"lora_config": None}, ["lora", "--enable-lora"]),
    ("/server_info", {"lora_config": {"max_lora_rank": 8}}, ["lora.r", "16", "8", "--max-lora-rank"]),
    ("/server_info", {"parallel_config": {"data_parallel_size": 2}}, ["vllm.data_parallel_size", "2"]),
]


@pytest.mark.parametrize("path, answer, words", WRONG_SERVERS)
def test_the_wrong_server(fake, path, answer, words):
    """Each fault with its own message, before anything is sent."""
    if isinstance(answer, dict):
        ((section, changes),) = answer.items()
        changed = None if changes is None else {**INFO[section], **changes}
        answer = (200, {"vllm_config": {**INFO, section: changed}})
    fake.answers[path] = [answer]
    config = config_of(fake)
    with pytest.raises(UserError) as caught:
        VLLMServer(config).check(config)
    assert f"http://127.0.0.1:{fake.server_port}" in str(caught.value)
    assert_holds(str(caught.value), *words)


def test_the_right_server(fake):
    """What is there, in words."""
    config = config_of(fake)
    place = f"vLLM 0.32.0 at http://127.0.0.1:{fake.server_port}"
    expected = f"{place}: some/model in float32, 100 tokens, adapters up to rank 16"
    assert VLLMServer(config).check(config) == expected


# ----------------------------------------------------------------------------------------------------------------------
# Connections


def test_a_server_that_comes_up_late_is_waited_for(fake):
    """Guards against a trainer that has to be started after its server: nobody listens at first, then somebody does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    late = ThreadingHTTPServer(("127.0.0.1", port), Fake, bind_and_activate=False)
    late.requests, late.answers = [], fake.answers
    config = config_of(fake)
    config.vllm.port, config.vllm.timeout = port, 30.0

    def listen():
        late.server_bind()
        late.server_activate()
        late.serve_forever()

    threading.Timer(0.7, listen).start()
    started = time.monotonic()
    try:
        assert VLLMServer(config).call("/version") == {"version": "0.32.0"}
        assert 0.5 < time.monotonic() - started < 20 and [path for path, _, _ in late.requests] == ["/version"]
    finally:
        late.shutdown()
        late.server_close()


def test_nobody_listens(fake):
    """Guards against waiting for ever, and against a message that does not say where and what to do."""
    config = config_of(fake)
    fake.shutdown()
    fake.server_close()
    started = time.monotonic()
    with pytest.raises(UserError) as caught:
        VLLMServer(config).call("/health")
    assert 1.5 < time.monotonic() - started < 8
    assert f"http://127.0.0.1:{config.vllm.port} " in str(caught.value)
    assert_holds(str(caught.value), "vllm.timeout: 2", "Connection refused", "serve_vllm.py", "ebft.use_vllm=false")


BROKEN = {
    "in its middle": b"HTTP/1.1 200 OK\r\nContent-Length: 200\r\n\r\n{",
    "in a chunk": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n40\r\n{",
    "before it": b"",
}


@pytest.mark.parametrize("broken", BROKEN.values(), ids=BROKEN)
def test_an_answer_that_breaks_off_is_asked_for_again(fake, broken):
    """Guards against a traceback because a connection was lost while the answer came.

    It would be on one process, while the others wait.
    """
    answers = [broken, b"HTTP/1.1 200 OK\r\nContent-Length: 8\r\nConnection: close\r\n\r\n" + b'{"a": 1}']
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()

        def answer():
            for content in answers:
                connection, _ = listener.accept()
                with connection:
                    connection.recv(65536)
                    connection.sendall(content)

        threading.Thread(target=answer, daemon=True).start()
        config = config_of(fake)
        config.vllm.port = listener.getsockname()[1]
        assert VLLMServer(config).call("/version") == {"a": 1}


KEYS = [(None, "hers", "Bearer hers"), ("mine", "hers", "Bearer mine"), (None, None, None)]


@pytest.mark.parametrize("given, in_environment, sent", KEYS)
def test_the_key_comes_from_settings_or_environment(fake, monkeypatch, given, in_environment, sent):
    """Guards against a key that is sent although nobody gave one, or the wrong one of two."""
    monkeypatch.delenv("VLLM_API_KEY", raising=False)
    if in_environment:
        monkeypatch.setenv("VLLM_API_KEY", in_environment)
    asked(fake, api_key=given)
    assert {key for _, _, key in fake.requests} == {sent}


# ----------------------------------------------------------------------------------------------------------------------
# Weight sync with a server that computes


class FakeModel:
    """What vLLM does with weights, by transformers.

    ignores: from which update on nothing takes effect; raw: log-probs of sampled tokens are without the temperature.
    """

    def __init__(self, fake, folder, lora: bool, ignores: int = 1000, raw: bool = False, longest: int = 100):
        self.folder, self.ignores, self.raw, self.longest = folder, ignores, raw, longest
        self.base, self.adapters, self.updates = self.fresh(), {}, 0
        info = {**INFO, "model_config": {**INFO["model_config"], "max_model_len": longest}}
        info["lora_config"] = INFO["lora_config"] if lora else None
        fake.answers |= {
            "/v1/models": [(200, {"data": [{"id": str(folder), "parent": None}]})],
            "/server_info": [(200, {"vllm_config": info})],
            "/v1/completions": [(200, self.complete)],
            "/v1/load_lora_adapter": [(200, self.load)],
            "/v1/unload_lora_adapter": [(200, {})],
            "/collective_rpc": [(200, self.reload)],
        }

    def fresh(self):
        return AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32).eval()

    def load(self, body):
        self.updates += 1
        before = list(self.adapters.values())[-1] if self.adapters else self.base
        if self.updates < self.ignores:
            adapter = PeftModel.from_pretrained(self.fresh(), body["lora_path"]).eval()
        else:
            adapter = before
        self.adapters[body["lora_name"]] = adapter
        return {}

    def reload(self, body):
        self.updates += 1
        if self.updates < self.ignores:
            self.base.load_state_dict(load_file(f"{body['kwargs']['weights_path']}/model.safetensors"))
        return {}

    @torch.no_grad()
    def complete(self, body):
        prompt = body["prompt"]
        sampled = [7, 8, 9, 10][: min(body["max_tokens"], self.longest - len(prompt))]
        model = self.base if body["model"] == str(self.folder) else self.adapters[body["model"]]
        logits = model(torch.tensor([prompt + sampled])).logits[0, :-1]
        targets = torch.tensor(prompt + sampled)[1:, None]
        plain, tempered = (
            scores.log_softmax(-1).gather(-1, targets)[:, 0].tolist()
            for scores in (logits, logits / body["temperature"])
        )
        given = [None] + [{str(token): {"logprob": value}} for token, value in zip(prompt[1:], plain, strict=False)]
        logprobs = {"token_logprobs": (plain if self.raw else tempered)[len(prompt) - 1 :]}
        changes = dict(token_ids=sampled, logprobs=logprobs, prompt_logprobs=given, finish_reason="length")
        return completion(body, **changes)


def served(fake, model_folder, tmp_path, lora: bool, probe: int = 30, longest: int = 90) -> ServedPolicy:
    """A policy beside the fake server."""
    config = StructuredConfig(
        model=ModelConfig(str(model_folder)),
        data=PromptDataConfig("unused", max_prompt_length=longest - 40),
        ebft=StructuredEBFTConfig(max_completion_length=40, temperature=0.7),
        train=TrainConfig(str(tmp_path / "run"), max_steps=1),
        lora=LoraConfig(r=4) if lora else None,
        vllm=VLLMConfig(port=fake.server_port, timeout=2.0, sync_folder=str(tmp_path / "sync"), sync_tolerance=1e-3),
    )
    accelerator = prepare_accelerator(config)
    torch.manual_seed(0)
    policy, probe_tokens = Policy(load_policy(config)), [3 + 5 * index % 290 for index in range(probe)]
    return ServedPolicy(config, accelerator, policy, VLLMServer(config), probe_tokens)


KINDS = pytest.mark.parametrize("lora", [True, False], ids=["LoRA", "full"])
OLD_WEIGHTS = "it answers with the weights of before: what is sent does not take effect"


@KINDS
def test_nothing_is_used_twice(fake, model_folder, tmp_path, lora):
    """Each update has its own name and folder, and is asked for by it.

    vLLM keys its prefix cache by name and path of an adapter, and re-reads adapters that are loaded with load_inplace.
    """
    FakeModel(fake, model_folder, lora)
    policy = served(fake, model_folder, tmp_path, lora)
    before = {name: parameter.detach().clone() for name, parameter in policy.policy.named_parameters()}
    policy.start(0)
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.policy.named_parameters())
    for step in (1, 2, 2):  # the last again, as when the server has lost it
        with torch.no_grad():
            for parameter in policy.policy.parameters():
                parameter += 0.02 * parameter.requires_grad
        policy.sync(step)
    assert policy.version == 2
    assert not [body for _, body, _ in fake.requests if body and "load_inplace" in json.dumps(body)]
    load_path = "/v1/load_lora_adapter" if lora else "/collective_rpc"
    loads = [body for path, body, _ in fake.requests if path == load_path]
    folders = [body["lora_path"] if lora else body["kwargs"]["weights_path"] for body in loads]
    assert len(loads) == len(set(folders)) == 5  # the proof of the start, and four updates
    scored = [body["model"] for path, body, _ in fake.requests if path == "/v1/completions"]
    if lora:
        names = [body["lora_name"] for body in loads]
        assert len(set(names)) == 5 and scored == names and policy.name == names[-1]
        assert [body["lora_name"] for path, body, _ in fake.requests if path == "/v1/unload_lora_adapter"] == names[:-1]
    else:
        versions = [body["new_version"] for path, body, _ in fake.requests if path == "/update_weight_version"]
        assert len(set(versions)) == 5 and scored == [str(model_folder)] * 5
        turn = ["/collective_rpc", "/reset_prefix_cache", "/v1/completions"]
        assert [path for path, _, _ in fake.requests if path in turn] == turn * 5


@KINDS
@pytest.mark.parametrize(
    "ignores, words", [(1, OLD_WEIGHTS), (2, "it has old weights, or only a part of the new ones")]
)
def test_weights_that_do_not_arrive_end_the_run(fake, model_folder, tmp_path, lora, ignores, words):
    """Guards against training on completions of another model.

    The server answers 200 and takes nothing, or nothing after the first time.
    """
    FakeModel(fake, model_folder, lora, ignores=ignores)
    policy = served(fake, model_folder, tmp_path, lora)
    before = {name: parameter.detach().clone() for name, parameter in policy.policy.named_parameters()}
    with pytest.raises(AgreedError, match=words):
        policy.start(0)
    assert policy.version is None
    assert all(torch.equal(parameter, before[name]) for name, parameter in policy.policy.named_parameters())


@KINDS
def test_logprobs_at_another_temperature_are_noticed(fake, model_folder, tmp_path, lora):
    """Guards against importance weights that divide two different distributions.

    Raw log-probs, of a server that samples at 0.7.
    """
    FakeModel(fake, model_folder, lora, raw=True)
    words = "agree on a text, and not on sampled tokens: their log-probs at temperature 0.7 differ"
    with pytest.raises(AgreedError, match=words):
        served(fake, model_folder, tmp_path, lora).start(0)


@pytest.mark.parametrize("probe", [48, 50])
def test_the_probe_leaves_room_for_what_is_sampled_behind_it(fake, model_folder, tmp_path, probe):
    """Guards against a run that cannot start because its first row is as long as a row may be.

    vLLM, which takes 50 tokens here, samples what has room, and nothing behind 50.
    """
    FakeModel(fake, model_folder, True, longest=50)
    policy = served(fake, model_folder, tmp_path, True, probe=probe, longest=50)
    policy.start(0)
    assert policy.version == 0
