"""Prompts a trained Large Vision Model, measures its answers, and serves it. The modules are commands.

Sub-packages; tests/test_architecture.py lists the allowed imports:
    prompting   model and tokenizer: prompts of images in, generated images out
    tasks       few-shot tasks, benchmarks, metrics of answers, plots
    runs        evaluation of many examples from files, in batches, resumable
    serving     the engine and the HTTP service
    page        the page
"""

from EasyLM.errors import UserError, check_own_package

try:
    check_own_package("tokenizer")
except UserError as error:
    raise ImportError(str(error)) from None
