"""Serving: the HTTP service and the page, two front ends of one engine.

May import: tokenizer.media, tokenizer.builders, tokenizer.synthetic, evaluation.prompting,
evaluation.tasks. FastAPI, uvicorn, pydantic and gradio are optional: this file imports none of them.

The path of a request:
  limits        bounds the body's size and time
  app           authorises
  protocol      parses JSON or a form; `GenerationSettings` checks values, `uploads` counts and decodes images
  engine        validates the request against the model, and puts it into the queue of `batcher`
  batch_worker  computes a batch of similar requests with `Prompter.generate`; `progress` sends previews
  responses     encodes the answer: JSON, PNG or server-sent events

Modules:
  app            the FastAPI application: routes, errors, schema
  endpoints      the handlers of the routes
  protocol       requests and responses as pydantic models
  limits         limits of size, time and number: ASGI middleware and an idle timeout
  uploads        image files of a request
  request_errors HTTP error responses
  responses      bodies of responses and streams
  engine         `Engine`: the queue in front of a prompter
  batcher        a queue that forms batches
  batch_worker   computes batches
  progress       previews while tokens are generated
  server         uvicorn, warm-up and graceful shutdown
  page           layout of the page
  page_handlers  the handlers of its buttons
  page_files     files that it shows and offers for download
  page_examples  example prompts

Vocabulary:
  prompt, candidate   as in `evaluation.prompting`
  answer              the generated images and tokens of a request
  preview             the images of a request before all their tokens are generated
  warm up             compile before the first request
"""

from evaluation.serving.batch_worker import Prompt
from evaluation.serving.engine import ENGINE_FLAGS, Engine, EngineSettings
from evaluation.serving.limits import Limits

__all__ = ["ENGINE_FLAGS", "Engine", "EngineSettings", "Limits", "Prompt"]
