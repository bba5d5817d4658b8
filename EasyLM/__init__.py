"""EasyLM: data, training and checkpoints of sequence models in JAX. It has no code for images or prompts.

Rooms, from the lowest to the highest; tests/test_architecture.py holds the allowed imports:
    storage       paths, atomic writes, digests, memory-mapped columns
    data          JSONL and packed files, or text, to rows of tokens
    parallel      mesh, partition rules, several processes
    checkpoints   formats, loading, saving, run directories
    publishing    model cards, and uploads to the Hugging Face Hub
    training      the training loop of any model
    planning      plans of a train step, without its devices
    models        attention, losses, generation, and the LLaMA with its commands

Modules that all rooms may import:
    vocab           ids of image codes and special tokens
    errors          UserError, for mistakes that the user can correct
    skipped_inputs  unusable inputs of a command: reported, counted and skipped
    flags           declared command-line settings
    interrupt       Ctrl-C
    protocols       the protocols of remote paths
    process_pool    worker processes that do not import JAX
    shared_results  arrays from them by shared memory
    progress        progress bars, and lines in the log of a job
"""

__version__ = "0.2.0"
