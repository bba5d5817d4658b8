"""Checks and measurements of a GPU: `bash scripts/gpu_day.sh --output_json=FILE`.

`main` runs each section below in processes of their own, with time limits, and writes their records to one JSON file.

Modules:
  main: the command. It starts the jobs and prints the table.
  measure: records, timers, and rates of the device.
  machine: copy, matmul and attention rates of the device.
  correctness: attention, gradients, losses, decoding and image codes against references on the CPU.
  train: tokens per second and memory of the trainer's step.
  candidates: the settings that `train` tries for each preset.
  profile: time by kernel of a trace.
  decode: rates of prompts and of generated tokens.
  peer: the same rates of transformers.
  vqgan: images per second of the tokenizer.
  table: compares the records with the limits of the device.
"""
