"""Serving: the HTTP service and the page, two front ends of one engine.

May import: tokenizer.media, tokenizer.builders, tokenizer.synthetic, evaluation.prompting,
evaluation.tasks. FastAPI, uvicorn, pydantic and gradio are optional: this file imports none of them.

The path of a request:
  app           authorises; `limits` has bounded the body's size and time before
  protocol      parses JSON or a form; `GenerationSettings` checks values, `uploads` counts and decodes images
  engine        checks what depends on the model, and puts the request into the queue of `batcher`
  batch_worker  computes a batch of similar requests with `Prompter.generate`; `progress` sends previews
  responses     encodes the answer: JSON, PNG or server-sent events

Modules:
  app            the FastAPI application: routes, errors, schema
  endpoints      the handlers of the routes
  protocol       requests and answers as pydantic models
  limits         limits of size, time and number: ASGI middleware and idle timeout
  uploads        image files of a request
  refusals       errors as HTTP answers
  responses      bodies of answers and streams
  engine         `Engine`: the queue in front of a prompter
  batcher        a queue that forms batches
  batch_worker   computes batches
  progress       previews while tokens are generated
  server         uvicorn, warm-up and orderly stop
  page           layout of the page
  page_handlers  what its buttons do
  page_files     files that it shows and offers
  page_examples  example prompts

Vocabulary:
  prompt, candidate   as in `evaluation.prompting`
  preview             the images of a request before all their tokens are generated
  refusal             an HTTP answer that is an error
  warm up             compile before the first request
"""

from evaluation.serving.batch_worker import Answer, Prompt
from evaluation.serving.engine import ENGINE_FLAGS, Engine, EngineSettings
from evaluation.serving.limits import Limits

__all__ = ["ENGINE_FLAGS", "Answer", "Engine", "EngineSettings", "Limits", "Prompt"]
