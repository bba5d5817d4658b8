"""Serving: the engine, and the HTTP service in front of it. `evaluation.page` is another front end.

May import: tokenizer.media, evaluation.prompting, evaluation.tasks. FastAPI, uvicorn and pydantic are optional: this
file imports none of them.

The path of a request:
  limits          bounds the body's size and time
  header_check    refuses other hosts and pages of other origins
  app             authorizes
  request_bodies  parses JSON or a form into a model of `protocol`; `GenerationSettings` checks values
  workload        bounds the work of the client; then `uploads` counts and decodes images
  engine          validates the request against the model, and puts it into the queue of `batcher`
  batch_worker    computes a batch of similar requests with `Prompter.generate`; `progress` sends previews
  responses       encodes the answer: JSON, PNG or server-sent events

Modules:
  app            the FastAPI application: routes, errors, schema
  endpoints      the handlers of the routes
  header_check   allowed hosts and origins: ASGI middleware
  protocol       requests and responses as pydantic models, and their schemas
  request_bodies parsers of JSON and forms
  limits         limits of size, time and number: ASGI middleware and an idle timeout
  uploads        image files of a request
  request_errors HTTP error responses
  responses      bodies of responses and streams
  engine         `Engine`: the queue in front of a prompter
  workload       bounds of a request's work, and of the outstanding work of each client
  batcher        a fair queue that forms batches, in a lane for short, for long, and for uncompiled jobs
  batch_worker   computes batches
  progress       previews while tokens are generated
  server         uvicorn, warm-up and graceful shutdown

Vocabulary:
  prompt, candidate   as in `evaluation.prompting`
  answer              the generated images and tokens of a request
  preview             the images of a request before all their tokens are generated
  warm up             compile before the first request
  rehearsal           a job that only compiles a program
  client              who sends requests: an IP address
  cost                the images that a request generates; 1 for other requests
"""

from evaluation.serving.batch_worker import Prompt
from evaluation.serving.batcher import exit_process
from evaluation.serving.engine import ENGINE_FLAGS, Engine, EngineSettings
from evaluation.serving.limits import Limits

__all__ = ["ENGINE_FLAGS", "Engine", "EngineSettings", "Limits", "Prompt", "exit_process"]
