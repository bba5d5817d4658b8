"""The endpoints of the service, in process: their results equal those of the prompter."""

import base64
import contextlib
import dataclasses
import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

import jax
import numpy as np
import pytest
from prompting_kit import tiny_params
from serve_kit import (
    LIMITS,
    MODEL,
    SECONDS,
    TINY,
    TOKENS,
    HeldPrompter,
    ask,
    base64_of,
    events_of,
    form,
    pixels_of,
    png,
    post,
    tiny_engine,
    tiny_prompter,
    wait_until,
)

from evaluation.prompting import GenerationSettings, Prompter
from evaluation.serving import responses
from evaluation.serving.app import make_app
from evaluation.serving.engine import PAGE_ITEMS
from evaluation.tasks import metrics
from tokenizer.media import images


def test_files_base64_and_tokens_are_the_same_prompt(app):
    tokens = post(app, "/tokenize", **form(png(1))).json()["tokens"]
    assert np.shape(tokens) == (1, TOKENS) and len(set(tokens[0])) > 3
    np.testing.assert_array_equal(
        tokens, tiny_prompter().encode(images.load(io.BytesIO(png(1)), TINY.resolution)[None])
    )
    fields = {"seed": 5, "n_candidates": 2}
    answers = [
        post(app, "/generate", **form(png(1), **fields)),
        post(app, "/generate", json={"pictures": base64_of(png(1)), **fields}),
        post(app, "/generate", json={"tokens": tokens, **fields}),
    ]
    assert all(answer.status_code == 200 for answer in answers), answers[0].text
    assert answers[0].json() == answers[1].json() == answers[2].json()
    answer = answers[0].json()
    (samples_CFN,) = tiny_prompter().generate([np.array(tokens)], GenerationSettings(num_candidates=2, seed=5))
    np.testing.assert_array_equal(answer["tokens"], samples_CFN)
    pixels = np.stack([[pixels_of(base64.b64decode(file)) for file in row] for row in answer["pictures"]])
    np.testing.assert_array_equal(pixels, images.to_uint8(tiny_prompter().decode(samples_CFN)))


def test_extreme_but_valid_settings_have_the_meaning_of_their_limits(app):
    def tokens(**fields):
        response = post(app, "/generate", **form(png(1), n_candidates=2, seed=5, **fields))
        assert response.status_code == 200, response.text
        return response.json()["tokens"]

    most_likely, default = tokens(temperature=0), tokens()
    assert tokens(top_k=10**30, context_frames=10**30) == default != most_likely
    assert tokens(top_p="1e-300") == tokens(top_k=1) == most_likely
    assert np.max(tokens(temperature="1e300")) < TINY.num_embeddings
    assert tokens(temperature="1e300", top_p=0.5) != default


@pytest.mark.slow
def test_results_do_not_depend_on_the_batch(app):
    requests = [("POST", "/generate", form(png(i), n_candidates=2, seed=seed)) for i, seed in ((1, 5), (1, 6), (2, 6))]
    engine = tiny_engine(batch_window_ms=1000 * SECONDS)

    def close_once_three_wait():  # closing ends the batch window
        wait_until(lambda: engine.num_waiting == 3)
        assert engine.close(SECONDS)

    with ThreadPoolExecutor() as threads:
        closing = threads.submit(close_once_three_wait)
        together = [answer.json() for answer in ask(make_app(engine, LIMITS), *requests)]
        closing.result()
    assert [answer.pop("batch") for answer in together] == [3, 3, 3]
    for request, answer in zip(requests, together, strict=True):
        alone = ask(app, request)[0].json()
        assert alone.pop("batch") == 1
        assert alone == answer
    assert len({str(answer["tokens"]) for answer in together}) == 3


def test_the_accept_header_and_the_field_output_select_png(app):
    by_header = post(app, "/generate", **form(png(1), n_candidates=2), headers={"accept": "image/png"})
    by_field = post(app, "/generate", **form(png(1), n_candidates=2, output="png"))
    assert by_header.headers["content-type"] == by_field.headers["content-type"] == "image/png"
    assert by_header.content == by_field.content
    assert pixels_of(by_header.content).shape == (2 * TINY.resolution + 2, TINY.resolution, 3)


def test_a_stream_sends_previews_row_by_row_then_the_answer(app, monkeypatch):
    monkeypatch.setattr("evaluation.serving.progress._PAUSE_FACTOR", -1)  # no pause between previews

    def publish(self, preview, publish=responses.LatestPreview.publish):
        publish(self, preview)
        wait_until(lambda: not self.pending)  # else a slow stream would miss it

    monkeypatch.setattr(responses.LatestPreview, "publish", publish)
    request = form(png(1), n_candidates=2, seed=5)
    response = post(app, "/generate", **request, headers={"accept": "text/event-stream"})
    assert response.headers["content-type"].startswith("text/event-stream")
    *previews, (last, answer) = events_of(response)
    assert last == "answer" and answer == post(app, "/generate", **request).json()
    assert previews and {name for name, _ in previews} == {"partial"}
    assert [body["done"] for _, body in previews] == sorted({body["done"] for _, body in previews})
    for _, body in previews:
        assert body["total"] == TOKENS and 0 < body["done"] < TOKENS
        generated_rows = body["done"] // 8 * TINY.resolution // 8
        pixels = np.stack([pixels_of(base64.b64decode(row[0])) for row in body["pictures"]])
        assert pixels.shape == (2, TINY.resolution, TINY.resolution, 3)
        assert (pixels[:, generated_rows:] == 128).all() and (pixels[:, :generated_rows] != 128).any()


def test_perplexity_equals_that_of_the_prompter(app):
    prompter = tiny_prompter()
    prompt, target = (prompter.encode(images.load(io.BytesIO(png(i)), TINY.resolution)[None]) for i in (1, 2))
    expected = metrics.perplexity(prompter.log_likelihoods([prompt], [target]))[0]
    files = [("pictures", png(1)), ("targets", png(2))]
    by_files = post(app, "/perplexity", files=files).json()
    by_tokens = post(app, "/perplexity", json={"tokens": prompt.tolist(), "target_tokens": target.tolist()}).json()
    assert by_files == by_tokens
    assert by_files["perplexity"] == pytest.approx(expected) == by_files["perplexities"][0]


def test_ready_after_warming_up():
    prompter = HeldPrompter()
    prompter.release.set()
    engine = tiny_engine(prompter, warm_up="1,9", max_batch=2)
    assert engine.state == "warming up"
    engine.warm_up(GenerationSettings()).result(SECONDS)
    wait_until(lambda: engine.state != "warming up")  # the future's callback runs just after its result is set
    assert engine.state == "ready"
    ready = ask(make_app(engine), ("GET", "/ready", {}))[0]
    assert ready.status_code == 200
    assert ready.json()["ready"] is True and ready.json()["max_pictures"] == 3
    engine.close(SECONDS)


@contextlib.contextmanager
def compilations(caplog) -> Iterator[list[str]]:
    """Collects what JAX compiles meanwhile, in any thread."""
    caplog.clear()
    found: list[str] = []
    jax.config.update("jax_log_compiles", True)
    try:
        yield found
    finally:
        jax.config.update("jax_log_compiles", False)
    found += [text for record in caplog.records if (text := record.getMessage()).startswith("Compiling ")]


@pytest.mark.slow
def test_default_requests_compile_nothing_after_warming_up(caplog):
    """With images or tokens, with previews or without. The model's settings are those of no other test."""
    model = dataclasses.replace(MODEL, max_sequence_length=5 * TOKENS)
    base = tiny_prompter()
    prompter = Prompter(base.codec, model, tiny_params(model, 5, 3), base.mesh)
    engine = tiny_engine(prompter, warm_up="2", max_batch=1)
    with compilations(caplog) as warm_up:
        engine.warm_up(GenerationSettings()).result(SECONDS)
    assert any("jit(_prefill)" in name for name in warm_up)
    app = make_app(engine)
    files = [("pictures", png(1)), ("pictures", png(2))]
    with compilations(caplog) as later:
        for output in ("json", "stream"):
            assert post(app, "/generate", files=files, data={"output": output}).status_code == 200
        tokens = post(app, "/tokenize", files=files).json()["tokens"]
        assert post(app, "/generate", json={"tokens": tokens, "seed": 3, "temperature": 0.5}).status_code == 200
        assert post(app, "/perplexity", files=[*files, ("targets", png(3))]).status_code == 200
    assert not later
    assert engine.close(SECONDS)


def test_the_page_compiles_no_program_of_the_service():
    prompter = HeldPrompter()
    prompter.release.set()
    prompter.log_likelihoods = pytest.fail
    engine = tiny_engine(prompter, warm_up="1", max_batch=1)
    engine.warm_up(GenerationSettings(), PAGE_ITEMS).result(SECONDS)
    assert prompter.batches == [1] and engine.close(SECONDS)


def test_the_schema_documents_every_field_and_its_page_loads_nothing_from_other_hosts(app):
    page, schema = ask(app, ("GET", "/docs", {}), ("GET", "/openapi.json", {}))
    assert "//" not in page.text.replace("http://test", "")
    for path in ("/generate", "/perplexity", "/tokenize"):
        operation = schema.json()["paths"][path]["post"]
        assert set(operation["requestBody"]["content"]) == {"application/json", "multipart/form-data"}
        assert {"401", "413", "422", "429", "503"} <= set(operation["responses"])
        fields = operation["requestBody"]["content"]["application/json"]["schema"]["properties"]
        assert all(field["description"] for field in fields.values())
