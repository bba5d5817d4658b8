"""scripts/vllm_client.py, with a server that checks requests and replies as vLLM does."""

import contextlib
import http.server
import json
import threading
import types

import numpy as np
import pytest
import vllm_client
from PIL import Image
from prompting_kit import CONFIG
from tokenizer_kit import TINY, run_main, tiny_vqgan, write_image

from EasyLM.errors import UserError
from EasyLM.models.llama import hf_layout, llama_config
from EasyLM.vocab import CODEBOOK_SIZE, NUM_SPECIAL_IDS
from tokenizer.media import images
from tokenizer.vqgan import Codec

MOST_IDS = 1024  # in a list of a request; constants of vllm/v1/worker/gpu/sample/logit_bias.py
MODEL = llama_config.updated(CONFIG, f"{{'codebook_size': {TINY.num_embeddings}}}")  # 100 special ids follow the codes


@contextlib.contextmanager
def server(reply):
    """Answers requests by `reply(body)`, which returns a list of choices or raises ValueError. Yields its address."""

    class Handler(http.server.BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            assert self.path == "/v1/models"
            self.send(200, {"data": [{"id": "HF_DIR", "object": "model"}]})

        def do_POST(self) -> None:
            assert self.path == "/v1/completions" and self.headers["Content-Type"] == "application/json"
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            try:
                self.send(200, {"object": "text_completion", "choices": reply(body)})
            except ValueError as error:
                self.send(400, {"error": {"message": str(error)}})

        def send(self, status: int, value: dict) -> None:
            data = json.dumps(value).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *_: object) -> None:
            pass

    listener = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=listener.serve_forever)
    thread.start()
    try:
        yield f"http://127.0.0.1:{listener.server_port}/v1"
    finally:
        listener.shutdown()
        thread.join()
        listener.server_close()


def vllm(body: dict, answer: list[int]) -> list[dict]:
    """The checks of vLLM's CompletionRequest and SamplingParams for a model with the settings MODEL."""
    known = {"model", "prompt", "max_tokens", "n", "temperature", "return_token_ids"}
    lists = {name: body[name] for name in ("allowed_token_ids", "logit_bias") if name in body}
    if body.keys() - known - lists.keys() or body["model"] != "HF_DIR":
        raise ValueError(f"unknown {sorted(body.keys() - known)}, {body['model']}")
    for ids in (body["prompt"], *lists.values()):
        if not ids or not all(0 <= int(i) < MODEL.vocab_size for i in ids):
            raise ValueError(f"out-of-vocab token ids. Vocabulary size: {MODEL.vocab_size}")
    assert all(type(i) is int for i in body["prompt"]) and all(len(ids) <= MOST_IDS for ids in lists.values())
    if len(body["prompt"]) + body["max_tokens"] > MODEL.max_sequence_length:
        raise ValueError("This model's maximum context length is 384 tokens.")
    if body["temperature"] == 0 and body["n"] > 1:
        raise ValueError("n must be 1 when using greedy sampling")
    assert set(answer) <= set(body.get("allowed_token_ids", answer)) - {int(i) for i in body.get("logit_bias", ())}
    shown = answer[: body["max_tokens"]] if body["return_token_ids"] else None
    return [{"index": i, "text": "", "finish_reason": "length", "token_ids": shown} for i in range(body["n"])]


@pytest.fixture
def settings(tmp_path):
    """Flags for a prompt of two images."""
    for seed in (0, 1):
        write_image(tmp_path / f"{seed}.png", seed)
    return {
        "images": f"{tmp_path}/0.png,{tmp_path}/1.png",
        "vqgan": tiny_vqgan(tmp_path / "vqgan"),
        "output": str(tmp_path / "answer.png"),
    }


def test_the_answer_is_decoded_and_the_prompt_encoded(settings):
    codec = Codec(settings["vqgan"])
    prompt_PN = codec.encode(np.stack([images.load(path, 16) for path in settings["images"].split(",")]))
    answer = np.random.default_rng(0).integers(0, TINY.num_embeddings, TINY.tokens_per_image)
    bodies = []
    with server(lambda body: bodies.append(body) or vllm(body, [*answer.tolist(), 0, 0])) as url:
        run_main(vllm_client, url=url, n_candidates=2, temperature=0.5, **settings)
    assert bodies[0]["prompt"] == prompt_PN.ravel().tolist() and bodies[0]["temperature"] == 0.5
    written = np.asarray(Image.open(settings["output"]))
    expected = images.to_uint8(codec.decode(answer[None]))[0]
    assert written.shape == (16, 2 * 16 + 2, 3)
    for column in (0, 18):
        np.testing.assert_array_equal(written[:, column : column + 16], expected)


def test_no_tokenizer_is_taken_by_default(settings):
    with pytest.raises(UserError, match="--vqgan is missing"):
        run_main(vllm_client, **settings | {"vqgan": ""})


def test_only_codes_are_allowed_and_the_export_suppresses_the_rest(settings):
    codec = Codec(settings["vqgan"])
    allowed = vllm_client.request("m", np.zeros((1, 64), np.int32), codec, 1, 1.0, 0)["allowed_token_ids"]
    exported = hf_layout.generation_config(MODEL)
    assert sorted(allowed + exported["suppress_tokens"]) == list(range(MODEL.vocab_size))
    assert {exported[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}.isdisjoint(allowed)


def test_more_codes_than_a_list_can_have(settings, monkeypatch):
    field = vllm_client.only_codes(CODEBOOK_SIZE, NUM_SPECIAL_IDS)
    suppressed = hf_layout.generation_config(llama_config.LLaMAConfig())["suppress_tokens"]
    assert field == {"logit_bias": {str(i): -100 for i in suppressed}} and len(suppressed) <= MOST_IDS
    assert all(len(*vllm_client.only_codes(codes, 100).values()) <= MOST_IDS for codes in (MOST_IDS, MOST_IDS + 1))

    monkeypatch.setattr(vllm_client, "_LONGEST_LIST", TINY.num_embeddings - 1)
    with server(lambda body: vllm(body, [])) as url:  # one id more than the model has
        with pytest.raises(UserError, match=f"completions: 400 .*Vocabulary size: {MODEL.vocab_size}"):
            run_main(vllm_client, url=url, special_ids=NUM_SPECIAL_IDS + 1, **settings)


@pytest.mark.parametrize(
    ("choices", "message"),
    [
        ([{"text": ""}], "no token_ids: vLLM returns them from version 0.10.2 on"),
        ([{"token_ids": [1] * 63}], "has 63 ids up to 1; an image of --vqgan has 64 codes below 32"),
        ([{"token_ids": [1] * 64}, {"token_ids": [1] * 63 + [32]}], "has 64 ids up to 32"),
        ([{"token_ids": "1"}], "token_ids must be a list"),
        ([], "the reply has no answer"),
    ],
)
def test_what_is_not_an_image_is_refused(choices, message):
    tokenizer = types.SimpleNamespace(num_codes=32, tokens_per_image=64)
    with pytest.raises(UserError, match=message):
        vllm_client.codes(choices, tokenizer)


def test_refused_requests_and_other_replies_are_one_line(settings):
    replies = [
        (lambda body: vllm({**body, "prompt": body["prompt"] * 5}, []), "400 Bad Request: .*maximum context length"),
        (lambda body: {}, "choices must be a list"),
    ]
    for reply, message in replies:
        with server(reply) as url, pytest.raises(UserError, match=f"^--url={url}: completions: {message}") as error:
            run_main(vllm_client, url=url, **settings)
        assert str(error.value).count("--url") == 1


def test_a_server_that_is_not_there(settings, port):
    for url, message in {f"http://127.0.0.1:{port}/v1": "refused", "localhost:8000/v1": "unknown url type"}.items():
        with pytest.raises(UserError, match=f"^--url={url}: models: .*{message}"):
            run_main(vllm_client, url=url, **settings)
