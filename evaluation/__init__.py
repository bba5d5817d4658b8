"""Prompts a trained Large Vision Model, measures its answers, and serves it. The modules are commands.

Rooms; tests/test_architecture.py holds the allowed imports:
    prompting   model and tokenizer of a checkpoint, which answer prompts of images with images
    tasks       few-shot tasks, benchmarks, metrics of answers, plots
    runs        many examples from files, in batches, resumable
    serving     the HTTP service and the demo page
"""
